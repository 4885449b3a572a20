/* SPDX-License-Identifier: MIT */
/*
 * In-flight notes of a ring (vhost-user, INFLIGHT_SHMFD): they tell a back-end where its
 * predecessor was when that was killed.
 *
 * Theory of operation
 *
 * The front-end keeps the memory of the notes while back-ends come and go, so the notes outlive a
 * back-end that is killed: the next back-end repeats what was not done, and no packet is lost.
 *
 * Rings are served in order, so where the used descriptors end says which chains are done. A split
 * ring has that place in its memory, as the used index. A packed ring has not: the notes have it,
 * before a batch and after. As the specification says, the flags of the batch's first descriptor
 * tell whether the batch was published. A used descriptor takes the place of an available one, so
 * the notes also have what the batch has overwritten: the next process puts that back.
 *
 * Transmits are published one by one, and only for the packet that was in writev() the place does
 * not say whether the packet was sent. So the packet is marked before writev(), and the next
 * process takes a marked packet as sent, unless the counter of the file that took it shows the
 * opposite when that process starts. With a split ring, whose notes have a mark per chain, two
 * transmits may be published at once, so that the second is used before the first.
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

/*
 * The layouts are the vhost-user specification's (QueueRegionSplit and QueueRegionPacked); "given"
 * uses their padding.
 */
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

struct pv_inflight_packed_desc {
	uint8_t inflight;
	uint8_t given;
	uint16_t next;
	uint16_t last;
	uint16_t num;
	uint64_t counter;
	uint16_t id;
	uint16_t flags;
	uint32_t len;
	uint64_t addr;
};

/* Where the used descriptors end; "old" until the latest batch is known to be published. */
union pv_inflight_place {
	struct {
		uint16_t used_idx;
		uint16_t old_used_idx;
		uint8_t used_wrap_counter;
		uint8_t old_used_wrap_counter;
	};
	uint64_t word; /* so that one store changes all, and a kill finds no halves */
};

/*
 * How many descriptors, from desc[0] on, hold what the unpublished batch has overwritten in the
 * ring, and where that batch begins (as "place"). In padding: foreign back-ends leave both alone.
 */
struct pv_inflight_saved {
	uint16_t count;
	uint16_t from;
};

struct pv_inflight_packed {
	uint64_t features;
	uint16_t version; /* 0: new */
	uint16_t desc_num;
	uint16_t free_head;
	uint16_t old_free_head;
	union pv_inflight_place place;
	struct pv_inflight_saved saved;
	uint8_t padding[4];
	struct pv_inflight_packed_desc desc[];
};

/* Bytes of the largest region of a ring with size entries: that of a packed one. */
#define PV_INFLIGHT_SIZE(size)                                                                     \
	(sizeof(struct pv_inflight_packed) +                                                       \
	 sizeof(struct pv_inflight_packed_desc) * (size_t)(size))

/* The notes of one ring. One thread owns them, as it owns the ring. */
struct pv_inflight {
	void *region; /* lent; NULL: no notes are kept */
	struct pv_vring *vr;
	/* Packets that the file has taken so far, from all its senders; PV_INFLIGHT_UNCOUNTED. */
	uint64_t taken;
	uint64_t order; /* of the next chain in flight, if nobody counts */
	uint16_t saved; /* chains of the batch that is not published */
};

void pv_inflight_settle(struct pv_inflight *in);
void pv_inflight_recover(struct pv_inflight *in);
bool pv_inflight_begin(struct pv_inflight *in, const struct pv_chain *chain);
void pv_inflight_cancel(struct pv_inflight *in, const struct pv_chain *chain);
void pv_inflight_push(struct pv_inflight *in, uint16_t head, uint16_t slots, uint32_t len);
void pv_inflight_end(struct pv_inflight *in, const uint16_t *head, uint32_t n);
bool pv_inflight_flush(struct pv_inflight *in);

#endif
