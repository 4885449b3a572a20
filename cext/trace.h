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
	PV_TRACE_EXIT,	/* KVM_RUN returned at ts; the guest ran again dur later */
	PV_TRACE_KICK,	/* a kick of queue reg woke a worker up */
	PV_TRACE_BATCH, /* a worker returned count chains of queue reg; write: it interrupted */
	/*
	 * A packet went through queue reg: ts and dur are those of the system call on the tap. The
	 * packet's segments and first bytes follow as events of their own.
	 */
	PV_TRACE_PACKET,
	PV_TRACE_SEGMENT, /* of the packet: guest-physical address addr, value bytes */
	/* of the packet: size bytes; the first write bytes of the packet are its virtio_net_hdr */
	PV_TRACE_BYTES,
	/*
	 * a fault on demand: count has what was done (PV_DEED_*) to a frame of value bytes; write:
	 * to its used entries: size and region are those of the first one, as of a packet
	 */
	PV_TRACE_FAULT
};

#define PV_TRACE_DATA	  40 /* bytes per PV_TRACE_BYTES */
#define PV_TRACE_SEGMENTS 4  /* at most so many segments of a packet are traced */
#define PV_TRACE_HEAD	  80 /* and so many bytes */
#define PV_TRACE_LATER	  0xffffffffu

/*
 * For PV_TRACE_EXIT, addr, reason, region, reg, size and write are those of struct pv_exit_slot.
 * For PV_TRACE_BATCH, value is the used index that was published, and addr the used_event that was
 * found then, reason 1 if there is such a field (split, EVENT_IDX).
 * For PV_TRACE_PACKET, value is its length with the header, size the head (packed: the buffer id),
 * count its segments, reason the position in the available ring and region that in the used ring
 * (packed: of the descriptor, bit 15 the wrap counter), PV_TRACE_LATER if the entry is still to
 * come, with a fault on demand; addr the available index as last seen (split), write whether the
 * tap took or gave the packet. One that it did not take has no bytes.
 */
struct pv_trace_event {
	uint64_t ts; /* CLOCK_MONOTONIC, nanoseconds */
	union {
		struct {
			uint64_t dur; /* nanoseconds; 0 for an event without duration */
			uint64_t addr;
			/* the first element that the guest wrote or read, at most 8 bytes */
			uint64_t value;
			uint32_t reason;
			uint32_t region;
			uint32_t reg;
			uint32_t count; /* elements of a string instruction, or chains of a batch */
		};
		uint8_t bytes[PV_TRACE_DATA];
	};
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
