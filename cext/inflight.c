/* SPDX-License-Identifier: MIT */
#include "inflight.h"

#include <string.h>

/*
 * Was the packet in writev() sent before the process was killed? The file's counter tells if the
 * file counts the packets that it takes and takes them from us alone: pv_inflight_desc.counter
 * holds the counter's value from before the call (GIVEN_COUNTED). Otherwise nobody can know
 * (GIVEN).
 */
enum { GIVEN = 1, GIVEN_COUNTED };

_Static_assert(sizeof(struct pv_inflight_desc) == 16 && sizeof(struct pv_inflight_region) == 16,
	       "QueueRegionSplit");

/**
 * pv_inflight_recover() - Take over the notes that another process may have left behind
 * @in:		With its region and ring; the ring's used index has been read
 *
 * Sets the ring's position to its used index if the region has been in use; else the ring stays
 * where it is and the region becomes a used one.
 */
void pv_inflight_recover(struct pv_inflight *in)
{
	struct pv_inflight_region *r = in->region;
	struct pv_vring *vr = in->vr;
	uint16_t head, used = vr->used_idx, done;

	if (__atomic_load_n(&r->version, __ATOMIC_ACQUIRE) != 1 || r->desc_num != vr->size) {
		memset(r, 0, PV_INFLIGHT_SIZE(vr->size));
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

/**
 * pv_inflight_begin() - Note that a packet is about to be sent
 * @in:		With a region
 * @head:	The packet's chain, from the ring
 *
 * Return: whether the process before us noted the same and may have sent the packet
 */
bool pv_inflight_begin(struct pv_inflight *in, uint16_t head)
{
	struct pv_inflight_desc *d = &in->region->desc[head];
	bool counted = in->taken != PV_INFLIGHT_UNCOUNTED;
	uint8_t given;
	bool again;

	given = __atomic_load_n(&d->given, __ATOMIC_RELAXED);
	again = __atomic_load_n(&d->inflight, __ATOMIC_RELAXED) && given;
	if (again && counted && given == GIVEN_COUNTED)
		again = __atomic_load_n(&d->counter, __ATOMIC_RELAXED) != in->taken;
	__atomic_store_n(&d->counter, counted ? in->taken : in->order++, __ATOMIC_RELAXED);
	__atomic_store_n(&d->given, counted ? GIVEN_COUNTED : GIVEN, __ATOMIC_RELAXED);
	__atomic_store_n(&d->inflight, 1, __ATOMIC_RELEASE);
	return again;
}

/**
 * pv_inflight_cancel() - Note that the file did not take the packet
 * @in:		With a region
 * @head:	As for pv_inflight_begin()
 */
void pv_inflight_cancel(struct pv_inflight *in, uint16_t head)
{
	__atomic_store_n(&in->region->desc[head].inflight, 0, __ATOMIC_RELEASE);
}

/**
 * pv_inflight_end() - Publish a packet's chain and note that the packet is done
 * @in:		With a region
 * @head:	The chain that was pushed last
 *
 * A batch of one packet, with the stores in the order that the specification gives.
 */
void pv_inflight_end(struct pv_inflight *in, uint16_t head)
{
	struct pv_inflight_region *r = in->region;

	__atomic_store_n(&r->desc[head].next, r->last_batch_head, __ATOMIC_RELAXED);
	__atomic_store_n(&r->last_batch_head, head, __ATOMIC_RELEASE);
	pv_vring_publish(in->vr);
	__atomic_store_n(&r->desc[head].inflight, 0, __ATOMIC_RELEASE);
	__atomic_store_n(&r->used_idx, in->vr->used_next, __ATOMIC_RELEASE);
}

/**
 * pv_inflight_flushed() - Note that the ring's batch has been published
 * @in:		With a region
 */
void pv_inflight_flushed(struct pv_inflight *in)
{
	__atomic_store_n(&in->region->used_idx, in->vr->used_idx, __ATOMIC_RELEASE);
}
