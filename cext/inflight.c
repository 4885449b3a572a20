/* SPDX-License-Identifier: MIT */
#include "inflight.h"

#include <linux/virtio_ring.h>
#include <stddef.h>
#include <string.h>

#include "vring_packed.h"

/*
 * Was the packet in writev() sent before the process was killed? The file's counter tells if the
 * file counts the packets that it takes and takes them from us alone: "counter" holds the counter's
 * value from before the call (GIVEN_COUNTED). Otherwise nobody can know (GIVEN).
 */
enum { GIVEN = 1, GIVEN_COUNTED };

_Static_assert(sizeof(struct pv_inflight_desc) == 16 && sizeof(struct pv_inflight_region) == 16,
	       "QueueRegionSplit");
_Static_assert(sizeof(struct pv_inflight_packed_desc) == 32 &&
		       sizeof(struct pv_inflight_packed) == 32 &&
		       offsetof(struct pv_inflight_packed, place) == 16,
	       "QueueRegionPacked");

/* Both formats begin a descriptor's notes alike, and have a counter. */
struct mark {
	uint8_t *inflight;
	uint8_t *given;
	uint64_t *counter;
};

/* --- split ring ------------------------------------------------------------------------------- */

static void split_recover(struct pv_inflight *in)
{
	struct pv_inflight_region *r = in->region;
	struct pv_vring *vr = in->vr;
	uint16_t head, used = vr->used_idx, done;

	if (__atomic_load_n(&r->version, __ATOMIC_ACQUIRE) != 1 || r->desc_num != vr->size) {
		memset(r, 0, sizeof(*r) + sizeof(r->desc[0]) * vr->size);
		r->desc_num = (uint16_t)vr->size;
		r->used_idx = used;
		__atomic_store_n(&r->version, 1, __ATOMIC_RELEASE);
		return;
	}
	/* A batch that was published, but not yet noted as done. */
	head = __atomic_load_n(&r->last_batch_head, __ATOMIC_RELAXED);
	done = (uint16_t)(used - __atomic_load_n(&r->used_idx, __ATOMIC_RELAXED));
	for (uint32_t i = 0; i < done && i < vr->size && head < vr->size; i++) {
		__atomic_store_n(&r->desc[head].inflight, 0, __ATOMIC_RELAXED);
		head = __atomic_load_n(&r->desc[head].next, __ATOMIC_RELAXED);
	}
	__atomic_store_n(&r->used_idx, used, __ATOMIC_RELAXED);
	vr->last_avail = vr->avail_idx = used;
}

static void split_end(struct pv_inflight *in, const uint16_t *head, uint32_t n)
{
	struct pv_inflight_region *r = in->region;

	for (uint32_t i = 0; i < n; i++) {
		__atomic_store_n(&r->desc[head[i]].next, r->last_batch_head, __ATOMIC_RELAXED);
		__atomic_store_n(&r->last_batch_head, head[i], __ATOMIC_RELEASE);
	}
	pv_vring_publish(in->vr);
	for (uint32_t i = 0; i < n; i++)
		__atomic_store_n(&r->desc[head[i]].inflight, 0, __ATOMIC_RELEASE);
	__atomic_store_n(&r->used_idx, in->vr->used_next, __ATOMIC_RELEASE);
}

/* --- packed ring ------------------------------------------------------------------------------ */

/* The places as the notes have them: from old to next. */
static void packed_note(struct pv_inflight *in, uint16_t old, uint16_t next)
{
	struct pv_inflight_packed *r = in->region;
	uint16_t from = pv_packed_outside(in->vr, old), to = pv_packed_outside(in->vr, next);
	union pv_inflight_place place = {.word = 0};

	place.used_idx = to & PV_PACKED_INDEX;
	place.old_used_idx = from & PV_PACKED_INDEX;
	place.used_wrap_counter = (uint8_t)(to >> 15);
	place.old_used_wrap_counter = (uint8_t)(from >> 15);
	__atomic_store_n(&r->place.word, place.word, __ATOMIC_RELEASE);
}

/* No packet is noted any more. */
static void packed_clear(struct pv_inflight_packed *r)
{
	__atomic_store_n(&r->desc[0].inflight, 0, __ATOMIC_RELEASE);
	__atomic_store_n(&r->free_head, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&r->old_free_head, 0, __ATOMIC_RELAXED);
}

static void packed_save_count(struct pv_inflight *in, uint16_t count)
{
	struct pv_inflight_packed *r = in->region;
	struct pv_inflight_saved saved = {count, pv_packed_outside(in->vr, in->vr->used_idx)};

	in->saved = count;
	__atomic_store(&r->saved, &saved, __ATOMIC_RELEASE);
	/* The notes are there before the ring changes. */
	__atomic_thread_fence(__ATOMIC_RELEASE);
}

