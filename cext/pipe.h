/* SPDX-License-Identifier: MIT */
/*
 * A bounded byte pipe from vCPUs to a Python reader thread.
 *
 * Theory of operation
 *
 * vCPU threads put bytes in, and one reader takes them out in batches. A writer wakes the reader
 * only if it is asleep, so a flood costs one futex call per batch and not one per byte.
 *
 * A full pipe slows the guest down: a serial port reports that its transmitter is busy, and a vCPU
 * that writes all the same waits, like a process that writes to a full pipe. So nothing is lost,
 * however slow the reader is. The wait is bounded in three ways:
 *
 *   - The reader's sinks lose patience after minutes (FdSink). They then drop and count the output,
 *     and the pipe flows again.
 *   - pv_pipe_close() ends the wait.
 *   - pv_pipe_hurry() ends the wait, too; a machine calls it as soon as it has to end, for whatever
 *     reason. Bytes that do not fit are then dropped and counted.
 *
 * A writer waits with no lock but the pipe's own. It must not hold a lock that another vCPU or a
 * data path needs: the UART releases its lock first, and Python first leaves the machine's I/O
 * lock.
 */
#ifndef PV_PIPE_H
#define PV_PIPE_H

#include <pthread.h>
#include "types.h"

/* cffi: begin */
struct pv_pipe;
struct pv_pipe *pv_pipe_new(uint32_t size);
void pv_pipe_free(struct pv_pipe *p);
int pv_pipe_read(struct pv_pipe *p, uint8_t *buf, uint32_t len, int timeout_ms);
void pv_pipe_close(struct pv_pipe *p);
void pv_pipe_hurry(struct pv_pipe *p, bool hurry);
uint64_t pv_pipe_dropped(struct pv_pipe *p);
uint64_t pv_pipe_total(struct pv_pipe *p);
uint32_t pv_pipe_write(struct pv_pipe *p, const uint8_t *buf, uint32_t len, int wait_ms);
/* cffi: end */

bool pv_pipe_writable(struct pv_pipe *p, uint32_t len);
void pv_pipe_on_room(struct pv_pipe *p, void (*fn)(void *), void *arg);

#endif
