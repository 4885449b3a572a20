/* SPDX-License-Identifier: MIT */
#include "relay.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "event.h"

/* The thread's function. */
static void pass_on(void *arg)
{
	struct pv_relay *r = arg;

	while (!r->poll[r->count].revents) {
		if (poll(r->poll, r->count + 1, -1) < 0) {
			if (errno != EINTR)
				break;
			continue;
		}
		for (uint32_t i = 0; i < r->count; i++) {
			if (r->poll[i].revents && pv_event_take(r->poll[i].fd))
				r->told(r->arg, i);
		}
	}
}

/**
 * pv_relay_start() - Start a thread that passes on eventfds
 * @r:		Without a thread
 * @name:	The thread's name, which the system shows
 * @fds:	Non-blocking eventfds, lent until pv_relay_stop()
 * @count:	How many eventfds, at most PV_RELAY_EVENTS
 * @told:	Called in that thread when fds[number] has been signalled; never waits for Python
 * @arg:	For @told
 *
 * Return: 0, or -errno
 */
int pv_relay_start(struct pv_relay *r, const char *name, const int32_t *fds, uint32_t count,
		   void (*told)(void *arg, uint32_t number), void *arg)
{
	int stop_fd, error;

	if (count > PV_RELAY_EVENTS)
		return -EINVAL;
	stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (stop_fd < 0)
		return -errno;
	for (uint32_t i = 0; i < count; i++)
		r->poll[i] = (struct pollfd){.fd = fds[i], .events = POLLIN};
	r->poll[count] = (struct pollfd){.fd = stop_fd, .events = POLLIN};
	r->count = count;
	r->told = told;
	r->arg = arg;
	error = pv_thread_start(&r->thread, name, -1, pass_on, r);
	if (error) {
		close(stop_fd);
		return error;
	}
	pv_thread_go(&r->thread);
	return 0;
}

/**
 * pv_relay_stop() - End the thread
 * @r:		Without a thread nothing happens
 */
void pv_relay_stop(struct pv_relay *r)
{
	int stop_fd = r->poll[r->count].fd;

	if (!r->thread.made)
		return;
	eventfd_write(stop_fd, 1);
	pv_thread_join(&r->thread);
	close(stop_fd);
}
