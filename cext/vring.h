/* SPDX-License-Identifier: MIT */
/*
 * Device side of the split virtqueue (virtio 1.2, section 2.7).
 *
 * Theory of operation
 *
 * The guest owns all of the ring's memory and may change it at any time, so nothing in it is
 * trusted and nothing is read twice: each descriptor is copied once and every decision is taken on
 * the copy. What the guest gets wrong is reported as a PV_FAULT_* and never touches memory outside
 * guest RAM; the caller stops the queue.
 *
 * Positions run freely modulo 65536 (2.7.6, 2.7.8):
 *
 *   used_idx      published to the guest in used->idx
 *   used_next     entries written to the used ring; pv_vring_flush publishes them
 *   last_avail    next available entry to take; pv_vring_unpop gives entries back
 *   avail_idx     available index as last read
 *
 * A ring has one owning thread. It knows nothing of KVM, taps or eventfds: notifying is the
 * caller's.
 */
#ifndef PV_VRING_H
#define PV_VRING_H

#include <sys/uio.h>

#include "types.h"

/* cffi: begin */
/* Why a ring was refused or stopped; pv_fault_text has the words. */
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
	PV_FAULT_COUNT
};

/* Outcome of one step of the chain walker, and of pv_vring_pop. */
enum pv_step {
	PV_BAD = -1, /* malformed; see fault */
	PV_DONE = 0, /* the chain has ended; the ring is empty */
	PV_MORE = 1  /* got one */
};

#define PV_VRING_SIZE_MAX 32768
#define PV_CHAIN_MAX	  1024 /* segments of a chain, as IOV_MAX; vhost and QEMU draw the same line */

struct pv_vring {
	const struct pv_memory *mem;
	uint8_t *desc;
	uint16_t *avail;
	uint16_t *used;
	uint16_t *used_event;  /* written by the guest: interrupt me after this entry */
	uint16_t *avail_event; /* written by us: kick me after this entry */
	uint32_t size;
	uint16_t mask;
	uint16_t last_avail;
	uint16_t avail_idx;
	uint16_t used_idx;
	uint16_t used_next;
	uint16_t signalled_used; /* used_idx at the last decision to signal or not */
	bool signalled_valid;
	bool indirect;
	bool event_idx;
	bool notify_on;
	enum pv_fault fault; /* first fault found */
};

/* One segment of a chain: host address, checked to lie in guest RAM. */
struct pv_segment {
	uint8_t *host;
	uint32_t len;
	bool write; /* the device writes it */
};

/* State of walking one chain. */
struct pv_walk {
	const struct pv_vring *vr;
	const uint8_t *table; /* the descriptor table, or the indirect one once entered */
	uint32_t count;	      /* entries of table */
	uint32_t ttl;	      /* entries that may yet be read from it */
	uint32_t next;	      /* entry to read */
	bool indirect;
	bool written; /* a segment for writing was seen */
	bool ended;
	enum pv_fault fault;
};

/*
 * A chain taken from the ring; its segments went to the caller's iovec array, the readable ones
 * first.
 */
struct pv_chain {
	uint16_t head;
	uint16_t out_num; /* segments that the device reads */
	uint16_t in_num;  /* segments that the device writes */
	uint64_t out_len;
	uint64_t in_len;
};

enum pv_fault pv_vring_init(struct pv_vring *vr, const struct pv_memory *mem, uint32_t size,
			    uint64_t desc, uint64_t avail, uint64_t used, uint16_t base,
			    bool indirect, bool event_idx);
void pv_walk_begin(struct pv_walk *w, const struct pv_vring *vr, uint16_t head);
enum pv_step pv_walk_next(struct pv_walk *w, struct pv_segment *seg);
enum pv_step pv_vring_pop(struct pv_vring *vr, struct iovec *iov, uint32_t max,
			  struct pv_chain *chain);
void pv_vring_unpop(struct pv_vring *vr, uint16_t n);
void pv_vring_push(struct pv_vring *vr, uint16_t head, uint32_t len);
void pv_vring_publish(struct pv_vring *vr);
bool pv_vring_flush(struct pv_vring *vr);
bool pv_vring_enable_notify(struct pv_vring *vr);
void pv_vring_disable_notify(struct pv_vring *vr);
bool pv_vring_pending(const struct pv_vring *vr);
const char *pv_fault_text(enum pv_fault fault);
/* cffi: end */

/*
 * Whether moving an index from old to new passes the point where the other side asked to be told
 * (2.7.7.1, 2.7.10.1); all modulo 65536, as vring_need_event in linux/virtio_ring.h.
 */
static inline bool pv_need_event(uint16_t event, uint16_t new, uint16_t old)
{
	return (uint16_t)(new - event - 1) < (uint16_t)(new - old);
}

#endif
