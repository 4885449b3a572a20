/* SPDX-License-Identifier: MIT */
#include "event.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef sigev_notify_thread_id /* glibc has the field, but older versions have no name for it */
#define sigev_notify_thread_id _sigev_un._tid
#endif

/* Nanoseconds that pv_event_nudge() stays in a write at a time. */
#define NUDGE_NS 5000000

/**
 * pv_interrupt_signal() - The signal that gets a thread out of a system call
 *
 * Return: its number
 */
int pv_interrupt_signal(void)
{
	return SIGRTMIN + 4;
}

static void on_interrupt(int sig)
{
	(void)sig;
}

/**
 * pv_interrupt_init() - Install the handler of the signal that gets a thread out of a system call
 *
 * One call per process is enough; more do nothing, so that threads may call this that may install
 * no handlers.
 *
 * Return: 0 or -errno
 */
int pv_interrupt_init(void)
{
	struct sigaction sa = {.sa_handler = on_interrupt};
	static int installed; /* atomic */

	if (__atomic_load_n(&installed, __ATOMIC_ACQUIRE))
		return 0;
	/* The system call must return, so there is no SA_RESTART. */
	if (sigaction(pv_interrupt_signal(), &sa, NULL))
		return -errno;
	__atomic_store_n(&installed, 1, __ATOMIC_RELEASE);
	return 0;
}

/**
 * pv_interrupt() - Get a thread out of the system call that it waits in
 * @thread:	The thread, not joined yet; pv_interrupt_init() has been called
 */
void pv_interrupt(pthread_t thread)
{
	pthread_kill(thread, pv_interrupt_signal());
}

/* Whether the counter has room for one more. */
static bool has_room(int fd)
{
	struct pollfd p = {.fd = fd, .events = POLLOUT};

	return ppoll(&p, 1, &(struct timespec){0}, NULL) != 0;
}

/**
 * pv_event_signal() - Add 1 to an eventfd
 * @fd:		The eventfd: our own, which does not block, or a peer's
 *
 * With our own, this fails only if the counter is full, and then its reader has been told. A peer's
 * may block while it is full: see pv_event_add().
 */
void pv_event_signal(int fd)
{
	struct iovec v = {.iov_base = &(uint64_t){1}, .iov_len = sizeof(uint64_t)};

	/* A packet worker has writev alone: see net_worker.c. */
	(void)!writev(fd, &v, 1);
}

/**
 * pv_event_add() - Add 1 to an eventfd, unless it is full
 * @fd:		The eventfd; negative: none
 *
 * For threads that are interrupted by those who wait for them. See the theory of operation.
 */
void pv_event_add(int fd)
{
	if (fd >= 0 && has_room(fd))
		pv_event_signal(fd);
}

/**
 * pv_event_nudge() - Add 1 to an eventfd, unless it is full; from any thread
 * @fd:		The eventfd; negative: none
 */
void pv_event_nudge(int fd)
{
	struct sigevent how = {.sigev_notify = SIGEV_THREAD_ID,
			       .sigev_signo = pv_interrupt_signal()};
	struct itimerspec soon = {.it_value.tv_nsec = NUDGE_NS, .it_interval.tv_nsec = NUDGE_NS};
	sigset_t set, old;
	timer_t timer;

	if (pv_interrupt_init())
		return;
	sigemptyset(&set);
	sigaddset(&set, pv_interrupt_signal());
	how.sigev_notify_thread_id = gettid();
	if (timer_create(CLOCK_MONOTONIC, &how, &timer)) {
		/* EAGAIN: the user has too many signals pending. A lost kick would be worse. */
		pv_event_add(fd);
		return;
	}
	pthread_sigmask(SIG_UNBLOCK, &set, &old);
	timer_settime(timer, 0, &soon, NULL);
	pv_event_add(fd);
	timer_delete(timer);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
}

/**
 * pv_event_take() - Empty an eventfd, without waiting
 * @fd:		The eventfd
 *
 * Return: whether somebody had added to it
 */
bool pv_event_take(int fd)
{
	uint64_t value;
	struct iovec v = {.iov_base = &value, .iov_len = sizeof(value)};

	return preadv2(fd, &v, 1, -1, RWF_NOWAIT) == sizeof(value);
}
