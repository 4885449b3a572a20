/* SPDX-License-Identifier: MIT */
/*
 * A thread that C makes, and that never runs Python.
 *
 * Theory of operation
 *
 * A Python thread that calls C gives up the interpreter's lock, and waits for that lock on its way
 * back, behind whichever Python thread holds it. What moves packets or raises interrupts must not
 * wait like that, so it runs in a thread that Python does not know. Python starts it, asks it to
 * end and joins it; on the thread's own way there is no Python.
 *
 * The thread names and pins itself first and then stands at a gate until pv_thread_go(). So several
 * threads can be made, all of them or none, before the first of them does anything. It has all
 * signals blocked: they belong to the main thread.
 *
 * After fork(2) the child has no such thread. It must not touch what belongs to one, and must not
 * join it.
 */
#ifndef PV_THREAD_H
#define PV_THREAD_H

#include <pthread.h>
#include <semaphore.h>

#include "types.h"

#define PV_THREAD_NAME 16 /* TASK_COMM_LEN, with the terminating null */
#define PV_THREAD_CPUS 8192

/* Zeroed, or as pv_thread_join() has left it: no thread. */
struct pv_thread {
	pthread_t pthread;
	void (*run)(void *arg);
	void *arg;
	char name[PV_THREAD_NAME];
	int cpu;
	bool made; /* between pv_thread_start() and pv_thread_join() */
	bool open; /* the gate */
	sem_t gate;
	sem_t ready;
	/* Written by the thread before it posts ready. */
	int tid;
	int pin_error; /* errno if it could not be pinned; it runs nevertheless */
	uint64_t began;
	clockid_t clock;
	uint64_t cpu_ns; /* atomic; in the end, 0 before */
};

int pv_thread_start(struct pv_thread *t, const char *name, int cpu, void (*run)(void *arg),
		    void *arg);
void pv_thread_go(struct pv_thread *t);
void pv_thread_await(struct pv_thread *t);
void pv_thread_join(struct pv_thread *t);
uint64_t pv_thread_cpu_ns(const struct pv_thread *t);

#endif
