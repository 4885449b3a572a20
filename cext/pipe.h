/* SPDX-License-Identifier: MIT */
/*
 * A bounded byte pipe from a vCPU to a Python reader thread.
 *
 * Theory of operation: vCPU threads put bytes in, one reader takes them out in batches. The writer
 * wakes the reader only when it is asleep, so a flood costs one futex call a batch, not one a byte.
 * A full pipe pushes back on the guest: a serial port reports "transmitter busy", and who writes
 * all the same waits, as a process waits that writes to a full pipe. So a slow reader loses
 * nothing, however slow it is. Three things bound the wait. The reader itself never waits for ever:
 * its sinks lose patience after minutes (FdSink), then drop and count, and the pipe flows again.
 * pv_pipe_close() ends it. And pv_pipe_hurry(), which a machine calls as soon as it is to end for
 * whatever reason, frees who waits; what then does not fit is dropped and counted.
 *
 * A writer waits without any lock but the pipe's own, and must not hold one that another vCPU or a
 * data path needs: the UART drops its lock first, and Python waits after it has left the machine's
 * I/O lock.
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
 * Take up to len bytes; waits up to timeout_ms (-1: for ever) for the first. Returns the count, 0
 * on time-out, -1 once the pipe is closed and empty.
 */
int pv_pipe_read(struct pv_pipe *p, uint8_t *buf, uint32_t len, int timeout_ms);
void pv_pipe_close(struct pv_pipe *p);
/* hurry: no more waiting for room, also for those who wait already. Without: as at first. */
void pv_pipe_hurry(struct pv_pipe *p, bool hurry);
uint64_t pv_pipe_dropped(struct pv_pipe *p);
uint64_t pv_pipe_total(struct pv_pipe *p);
/*
 * Put all of buf in; waits for room up to wait_ms altogether (-1: until the reader makes room or
 * the pipe is closed or hurried), then drops and counts the rest. Returns the bytes stored.
 */
uint32_t pv_pipe_write(struct pv_pipe *p, const uint8_t *buf, uint32_t len, int wait_ms);
/* cffi: end */

/* Room for len bytes at least, or nothing to wait for; if not, on_room tells when there is. */
bool pv_pipe_writable(struct pv_pipe *p, uint32_t len);
/*
 * Called by the reader, without the pipe's lock, when there is the room that pv_pipe_writable
 * missed; arg lives as long as the reader.
 */
void pv_pipe_on_room(struct pv_pipe *p, void (*fn)(void *), void *arg);

#endif
