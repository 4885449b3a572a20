/* SPDX-License-Identifier: MIT */
#include "thread.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "confine.h"
#include "event.h"
#include "trace.h"

/* Nanoseconds that a thread may take to end before it is interrupted, time and again. */
#define PATIENCE_NS 50000000

/* Take a semaphore. A signal that has a handler interrupts sem_wait(). */
static void sem_take(sem_t *s)
{
	while (sem_wait(s) && errno == EINTR)
		;
}

/*
 * Pin this thread to a CPU; returns 0 or errno. This must not allocate memory, which would reserve
 * 64 MiB of address space for the thread's own heap.
 */
static int pin(int cpu)
{
	unsigned long mask[PV_THREAD_CPUS / (8 * sizeof(unsigned long))] = {0};

	if (cpu >= PV_THREAD_CPUS)
		return EINVAL;
	CPU_SET_S((size_t)cpu, sizeof(mask), (cpu_set_t *)mask);
	return sched_setaffinity(0, sizeof(mask), (cpu_set_t *)mask) ? errno : 0;
}

/**
 * pv_thread_name() - Give the calling thread the name that the system shows
 * @name:	Cut after 15 bytes
 */
void pv_thread_name(const char *name)
{
	prctl(PR_SET_NAME, name);
}

static void *thread_main(void *arg)
{
	struct pv_thread *t = arg;
	struct timespec used;

	if (t->name[0])
		pv_thread_name(t->name);
	if (t->cpu >= 0)
		t->pin_error = pin(t->cpu);
	t->tid = gettid();
	pthread_getcpuclockid(pthread_self(), &t->clock);
	sem_take(&t->gate);
	if (!t->open)
		return NULL;
	t->began = pv_now_ns();
	sem_post(&t->ready);
	t->run(t->arg);
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
	__atomic_store_n(&t->cpu_ns, pv_ns(&used), __ATOMIC_RELEASE);
	return NULL;
}

/**
 * pv_thread_start() - Make a thread, which waits for pv_thread_go()
 * @t:		Zeroed; keeps its address until pv_thread_join()
 * @name:	The name that the system shows; cut after 15 bytes
 * @cpu:	The CPU to pin the thread to; -1: none
 * @run:	The function that the thread runs
 * @arg:	Argument of @run
 *
 * A thread that cannot be pinned is made nevertheless: see pin_error after pv_thread_await().
 *
 * Return: 0, or -errno if there is no thread
 */
int pv_thread_start(struct pv_thread *t, const char *name, int cpu, void (*run)(void *arg),
		    void *arg)
{
	sigset_t all, old;
	int error = pv_interrupt_init();

	if (!error)
		error = pv_confine_init();
	if (error)
		return error;
	*t = (struct pv_thread){.run = run, .arg = arg, .cpu = cpu};
	snprintf(t->name, sizeof(t->name), "%s", name);
	sem_init(&t->gate, 0, 0);
	sem_init(&t->ready, 0, 0);
	/* A new thread inherits the signal mask of the thread that makes it. */
	sigfillset(&all);
	sigdelset(&all, pv_interrupt_signal());
	sigdelset(&all, SIGSYS);
	sigdelset(&all, pv_confine_signal());
	pthread_sigmask(SIG_SETMASK, &all, &old);
	error = pthread_create(&t->pthread, NULL, thread_main, t);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	t->made = !error;
	return -error;
}

/**
 * pv_thread_go() - Open the gate, so that the thread calls its function
 * @t:		Started
 */
void pv_thread_go(struct pv_thread *t)
{
	t->open = true;
	sem_post(&t->gate);
}

/**
 * pv_thread_await() - Wait until the thread has passed the gate
 * @t:		Its gate is open; call this once
 *
 * From then on tid, pin_error and began can be read by any thread.
 */
void pv_thread_await(struct pv_thread *t)
{
	sem_take(&t->ready);
}

static __thread __attribute__((tls_model("initial-exec"))) struct pv_thread *confined;

static void on_stopped(int call)
{
	confined->stopped(confined->arg, call);
	__atomic_store_n(&confined->parked, true, __ATOMIC_RELEASE);
}

/**
 * pv_thread_confine() - Leave the calling thread these system calls alone, for good
 * @t:		The thread itself
 * @calls:	See pv_confine_thread(); a kernel without such filters leaves the thread as it is
 * @count:	How many
 * @stopped:	Called in the thread with the thread's argument if it makes another call. It does
 *		nothing any more then, and pv_thread_join() does not wait for its end.
 */
void pv_thread_confine(struct pv_thread *t, const uint16_t *calls, size_t count,
		       void (*stopped)(void *arg, int call))
{
	confined = t;
	t->stopped = stopped;
	(void)pv_confine_thread(calls, count, on_stopped);
}

/**
 * pv_thread_join() - Wait until the thread has ended
 * @t:		Asked to end, or its gate is still closed, or there is no thread
 *
 * A thread whose gate is still closed ends without calling its function.
 */
void pv_thread_join(struct pv_thread *t)
{
	struct timespec until;
	int error;

	if (!t->made)
		return;
	if (!t->open)
		sem_post(&t->gate);
	/*
	 * A thread that is asked to end does so soon, unless a peer has made one of its writes
	 * block (event.h).
	 */
	do {
		clock_gettime(CLOCK_REALTIME, &until);
		until.tv_nsec += PATIENCE_NS;
		until.tv_sec += until.tv_nsec / 1000000000;
		until.tv_nsec %= 1000000000;
		error = pthread_timedjoin_np(t->pthread, NULL, &until);
		if (error == ETIMEDOUT && __atomic_load_n(&t->parked, __ATOMIC_ACQUIRE)) {
			/* It never ends, and touches nothing but its stack. */
			pthread_detach(t->pthread);
			break;
		}
		if (error == ETIMEDOUT)
			pv_interrupt(t->pthread);
	} while (error == ETIMEDOUT);
	sem_destroy(&t->gate);
	sem_destroy(&t->ready);
	t->made = false;
}

/**
 * pv_thread_cpu_ns() - CPU time that a thread has used
 * @t:		After pv_thread_await(); the thread runs or has ended
 *
 * Return: nanoseconds
 */
uint64_t pv_thread_cpu_ns(const struct pv_thread *t)
{
	uint64_t end = __atomic_load_n(&t->cpu_ns, __ATOMIC_ACQUIRE);
	struct timespec used;

	/* When the thread has ended, its clock is gone, but it has left the final value. */
	if (!end && !clock_gettime(t->clock, &used))
		return pv_ns(&used);
	return __atomic_load_n(&t->cpu_ns, __ATOMIC_ACQUIRE);
}
