/* SPDX-License-Identifier: MIT */
/*
 * A thread that C makes, and that never runs Python.
 *
 * Theory of operation
 *
 * A Python thread that calls C releases the interpreter's lock, and on its return waits for that
 * lock until no other Python thread holds it. Code that moves packets or raises interrupts must not
 * wait like that, so it runs in a thread that Python does not know. Python starts the thread, asks
 * it to end and joins it; the thread itself never runs Python code.
 *
 * The thread first names and pins itself, then waits at a gate until pv_thread_go(). So a caller
 * can make several threads, all of them or none, before the first of them does anything. The thread
 * has all signals blocked, because signals belong to the main thread, but for the one that gets it
 * out of a system call (event.h) and those that confine it (confine.h).
 *
 * After fork(2), the child process has no such thread. It must not join the thread, nor touch the
 * thread's data.
 */
#ifndef PV_THREAD_H
#define PV_THREAD_H

#include <pthread.h>
#include <semaphore.h>

#include "types.h"

#define PV_THREAD_NAME 16 /* TASK_COMM_LEN, with the terminating null */
#define PV_THREAD_CPUS 8192

/* If the structure is zeroed, or pv_thread_join() has returned, there is no thread. */
struct pv_thread {
	pthread_t pthread;
	void (*stopped)(void *arg, int call); /* see pv_thread_confine() */
	void (*run)(void *arg);
	void *arg;
	char name[PV_THREAD_NAME];
	int cpu;
	bool made; /* between pv_thread_start() and pv_thread_join() */
	bool open; /* whether the gate is open */
	sem_t gate;
	sem_t ready;
	/* The thread writes these, up to clock, before it posts ready. */
	int tid;
	int pin_error; /* errno if the thread could not be pinned; it runs nevertheless */
	uint64_t began;
	clockid_t clock;
	uint64_t cpu_ns; /* atomic; 0 until the thread has ended */
	bool parked; /* atomic; it made a call that it must not make, and does nothing any more */
};

/* cffi: begin */
void pv_thread_name(const char *name);
/* cffi: end */
int pv_thread_start(struct pv_thread *t, const char *name, int cpu, void (*run)(void *arg),
		    void *arg);
void pv_thread_go(struct pv_thread *t);
void pv_thread_await(struct pv_thread *t);
void pv_thread_confine(struct pv_thread *t, const uint16_t *calls, size_t count,
		       void (*stopped)(void *arg, int call));
void pv_thread_join(struct pv_thread *t);
uint64_t pv_thread_cpu_ns(const struct pv_thread *t);

#endif
