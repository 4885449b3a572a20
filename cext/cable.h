/* SPDX-License-Identifier: MIT */
/*
 * A cable: frames go from one worker to another, or back to the same one, through memory.
 *
 * Theory of operation
 *
 * Each way of a cable is a queue of frames in this process's own memory, which no guest and no peer
 * can reach: frames without virtio-net headers, one behind the other, each with its length. One
 * thread puts frames in and one takes them out. Positions run freely. The producer stores "tail"
 * once per burst, and the consumer stores "head" once per burst, so that the two exchange few cache
 * lines. Whoever was put to work before (threads come and go with their front-ends) is joined
 * before the next one begins.
 *
 * No ring is shared. A worker touches only the rings and the memory of its own front-end, so
 * either front-end may come, go, or be hostile, and the other one's worker needs neither a lock nor
 * to be asked. The price is a second copy of each frame, which is in the cache by then.
 *
 * A queue is full when the far front-end takes no frames. Then the transmit ring is left alone, as
 * with a tap or a socket that takes no more: nothing is dropped. Frames stay in the queue while
 * either front-end is away, but not when the process ends.
 *
 * A worker that is about to sleep sets "frames_wanted" or "room_wanted" and looks once more; the
 * other side looks at these after each burst, and rings the bell, an eventfd. There is room again
 * when three quarters of the queue are free, so that a producer that waits is not woken for each
 * frame; by then, whatever is left to skip at the queue's end, the longest frame fits.
 *
 * A cable with a single end is a loop. Its worker is both producer and consumer, and nobody has to
 * be woken.
 */
#ifndef PV_CABLE_H
#define PV_CABLE_H

#include "types.h"

/* cffi: begin */
#define PV_CABLE_FRAME_MAX 65553 /* bytes: 64 KiB less one, an Ethernet header and a VLAN tag */

struct pv_cable;
struct pv_cable_end;

struct pv_cable *pv_cable_new(int bell, int far_bell);
void pv_cable_free(struct pv_cable *c);
struct pv_cable_end *pv_cable_end(struct pv_cable *c, int end);
bool pv_cable_send(struct pv_cable_end *end, const uint8_t *frame, uint32_t len);
/* cffi: end */

#define PV_CABLE_BYTES (256u << 10) /* of a queue; a power of two */
#define PV_CABLE_LINE  64

/* One way of a cable. */
struct pv_frames {
	/* The producer's. */
	_Alignas(PV_CABLE_LINE) uint64_t tail; /* atomic: behind the last frame to be seen */
	uint64_t next;			       /* behind the last frame */
	uint64_t head_seen;
	/* The consumer's. */
	_Alignas(PV_CABLE_LINE) uint64_t head; /* atomic: the first byte that is still needed */
	uint64_t at;			       /* the next frame */
	uint64_t tail_seen;
	/* Atomic; set by the one who is about to sleep, cleared by the one who rings. */
	_Alignas(PV_CABLE_LINE) int frames_wanted;
	int room_wanted;
	_Alignas(PV_CABLE_LINE) uint8_t data[PV_CABLE_BYTES];
};

struct pv_cable_end {
	struct pv_frames *in;
	struct pv_frames *out;
	int far_bell;
	bool loop; /* in and out are one */
};

/* Before each frame, at a multiple of 8 bytes. */
struct pv_frame_head {
	uint32_t len; /* PV_FRAME_SKIP: the next frame is at the queue's begin */
	uint32_t padding;
};
#define PV_FRAME_SKIP UINT32_MAX

void pv_cable_ring(const struct pv_cable_end *end);

/* Bytes of a queue that a frame takes. */
static inline uint32_t pv_frame_size(uint32_t len)
{
	return ((uint32_t)sizeof(struct pv_frame_head) + len + 7) & ~7u;
}

static inline struct pv_frame_head *pv_frame_at(struct pv_frames *q, uint64_t position)
{
	return (struct pv_frame_head *)(void *)(q->data + position % PV_CABLE_BYTES);
}

/* Bytes from the next frame's position to where a frame of this length can lie. */
static inline uint32_t pv_frames_skip(const struct pv_frames *q, uint32_t len)
{
	uint32_t left = PV_CABLE_BYTES - (uint32_t)(q->next % PV_CABLE_BYTES);

	return pv_frame_size(len) <= left ? 0 : left;
}

/* By the producer: whether there is room for a frame of this length. */
static inline bool pv_frames_room(struct pv_frames *q, uint32_t len)
{
	uint64_t end = q->next + pv_frames_skip(q, len) + pv_frame_size(len);

	if (end - q->head_seen <= PV_CABLE_BYTES)
		return true;
	/* Acquire: the consumer has read what lies before its head. */
	q->head_seen = __atomic_load_n(&q->head, __ATOMIC_ACQUIRE);
	return end - q->head_seen <= PV_CABLE_BYTES;
}

