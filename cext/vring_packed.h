/* SPDX-License-Identifier: MIT */
/*
 * What the calls of vring.h do with a packed ring, for vring.c and the in-flight notes alone.
 * Whoever moves packets sees one kind of ring.
 */
#ifndef PV_VRING_PACKED_H
#define PV_VRING_PACKED_H

#include <linux/virtio_ring.h>

#include "vring.h"

/* Of a packed ring's position as it is seen from outside. */
#define PV_PACKED_INDEX 0x7fffu
#define PV_PACKED_WRAP	0x8000u
/* Of a descriptor's flags. */
#define PV_PACKED_AVAIL (1u << VRING_PACKED_DESC_F_AVAIL)
#define PV_PACKED_USED	(1u << VRING_PACKED_DESC_F_USED)

enum pv_fault pv_packed_init(struct pv_vring *vr, uint32_t base);
void pv_packed_unpop(struct pv_vring *vr, uint32_t slots);
void pv_packed_push(struct pv_vring *vr, uint16_t id, uint16_t slots, uint32_t len);
void pv_packed_push_burst(struct pv_vring *vr, const struct pv_done *done, uint32_t n);
void pv_packed_publish(struct pv_vring *vr);
bool pv_packed_flush(struct pv_vring *vr);
void pv_packed_mark_used(struct pv_vring *vr, uint32_t slots);
void pv_packed_notify(struct pv_vring *vr, bool on);
bool pv_packed_inside(const struct pv_vring *vr, uint16_t from, uint16_t *at);

/* The descriptor at a position. */
static inline struct vring_packed_desc *pv_packed_at(const struct pv_vring *vr, uint16_t at)
{
	uint32_t index = at >= vr->size ? at - vr->size : at;

	return (struct vring_packed_desc *)(void *)vr->desc + index;
}

/* A position as others write it: the index, and the wrap counter in bit 15. */
static inline uint16_t pv_packed_outside(const struct pv_vring *vr, uint16_t at)
{
	return (uint16_t)(at >= vr->size ? at - vr->size : at | PV_PACKED_WRAP);
}

/* The position that is so many descriptors further, at most twice the ring's size. */
static inline uint16_t pv_packed_advance(const struct pv_vring *vr, uint16_t at, uint32_t slots)
{
	uint32_t to = at + slots;

	return (uint16_t)(to >= 2 * vr->size ? to - 2 * vr->size : to);
}

/* From one position forwards to another. */
static inline uint32_t pv_packed_distance(const struct pv_vring *vr, uint32_t from, uint32_t to)
{
	return to >= from ? to - from : to + 2 * vr->size - from;
}

/*
 * Whether the descriptor at a position is available (2.8.1): its AVAIL bit is the wrap counter and
 * its USED bit is not.
 */
static inline bool pv_packed_available_at(const struct pv_vring *vr, uint16_t at)
{
	/*
	 * Acquire: this pairs with the driver's barrier between writing a chain and storing the
	 * flags of its first descriptor (2.8.6).
	 */
	uint16_t flags = __atomic_load_n(&pv_packed_at(vr, at)->flags, __ATOMIC_ACQUIRE);

	return (flags & (PV_PACKED_AVAIL | PV_PACKED_USED)) ==
	       (at >= vr->size ? PV_PACKED_USED : PV_PACKED_AVAIL);
}

/* Whether the next descriptor is available. */
static inline bool pv_packed_available(const struct pv_vring *vr)
{
	return pv_packed_available_at(vr, vr->last_avail);
}

/*
 * Take a chain of so many slots from the ring; false if not so many can be available. A driver that
 * makes descriptors available again before it was told that they are used would let us go around
 * the ring and ahead of ourselves: no batch has more chains than the ring has slots.
 */
static inline bool pv_packed_take(struct pv_vring *vr, uint16_t slots)
{
	if (pv_packed_distance(vr, vr->used_idx, vr->last_avail) + slots > vr->size)
		return false;
	vr->last_avail = pv_packed_advance(vr, vr->last_avail, slots);
	return true;
}

#endif
