/* SPDX-License-Identifier: MIT */
/*
 * Device side of a virtqueue, split (virtio 1.2, section 2.7) or packed (section 2.8).
 *
 * Theory of operation
 *
 * Whoever moves packets sees one kind of ring: it takes chains, gives some back, pushes them and
 * flushes. Each call looks once at the format, which never changes, so that the branch costs
 * nothing. vring.c has the split format, vring_packed.c the packed one.
 *
 * The guest owns all of the ring's memory and may change it at any time, so nothing in it is
 * trusted and nothing is read twice: each descriptor is copied once and every decision is taken on
 * the copy. A mistake of the guest is reported as a PV_FAULT_* and never makes us touch memory
 * outside guest RAM; the caller then stops the queue.
 *
 * Positions of a split ring run freely modulo 65536 (2.7.6, 2.7.8):
 *
 *   used_idx      published to the guest in used->idx
 *   used_next     entries written to the used ring; pv_vring_flush publishes them
 *   last_avail    next available entry to take; pv_vring_unpop gives entries back
 *   avail_idx     available index as last read
 *
 * A chain takes one entry of either ring, however many descriptors it has. In a packed ring it
 * takes as many as it has outside of an indirect table: its "slots". Positions of a packed ring of
 * n entries run modulo 2n: those below n are of the laps with the wrap counter at 1, the others of
 * the laps with 0. The guest writes no available index, so avail_idx is not used.
 *
 * To the outside, and as vhost and vhost-user write it, the position of a packed ring is 32 bits:
 * that of the available descriptors in the lower half, that of the used ones in the upper, each
 * with its wrap counter in bit 15. A split ring's is last_avail; the other index is in memory.
 *
 * With a log (dirty_log.h), what the ring writes to its own areas is marked once per flush and once
 * per change of the notification; buffers are the caller's to mark.
 *
 * A ring has one owning thread. It knows nothing of KVM, taps or eventfds: notifying the guest is
 * the caller's job.
 */
#ifndef PV_VRING_H
#define PV_VRING_H

#include <sys/uio.h>

#include "dirty_log.h"

/* cffi: begin */
/* Why a ring was refused or stopped; pv_fault_text() says it in words. */
enum pv_fault {
	PV_FAULT_NONE,
	PV_FAULT_SIZE,
	PV_FAULT_ALIGN,
	PV_FAULT_AREA,
	PV_FAULT_AVAIL_IDX,
	PV_FAULT_HEAD,
	PV_FAULT_NEXT,
	PV_FAULT_LOOP,
	PV_FAULT_INDIRECT,
	PV_FAULT_INDIRECT_NESTED,
	PV_FAULT_INDIRECT_NEXT,
	PV_FAULT_INDIRECT_LEN,
	PV_FAULT_INDIRECT_ADDR,
	PV_FAULT_ZERO_LEN,
	PV_FAULT_RANGE,
	PV_FAULT_ORDER,
	PV_FAULT_SEGMENTS,
	PV_FAULT_DIRECTION,
	PV_FAULT_SHORT,
	PV_FAULT_TOO_LONG,
	PV_FAULT_BASE,
	PV_FAULT_AGAIN,
	PV_FAULT_COUNT
};

/* The result of pv_walk_next() and of pv_vring_pop(). */
enum pv_step {
	PV_BAD = -1, /* the chain or the ring is malformed; see fault */
	PV_DONE = 0, /* the chain has ended, or the ring is empty */
	PV_MORE = 1  /* there was a segment, or a chain */
};

#define PV_VRING_SIZE_MAX 32768
#define PV_CHAIN_MAX	  1024 /* segments per chain: IOV_MAX, as in vhost and QEMU */

/* Where a ring marks what it writes to its areas. */
struct pv_vring_log {
	struct pv_dirty_log *dirty; /* lent; NULL: nothing is marked */
	uint64_t used;		    /* address to mark for the device area (used ring) */
	uint64_t desc;		    /* packed: of the descriptor ring */
};

struct pv_vring {
	const struct pv_memory *mem;
	uint8_t *desc;
	uint16_t *avail;       /* packed: the driver's event suppression */
	uint16_t *used;	       /* packed: the device's event suppression */
	uint16_t *used_event;  /* split: the guest writes it: interrupt after this entry */
	uint16_t *avail_event; /* split: we write it: kick after this entry */
	uint32_t size;
	uint16_t mask;
	uint16_t last_avail;
	uint16_t avail_idx;
	uint16_t used_idx;
	uint16_t used_next;
	uint16_t signalled_used; /* used_idx at the latest decision on an interrupt */
	uint16_t held_flags;	 /* packed: of the batch's first used descriptor, not stored yet */
	uint32_t undecided;	 /* slots pushed since the latest decision on an interrupt */
	uint32_t pushed;	 /* chains pushed and not flushed */
	bool signalled_valid;
	bool packed;
	bool indirect;
	bool event_idx;
	bool notify_on;
	bool notify_stays;   /* pv_vring_disable_notify() does nothing */
	enum pv_fault fault; /* the first fault found */
	struct pv_vring_log log;
};