/*
 * By the producer: where to store a frame of len bytes, at most PV_CABLE_FRAME_MAX. NULL: there is
 * no room. The consumer sees the frame after pv_frames_publish().
 */
static inline uint8_t *pv_frames_put(struct pv_frames *q, uint32_t len)
{
	uint32_t skip = pv_frames_skip(q, len);
	struct pv_frame_head *head;

	if (!pv_frames_room(q, len))
		return NULL;
	if (skip)
		pv_frame_at(q, q->next)->len = PV_FRAME_SKIP;
	head = pv_frame_at(q, q->next + skip);
	head->len = len;
	q->next += skip + pv_frame_size(len);
	return (uint8_t *)(head + 1);
}

/* By the producer: show all frames. Returns whether the consumer is to be woken. */
static inline bool pv_frames_publish(struct pv_frames *q)
{
	if (q->tail == q->next)
		return false;
	/* Release: the frames are there before the position that shows them. */
	__atomic_store_n(&q->tail, q->next, __ATOMIC_RELEASE);
	/*
	 * Full barrier between showing and looking whether the consumer sleeps; it does the
	 * reverse. One of us must see the other's store.
	 */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return __atomic_load_n(&q->frames_wanted, __ATOMIC_RELAXED) &&
	       __atomic_exchange_n(&q->frames_wanted, 0, __ATOMIC_RELAXED);
}

/* By the consumer: the next frame, which stays in the queue; NULL: there is none. */
static inline const uint8_t *pv_frames_peek(struct pv_frames *q, uint32_t *len)
{
	struct pv_frame_head *head;

	if (q->at == q->tail_seen) {
		/* Acquire: pairs with pv_frames_publish(). */
		q->tail_seen = __atomic_load_n(&q->tail, __ATOMIC_ACQUIRE);
		if (q->at == q->tail_seen)
			return NULL;
	}
	head = pv_frame_at(q, q->at);
	if (head->len == PV_FRAME_SKIP) {
		q->at += PV_CABLE_BYTES - q->at % PV_CABLE_BYTES;
		head = pv_frame_at(q, q->at);
	}
	*len = head->len;
	return (const uint8_t *)(head + 1);
}

/* By the consumer: take the frame of pv_frames_peek(); its bytes stay until pv_frames_release(). */
static inline void pv_frames_take(struct pv_frames *q, uint32_t len)
{
	q->at += pv_frame_size(len);
}

/* Whether a producer that waits for room has waited enough. */
static inline bool pv_frames_roomy(uint64_t tail, uint64_t head)
{
	return tail - head <= PV_CABLE_BYTES / 4;
}

/* By the consumer: give back the taken frames' bytes. Returns whether to wake the producer. */
static inline bool pv_frames_release(struct pv_frames *q)
{
	if (q->head == q->at)
		return false;
	/* Release: the frames have been read before their place is given back. */
	__atomic_store_n(&q->head, q->at, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST); /* as in pv_frames_publish() */
	return __atomic_load_n(&q->room_wanted, __ATOMIC_RELAXED) &&
	       pv_frames_roomy(__atomic_load_n(&q->tail, __ATOMIC_RELAXED), q->at) &&
	       __atomic_exchange_n(&q->room_wanted, 0, __ATOMIC_RELAXED);
}

/* By the consumer: whether there are frames. */
static inline bool pv_frames_pending(const struct pv_frames *q)
{
	return q->at != __atomic_load_n(&q->tail, __ATOMIC_ACQUIRE);
}

/* By the producer that was refused: whether the queue is empty enough to go on. */
static inline bool pv_frames_again(const struct pv_frames *q)
{
	return pv_frames_roomy(q->next, __atomic_load_n(&q->head, __ATOMIC_ACQUIRE));
}

/* By the consumer, before it sleeps. Returns whether it must not: there are frames. */
static inline bool pv_frames_want(struct pv_frames *q)
{
	__atomic_store_n(&q->frames_wanted, 1, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_SEQ_CST); /* see pv_frames_publish() */
	return pv_frames_pending(q);
}

/* By the producer, before it sleeps. Returns whether it must not: there is room. */
static inline bool pv_frames_want_room(struct pv_frames *q)
{
	__atomic_store_n(&q->room_wanted, 1, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_SEQ_CST); /* see pv_frames_publish() */
	return pv_frames_again(q);
}

#endif
