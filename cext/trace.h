/* SPDX-License-Identifier: MIT */
/*
 * Rings of trace events: what a vCPU or a worker did last, with times.
 *
 * One thread writes a ring and nobody waits for it: when it is full the oldest event is
 * overwritten, so memory is bounded and the writer's cost is a few stores. Others may read at any
 * time; an event that is being overwritten meanwhile may come out mixed, so the reader asks again
 * for `next` afterwards and drops what was in reach of the writer (pyvmm.kvm.recorder). Who does
 * not trace has no ring, and pays one branch.
 */
#ifndef PV_TRACE_H
#define PV_TRACE_H

#include <time.h>
#include "types.h"

/* cffi: begin */
enum pv_trace_kind {
	PV_TRACE_NONE,
	PV_TRACE_EXIT, /* a return of KVM_RUN; ts to ts + dur is the VMM's time */
	PV_TRACE_KICK, /* a worker woke up by the kick of queue reg */
	PV_TRACE_BATCH /* count chains of queue reg given back; write: the guest was interrupted */
};

struct pv_trace_event {
	uint64_t ts;	/* CLOCK_MONOTONIC, nanoseconds */
	uint64_t dur;	/* nanoseconds; 0 for a moment */
	uint64_t addr;	/* of EXIT: as in struct pv_exit_slot, as are reason, region, reg, size and
			   write */
	uint64_t value; /* first element written or read, at most 8 bytes */
	uint32_t reason;
	uint32_t region;
	uint32_t reg;
	uint32_t count; /* elements of a string instruction; chains of a batch */
	uint16_t kind;
	uint16_t size;
	uint8_t write;
};

struct pv_trace {
	uint64_t next; /* events written since the beginning; the newest is at (next - 1) & mask */
	uint64_t mask;
	struct pv_trace_event *event;
};

/* size: events, a power of two; NULL where it is none or memory is short. */
struct pv_trace *pv_trace_new(uint32_t size);
void pv_trace_free(struct pv_trace *t);
/* cffi: end */

static inline uint64_t pv_now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* By the ring's one writer. */
static inline void pv_trace_put(struct pv_trace *t, const struct pv_trace_event *e)
{
	t->event[t->next & t->mask] = *e;
	__atomic_store_n(&t->next, t->next + 1, __ATOMIC_RELEASE);
}

#endif
