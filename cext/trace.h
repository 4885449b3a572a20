/* SPDX-License-Identifier: MIT */
/*
 * Rings of trace events: the latest acts of a vCPU or a worker, with times.
 *
 * One thread writes a ring and never waits. When the ring is full, the oldest event is overwritten.
 * So memory is bounded, and an event costs the writer a few stores. Other threads may read at any
 * time. A reader may see an event half overwritten; so it reads `next` again afterwards and drops
 * all events that the writer could have reached meanwhile (pyvmm.kvm.recorder). Without a trace
 * there is no ring, and each event costs one branch.
 */
#ifndef PV_TRACE_H
#define PV_TRACE_H

#include "types.h"

/* cffi: begin */
enum pv_trace_kind {
	PV_TRACE_NONE,
	PV_TRACE_EXIT, /* KVM_RUN returned at ts; the guest ran again dur later */
	PV_TRACE_KICK, /* a kick of queue reg woke a worker up */
	PV_TRACE_BATCH /* a worker returned count chains of queue reg; write: it interrupted */
};

/*
 * For PV_TRACE_EXIT, addr, reason, region, reg, size and write are those of struct pv_exit_slot.
 */
struct pv_trace_event {
	uint64_t ts;  /* CLOCK_MONOTONIC, nanoseconds */
	uint64_t dur; /* nanoseconds; 0 for an event without duration */
	uint64_t addr;
	uint64_t value; /* the first element that the guest wrote or read, at most 8 bytes */
	uint32_t reason;
	uint32_t region;
	uint32_t reg;
	uint32_t count; /* elements of a string instruction, or chains of a batch */
	uint16_t kind;
	uint16_t size;
	uint8_t write;
};

struct pv_trace {
	uint64_t next; /* events written since the beginning; the newest is at (next - 1) & mask */
	uint64_t mask;
	struct pv_trace_event *event;
};

struct pv_trace *pv_trace_new(uint32_t size);
void pv_trace_free(struct pv_trace *t);
/* cffi: end */

/* Add an event. Only the ring's one writer calls this. */
static inline void pv_trace_put(struct pv_trace *t, const struct pv_trace_event *e)
{
	t->event[t->next & t->mask] = *e;
	__atomic_store_n(&t->next, t->next + 1, __ATOMIC_RELEASE);
}

#endif
