/* SPDX-License-Identifier: MIT */
/*
 * Eventfds that another process shares, and may be hostile with.
 *
 * Theory of operation
 *
 * A process that has been sent an eventfd shares its open file description, the flags included. It
 * can clear O_NONBLOCK, fill the counter, and empty it just after poll(2) has seen it. So a plain
 * read(2) or write(2) can block for as long as that process likes.
 *
 * Reads have a flag against this: RWF_NOWAIT. Writes have none. A writer first looks whether the
 * counter has room; if it has none, the reader has been told already. What is left is a peer that
 * fills the counter between the look and the write. Therefore a write must be interrupted, by a
 * signal whose handler does nothing, again and again until the thread is out of it: a signal that
 * comes just before the write is of no use. Who interrupts depends on the thread:
 *
 * - pv_event_add() leaves it to those who wait for the thread. pv_thread_join() interrupts threads
 *   of ours, and pv_vcpu_kick() the threads of vCPUs.
 * - pv_event_nudge() does it itself, by a timer. It costs four system calls more, and is for all
 *   other threads.
 */
#ifndef PV_EVENT_H
#define PV_EVENT_H

#include <pthread.h>

#include "types.h"

int pv_interrupt_signal(void);
int pv_interrupt_init(void);
void pv_interrupt(pthread_t thread);
void pv_event_add(int fd);
void pv_event_signal(int fd);
bool pv_event_take(int fd);
/* cffi: begin */
void pv_event_nudge(int fd);
/* cffi: end */

#endif
