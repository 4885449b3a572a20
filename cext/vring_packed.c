/* SPDX-License-Identifier: MIT */
#include <linux/virtio_ring.h>
#include <stddef.h>

#include "vring_packed.h"

/*
 * Device side of the packed virtqueue (virtio 1.2, section 2.8); vring.h has the theory. The buffer
 * id is the guest's and any value: it is handed back and never used as an index.
 */

_Static_assert(sizeof(struct vring_packed_desc) == 16 &&
		       sizeof(struct vring_packed_desc_event) == 4,
	       "2.8.10.1");
_Static_assert(offsetof(struct vring_packed_desc, len) == 8 &&
		       offsetof(struct vring_packed_desc, id) == 12 &&
		       offsetof(struct vring_packed_desc, flags) == 14,
	       "2.8.13");

/* Index into the event suppression areas, in 16-bit units. */
enum { OFF_WRAP = 0, EVENT_FLAGS = 1 };

/**
 * pv_packed_inside() - A position that others have written
 * @vr:		The ring
 * @from:	The index, and the wrap counter in bit 15
 * @at:		Filled in: one of the ring's positions
 *
 * Return: false if there is no such place
 */
bool pv_packed_inside(const struct pv_vring *vr, uint16_t from, uint16_t *at)
{
	uint32_t index = from & PV_PACKED_INDEX;

	if (index >= vr->size)
		return false;
	*at = (uint16_t)(from & PV_PACKED_WRAP ? index : index + vr->size);
	return true;
}

/**
 * pv_packed_init() - The part of pv_vring_init() for packed rings
 * @vr:		With everything but its positions
 * @base:	Position from outside
 *
 * Return: PV_FAULT_NONE or _BASE
 */
enum pv_fault pv_packed_init(struct pv_vring *vr, uint32_t base)
{
	if (!pv_packed_inside(vr, (uint16_t)base, &vr->last_avail) ||
	    !pv_packed_inside(vr, (uint16_t)(base >> 16), &vr->used_idx) ||
	    pv_packed_distance(vr, vr->used_idx, vr->last_avail) > vr->size)
		return PV_FAULT_BASE;
	vr->used_next = vr->used_idx;
	return PV_FAULT_NONE;
}

/**
 * pv_packed_unpop() - See pv_vring_unpop()
 * @vr:		The ring
 * @slots:	At most the ring's size
 */
void pv_packed_unpop(struct pv_vring *vr, uint32_t slots)
{
	vr->last_avail = pv_packed_advance(vr, vr->last_avail, 2 * vr->size - slots);
}

/* The second half of a descriptor, as it is stored at once. */
typedef uint64_t __attribute__((may_alias)) half;

/*
 * Put a chain at a position; returns the position of the next. The flags of a batch's first
 * descriptor are stored when the batch is published, and the driver looks at no other before: so
 * buffers that belong together appear together (2.8.9). All other descriptors are written by one
 * store each, because a processor has room for few stores that wait for lines of another core.
 */
static inline uint16_t push_at(struct pv_vring *vr, uint16_t at, uint16_t id, uint16_t slots,
			       uint32_t len)
{
	struct vring_packed_desc *d = pv_packed_at(vr, at);
	uint16_t flags = (uint16_t)(at >= vr->size ? 0 : PV_PACKED_AVAIL | PV_PACKED_USED);

	if (len)
		flags |= VRING_DESC_F_WRITE;
	if (at == vr->used_idx) {
		__atomic_store_n(&d->id, id, __ATOMIC_RELAXED);
		__atomic_store_n(&d->len, len, __ATOMIC_RELAXED);
		vr->held_flags = flags;
	} else {
		__atomic_store_n((half *)(void *)&d->len,
				 len | (uint64_t)id << 32 | (uint64_t)flags << 48,
				 __ATOMIC_RELAXED);
	}
	return pv_packed_advance(vr, at, slots);
}

/**
 * pv_packed_push() - See pv_vring_push()
 * @vr:		The ring
 * @id:		Buffer id of the chain
 * @slots:	Of the chain
 * @len:	Bytes that the device wrote
 */
void pv_packed_push(struct pv_vring *vr, uint16_t id, uint16_t slots, uint32_t len)
{
	vr->used_next = push_at(vr, vr->used_next, id, slots, len);
}