/* One segment of a chain. It has been checked to lie in guest RAM. */
struct pv_segment {
	uint8_t *host;
	uint32_t len;
	bool write; /* the device writes the segment */
};

/* The state of walking one chain. */
struct pv_walk {
	const struct pv_vring *vr;
	const uint8_t *table; /* the descriptor table, or later an indirect table */
	uint32_t count;	      /* entries of table */
	uint32_t ttl;	      /* entries of table that may still be read */
	uint32_t next;	      /* the entry to read next */
	uint16_t slots;	      /* packed: descriptors read outside of an indirect table */
	uint16_t id;	      /* packed: buffer id, of the latest of these descriptors */
	bool indirect;
	bool written; /* a segment that the device writes was seen */
	bool ended;
	enum pv_fault fault;
};

/*
 * A chain that was taken from the ring. Its segments are in the caller's iovec array, those that
 * the device reads first.
 */
struct pv_chain {
	uint16_t head;	  /* index of the first descriptor; packed: the buffer id, any value */
	uint16_t slots;	  /* entries of the ring that it takes; split: 1 */
	uint16_t out_num; /* segments that the device reads */
	uint16_t in_num;  /* segments that the device writes */
	uint64_t out_len;
	uint64_t in_len;
};

/* A chain to give back. */
struct pv_done {
	uint16_t head;	/* from the chain */
	uint16_t slots; /* likewise */
	uint32_t len;	/* bytes that the device wrote */
};

/* What the driver and the device have agreed on for all rings. */
struct pv_vring_format {
	bool packed;	/* RING_PACKED */
	bool indirect;	/* INDIRECT_DESC */
	bool event_idx; /* EVENT_IDX */
};

enum pv_fault pv_vring_init(struct pv_vring *vr, const struct pv_memory *mem, uint32_t size,
			    uint64_t desc, uint64_t avail, uint64_t used, uint32_t base,
			    struct pv_vring_format format);
void pv_vring_log(struct pv_vring *vr, struct pv_dirty_log *dirty, uint64_t used, uint64_t desc);
uint32_t pv_vring_base(const struct pv_vring *vr);
uint32_t pv_vring_glance(const struct pv_vring *vr);
void pv_walk_begin(struct pv_walk *w, const struct pv_vring *vr, uint16_t head);
enum pv_step pv_walk_next(struct pv_walk *w, struct pv_segment *seg);
enum pv_step pv_vring_pop(struct pv_vring *vr, struct iovec *iov, uint32_t max,
			  struct pv_chain *chain);
uint32_t pv_vring_pop_burst(struct pv_vring *vr, struct iovec *iov, struct pv_chain *chain,
			    uint32_t max);
void pv_vring_unpop(struct pv_vring *vr, uint32_t slots);
void pv_vring_push(struct pv_vring *vr, uint16_t head, uint16_t slots, uint32_t len);
void pv_vring_push_burst(struct pv_vring *vr, const struct pv_done *done, uint32_t n);
void pv_vring_publish(struct pv_vring *vr);
bool pv_vring_flush(struct pv_vring *vr);
bool pv_vring_enable_notify(struct pv_vring *vr);
void pv_vring_disable_notify(struct pv_vring *vr);
bool pv_vring_pending(const struct pv_vring *vr);
const char *pv_fault_text(enum pv_fault fault);
/* cffi: end */

/* Have the processor take a line from another core, to write to it; a hint for any address. */
static inline void pv_fetch_to_write(const void *line)
{
	/* GCC's __builtin_prefetch() does that for later processors only. */
	__asm__ volatile("prefetchw %0" : : "m"(*(const char *)line));
}

void pv_vring_fetch(const struct pv_vring *vr, uint32_t n);
uint16_t pv_vring_position(const struct pv_vring *vr, uint16_t index);

/*
 * Whether an index that moves from old to new passes the event index at which the other side wants
 * a notification (2.7.7.1, 2.7.10.1). All arithmetic is modulo 65536, as in vring_need_event() of
 * linux/virtio_ring.h.
 */
static inline bool pv_need_event(uint16_t event, uint16_t new, uint16_t old)
{
	return (uint16_t)(new - event - 1) < (uint16_t)(new - old);
}

#endif