/* Keep what the next push overwrites. */
static void packed_save(struct pv_inflight *in, uint16_t slots)
{
	struct pv_inflight_packed *r = in->region;
	uint32_t at = pv_packed_outside(in->vr, in->vr->used_next) & PV_PACKED_INDEX;
	const struct vring_packed_desc *ring = (const void *)in->vr->desc;
	struct pv_inflight_packed_desc *d = &r->desc[in->saved];

	d->num = slots;
	d->id = ring[at].id;
	d->flags = ring[at].flags;
	d->len = ring[at].len;
	packed_save_count(in, (uint16_t)(in->saved + 1));
}

/* Put back what an unpublished batch has overwritten; the ring is where that batch begins. */
static void packed_restore(struct pv_inflight *in)
{
	const struct pv_inflight_packed *r = in->region;
	struct vring_packed_desc *ring = (void *)in->vr->desc;
	struct pv_inflight_saved saved;
	uint16_t at = in->vr->used_idx;

	__atomic_load(&r->saved, &saved, __ATOMIC_ACQUIRE);
	if (saved.from != pv_packed_outside(in->vr, at))
		return; /* of another batch: a foreign back-end has been here since */
	for (uint32_t i = 0; i < saved.count && i < in->vr->size; i++) {
		uint32_t index = pv_packed_outside(in->vr, at) & PV_PACKED_INDEX;
		uint16_t slots = __atomic_load_n(&r->desc[i].num, __ATOMIC_RELAXED);

		if (slots > in->vr->size)
			return;
		ring[index].id = r->desc[i].id;
		ring[index].len = r->desc[i].len;
		ring[index].flags = r->desc[i].flags;
		at = pv_packed_advance(in->vr, at, slots);
	}
}

static void packed_recover(struct pv_inflight *in)
{
	struct pv_inflight_packed *r = in->region;
	struct pv_vring *vr = in->vr;
	union pv_inflight_place place;
	uint16_t old, next;

	place.word = __atomic_load_n(&r->place.word, __ATOMIC_ACQUIRE);
	old = (uint16_t)(place.old_used_idx | (place.old_used_wrap_counter & 1) << 15);
	next = (uint16_t)(place.used_idx | (place.used_wrap_counter & 1) << 15);
	if (__atomic_load_n(&r->version, __ATOMIC_ACQUIRE) != 1 || r->desc_num != vr->size ||
	    !pv_packed_inside(vr, old, &old) || !pv_packed_inside(vr, next, &next)) {
		memset(r, 0, sizeof(*r) + sizeof(r->desc[0]) * vr->size);
		for (uint32_t i = 0; i < vr->size; i++)
			r->desc[i].next = (uint16_t)(i + 1);
		r->desc_num = (uint16_t)vr->size;
		packed_note(in, vr->used_idx, vr->used_idx);
		__atomic_store_n(&r->version, 1, __ATOMIC_RELEASE);
		return;
	}
	vr->last_avail = vr->used_idx = vr->used_next = old;
	if (pv_packed_available(vr)) {
		packed_restore(in);
	} else if (old != next) {
		vr->last_avail = vr->used_idx = vr->used_next = next; /* it was published */
		packed_clear(r);
	}
	packed_save_count(in, 0);
	packed_note(in, vr->used_idx, vr->used_idx);
}

/* Copy the chain that was taken last: an heir that is not ours repeats it from there. */
static void packed_copy(struct pv_inflight *in, const struct pv_chain *chain)
{
	struct pv_inflight_packed *r = in->region;
	const struct vring_packed_desc *ring = (const void *)in->vr->desc;
	uint32_t at = pv_packed_outside(in->vr, in->vr->used_next) & PV_PACKED_INDEX;

	for (uint32_t i = 0; i < chain->slots; i++) {
		struct pv_inflight_packed_desc *d = &r->desc[i];

		d->id = ring[at].id;
		d->flags = ring[at].flags;
		d->len = ring[at].len;
		d->addr = ring[at].addr;
		at = at + 1 == in->vr->size ? 0 : at + 1;
	}
	r->desc[0].last = (uint16_t)(chain->slots - 1);
	r->desc[0].num = chain->slots;
	r->free_head = r->old_free_head = chain->slots;
}

static void packed_end(struct pv_inflight *in)
{
	struct pv_vring *vr = in->vr;
	uint16_t next = vr->used_next;

	packed_note(in, vr->used_idx, next);
	pv_vring_publish(vr);
	packed_clear(in->region);
	packed_save_count(in, 0);
	packed_note(in, next, next);
}

/* --- both ------------------------------------------------------------------------------------- */

static struct mark mark_of(const struct pv_inflight *in, uint16_t head)
{
	if (in->vr->packed) {
		struct pv_inflight_packed *r = in->region;

		return (struct mark){&r->desc[0].inflight, &r->desc[0].given, &r->desc[0].counter};
	} else {
		struct pv_inflight_desc *d = &((struct pv_inflight_region *)in->region)->desc[head];

		return (struct mark){&d->inflight, &d->given, &d->counter};
	}
}

/**
 * pv_inflight_recover() - Take over the notes that another process may have left behind
 * @in:		With its region and ring; the ring's used index has been read
 *
 * Sets the ring's position to its used index if the region has been in use; else the ring stays
 * where it is and the region becomes a used one.
 */