/**
 * pv_packed_push_burst() - See pv_vring_push_burst()
 * @vr:		The ring
 * @done:	The chains; a head is a buffer id
 * @n:		How many
 */
void pv_packed_push_burst(struct pv_vring *vr, const struct pv_done *done, uint32_t n)
{
	uint16_t at = vr->used_next;

	for (uint32_t i = 0; i < n; i++)
		at = push_at(vr, at, done[i].head, done[i].slots, done[i].len);
	vr->used_next = at;
}

/**
 * pv_packed_publish() - See pv_vring_publish()
 * @vr:		The ring
 */
void pv_packed_publish(struct pv_vring *vr)
{
	if (vr->used_next == vr->used_idx)
		return;
	/* Release: buffers and all of the batch's descriptors are visible before (2.8.8). */
	__atomic_store_n(&pv_packed_at(vr, vr->used_idx)->flags, vr->held_flags, __ATOMIC_RELEASE);
	vr->used_idx = vr->used_next;
}

/**
 * pv_packed_flush() - See pv_vring_flush()
 * @vr:		The ring; something has been pushed since the latest flush
 *
 * Return: whether the guest wants an interrupt
 */
bool pv_packed_flush(struct pv_vring *vr)
{
	uint16_t old = vr->signalled_used, flags, off_wrap;
	bool valid = vr->signalled_valid;
	uint32_t event;

	pv_packed_publish(vr);
	vr->signalled_used = vr->used_idx;
	vr->signalled_valid = true;
	/* Full barrier between publishing and reading what the driver wants: see pv_vring_flush(). */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	flags = __atomic_load_n(&vr->avail[EVENT_FLAGS], __ATOMIC_ACQUIRE) & 3;
	if (flags != VRING_PACKED_EVENT_FLAG_DESC || !vr->event_idx)
		return flags != VRING_PACKED_EVENT_FLAG_DISABLE;
	/*
	 * Acquire above: a driver that writes the place, then the flags, is understood. The place
	 * may be anywhere, then nothing is asked for.
	 */
	off_wrap = __atomic_load_n(&vr->avail[OFF_WRAP], __ATOMIC_RELAXED);
	event = off_wrap & PV_PACKED_INDEX;
	if (event >= vr->size)
		return false;
	if (!(off_wrap & PV_PACKED_WRAP))
		event += vr->size;
	return !valid ||
	       pv_packed_distance(vr, old, event) < pv_packed_distance(vr, old, vr->used_idx);
}

/**
 * pv_packed_mark_used() - Mark the descriptors that were used last
 * @vr:		The ring, with a log
 * @slots:	How many, at most the ring's size
 *
 * Of a chain, only the first descriptor was written; to mark the others does no harm.
 */
void pv_packed_mark_used(struct pv_vring *vr, uint32_t slots)
{
	uint16_t from = pv_packed_advance(vr, vr->used_idx, 2 * vr->size - slots);
	uint32_t at = pv_packed_outside(vr, from) & PV_PACKED_INDEX;
	uint32_t first = slots < vr->size - at ? slots : vr->size - at;

	pv_dirty_mark(vr->log.dirty, vr->log.desc + 16ull * at, 16ull * first);
	pv_dirty_mark(vr->log.dirty, vr->log.desc, 16ull * (slots - first));
}

/**
 * pv_packed_notify() - Ask the guest for kicks, or tell that none are needed
 * @vr:		The ring
 * @on:		Ask for them
 */
void pv_packed_notify(struct pv_vring *vr, bool on)
{
	uint16_t flags = VRING_PACKED_EVENT_FLAG_DISABLE;

	if (on && vr->event_idx) {
		__atomic_store_n(&vr->used[OFF_WRAP], pv_packed_outside(vr, vr->last_avail),
				 __ATOMIC_RELAXED);
		flags = VRING_PACKED_EVENT_FLAG_DESC;
	} else if (on) {
		flags = VRING_PACKED_EVENT_FLAG_ENABLE;
	}
	/* Release: the place is there before the flags that refer to it (2.8.10). */
	__atomic_store_n(&vr->used[EVENT_FLAGS], flags, __ATOMIC_RELEASE);
}
