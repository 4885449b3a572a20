/* SPDX-License-Identifier: MIT */
/*
 * In-flight notes of a split ring (vhost-user, INFLIGHT_SHMFD): they tell a back-end where its
 * predecessor was when that was killed.
 *
 * Theory of operation
 *
 * The front-end keeps the memory of the notes while back-ends come and go, so the notes outlive a
 * back-end that is killed: the next back-end repeats what was not done, and no packet is lost.
 *
 * Rings are served in order. If the used index is published for each packet, that index alone says
 * which chains are done. Only for the packet that was in writev() it does not say whether the
 * packet was sent. So the packet's descriptor is marked before writev(), and the next process takes
 * a marked packet as sent, unless the counter of the file that took it shows the opposite.
 *
 * Receive chains are never marked: a chain that was taken ahead holds nothing yet.
 *
 * The front-end is not trusted. It may change every byte of the notes at any time, so no value that
 * is read from them is used as an index unchecked.
 */
#ifndef PV_INFLIGHT_H
#define PV_INFLIGHT_H

#include "vring.h"

/* cffi: begin */
/* For pv_inflight.taken: nobody counts the packets. */
#define PV_INFLIGHT_UNCOUNTED 0xffffffffffffffffull
/* cffi: end */

/* The layout is the vhost-user specification's (QueueRegionSplit); "given" uses its padding. */
struct pv_inflight_desc {
	uint8_t inflight;
	uint8_t given; /* to writev(): GIVEN or GIVEN_COUNTED, see inflight.c */
	uint8_t padding[4];
	uint16_t next;
	uint64_t counter;
};

struct pv_inflight_region {
	uint64_t features;
	uint16_t version; /* 0: new */
	uint16_t desc_num;
	uint16_t last_batch_head;
	uint16_t used_idx;
	struct pv_inflight_desc desc[];
};

/* Bytes of the region of a ring with size entries. */
#define PV_INFLIGHT_SIZE(size)                                                                     \
	(sizeof(struct pv_inflight_region) + sizeof(struct pv_inflight_desc) * (size_t)(size))

/* The notes of one ring. One thread owns them, as it owns the ring. */
struct pv_inflight {
	struct pv_inflight_region *region; /* lent; NULL: no notes are kept */
	struct pv_vring *vr;
	/* Packets that the file has taken so far, from all its senders; PV_INFLIGHT_UNCOUNTED. */
	uint64_t taken;
	uint64_t order; /* of the next chain in flight, if nobody counts */
};

void pv_inflight_recover(struct pv_inflight *in);
bool pv_inflight_begin(struct pv_inflight *in, uint16_t head);
void pv_inflight_cancel(struct pv_inflight *in, uint16_t head);
void pv_inflight_end(struct pv_inflight *in, uint16_t head);
void pv_inflight_flushed(struct pv_inflight *in);

#endif