void pv_inflight_recover(struct pv_inflight *in)
{
	if (in->vr->fault)
		return;
	if (in->vr->packed)
		packed_recover(in);
	else
		split_recover(in);
}

/**
 * pv_inflight_settle() - Find out what the process before us has not sent
 * @in:		With its region, ring and counter; before anybody else writes to the file
 *
 * A packet whose note has the counter's present value was not sent. That has to be said now: others
 * may write to the file before we come to the packet, as for SEND_RARP, and then the counter says
 * nothing any more.
 */
void pv_inflight_settle(struct pv_inflight *in)
{
	const struct pv_inflight_packed *p = in->region;
	const struct pv_inflight_region *r = in->region;
	bool packed = in->vr->packed;

	if (in->taken == PV_INFLIGHT_UNCOUNTED || in->vr->fault)
		return;
	if (__atomic_load_n(packed ? &p->version : &r->version, __ATOMIC_ACQUIRE) != 1 ||
	    (packed ? p->desc_num : r->desc_num) != in->vr->size)
		return;
	for (uint32_t head = 0; head < (packed ? 1 : in->vr->size); head++) {
		struct mark m = mark_of(in, (uint16_t)head);

		if (!__atomic_load_n(m.inflight, __ATOMIC_RELAXED) ||
		    __atomic_load_n(m.given, __ATOMIC_RELAXED) != GIVEN_COUNTED ||
		    __atomic_load_n(m.counter, __ATOMIC_RELAXED) != in->taken)
			continue;
		if (packed)
			packed_clear(in->region);
		else
			__atomic_store_n(m.inflight, 0, __ATOMIC_RELEASE);
	}
}

/**
 * pv_inflight_begin() - Note that a packet is about to be sent
 * @in:		With a region
 * @chain:	The packet's, taken last; all before it were published, but for one if the ring is
 *		split
 *
 * Return: whether the process before us noted the same and may have sent the packet
 */
bool pv_inflight_begin(struct pv_inflight *in, const struct pv_chain *chain)
{
	struct mark m = mark_of(in, chain->head);
	bool counted = in->taken != PV_INFLIGHT_UNCOUNTED;
	uint8_t given;
	bool again;

	given = __atomic_load_n(m.given, __ATOMIC_RELAXED);
	again = __atomic_load_n(m.inflight, __ATOMIC_RELAXED) && given;
	if (again && counted && given == GIVEN_COUNTED)
		again = __atomic_load_n(m.counter, __ATOMIC_RELAXED) != in->taken;
	if (in->vr->packed)
		packed_copy(in, chain);
	if (again) /* what the mark says stays true: we may be killed as well */
		return true;
	__atomic_store_n(m.counter, counted ? in->taken : in->order++, __ATOMIC_RELAXED);
	__atomic_store_n(m.given, counted ? GIVEN_COUNTED : GIVEN, __ATOMIC_RELAXED);
	__atomic_store_n(m.inflight, 1, __ATOMIC_RELEASE);
	return false;
}

/**
 * pv_inflight_cancel() - Note that the file did not take the packet
 * @in:		With a region
 * @chain:	As for pv_inflight_begin()
 */
void pv_inflight_cancel(struct pv_inflight *in, const struct pv_chain *chain)
{
	if (in->vr->packed)
		packed_clear(in->region);
	else
		__atomic_store_n(mark_of(in, chain->head).inflight, 0, __ATOMIC_RELEASE);
}

/**
 * pv_inflight_push() - pv_vring_push(), of which the next process knows
 * @in:		With a region
 * @head:	From the chain
 * @slots:	From the chain
 * @len:	Bytes that the device wrote
 */
void pv_inflight_push(struct pv_inflight *in, uint16_t head, uint16_t slots, uint32_t len)
{
	if (in->vr->packed)
		packed_save(in, slots);
	pv_vring_push(in->vr, head, slots, len);
}

/**
 * pv_inflight_end() - Publish the chains of packets and note that the packets are done
 * @in:		With a region
 * @head:	From the chains that were pushed since the latest publication
 * @n:		How many: 1; of a split ring, 1 or 2
 *
 * A batch, with the stores in the order that the specification gives.
 */
void pv_inflight_end(struct pv_inflight *in, const uint16_t *head, uint32_t n)
{
	if (in->vr->packed)
		packed_end(in);
	else
		split_end(in, head, n);
}

/**
 * pv_inflight_flush() - Publish the ring's batch, and note that
 * @in:		With a region
 *
 * Return: as pv_vring_flush()
 */
bool pv_inflight_flush(struct pv_inflight *in)
{
	struct pv_vring *vr = in->vr;
	bool call;

	if (vr->packed)
		packed_note(in, vr->used_idx, vr->used_next);
	call = pv_vring_flush(vr);
	if (vr->packed) {
		packed_save_count(in, 0);
		packed_note(in, vr->used_idx, vr->used_idx);
	} else {
		__atomic_store_n(&((struct pv_inflight_region *)in->region)->used_idx, vr->used_idx,
				 __ATOMIC_RELEASE);
	}
	return call;
}
