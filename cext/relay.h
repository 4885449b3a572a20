/* SPDX-License-Identifier: MIT */
/*
 * A thread that passes on eventfds: for each one that is signalled it calls a function.
 *
 * The calls come one after another. An eventfd that is signalled several times before its turn
 * causes one call.
 */
#ifndef PV_RELAY_H
#define PV_RELAY_H

#include <poll.h>

#include "thread.h"

/* Of a card with 64 queue pairs, a control queue and the configuration. */
#define PV_RELAY_EVENTS 130

/* If the structure is zeroed, or pv_relay_stop() has returned, there is no thread. */
struct pv_relay {
	struct pv_thread thread;
	void (*told)(void *arg, uint32_t number);
	void *arg;
	uint32_t count;
	struct pollfd poll[PV_RELAY_EVENTS + 1]; /* the last one stops the thread */
};

int pv_relay_start(struct pv_relay *r, const char *name, const int32_t *fds, uint32_t count,
		   void (*told)(void *arg, uint32_t number), void *arg);
void pv_relay_stop(struct pv_relay *r);

#endif
