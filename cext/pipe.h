/* SPDX-License-Identifier: MIT */
/*
 * A bounded byte pipe from a vCPU to a Python reader thread.
 *
 * Theory of operation: vCPU threads put bytes in, one reader takes them out in batches. The writer wakes the
 * reader only when it is asleep, so a flood costs one futex call a batch, not one a byte. A full pipe pushes
 * back on the guest: a serial port reports "transmitter busy", a stream waits. But once a wait was in vain
 * nobody waits again until the reader has taken something, and after pv_pipe_hurry() nobody waits at all:
 * what does not fit is dropped and counted, so that a stuck terminal neither stops the guest for good nor
 * keeps a machine from ending.
 */
#ifndef PV_PIPE_H
#define PV_PIPE_H

#include <pthread.h>
#include "types.h"

/* cffi: begin */
struct pv_pipe;
/* size: bytes, a power of two; NULL where it is none or memory is short. */
struct pv_pipe *pv_pipe_new(uint32_t size);
void pv_pipe_free(struct pv_pipe *p);
/*
 * Take up to len bytes; waits up to timeout_ms (-1: for ever) for the first. Returns the count, 0 on
 * time-out, -1 once the pipe is closed and empty.
 */
int pv_pipe_read(struct pv_pipe *p, uint8_t *buf, uint32_t len, int timeout_ms);
void pv_pipe_close(struct pv_pipe *p);
/* No more waiting for room, also for those who wait already. */
void pv_pipe_hurry(struct pv_pipe *p);
uint64_t pv_pipe_dropped(struct pv_pipe *p);
uint64_t pv_pipe_total(struct pv_pipe *p);
/* Put all of buf in; waits for room up to wait_ms, then drops and counts the rest. Returns the bytes stored.
 */
uint32_t pv_pipe_write(struct pv_pipe *p, const uint8_t *buf, uint32_t len, int wait_ms);
/* cffi: end */

/* Room for one byte at least, or nothing to wait for. */
bool pv_pipe_writable(struct pv_pipe *p);
/* Called by the reader, without the pipe's lock, when a full pipe has room again; arg lives as long as the
 * reader. */
void pv_pipe_on_room(struct pv_pipe *p, void (*fn)(void *), void *arg);

#endif
