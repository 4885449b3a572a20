/* SPDX-License-Identifier: MIT */
/*
 * Faults on demand: what a worker does wrong because somebody has asked for it.
 *
 * Theory of operation
 *
 * A queue pair has one object for both of its ways: 0 is receive (frames for the guest), 1 is
 * transmit. The object lives as long as the card, and each worker of the queue pair borrows it, so
 * that rules, counts and frames that wait outlive a worker. A worker without the object looks at
 * one pointer per frame; nothing else of this file costs anything then.
 *
 * pv_impair_take() decides about a frame by the rules, in their order. Each rule whose conditions
 * hold draws the same number of random numbers for the frame, whatever comes of them. So the deeds
 * follow from the seed and from the frames that the rule has seen, and from nothing else: neither
 * from time nor from the other way.
 *
 * A frame that is delayed, changed or repeated is copied, and its chain is given back as if the
 * frame had passed. The copy waits in blocks of memory of our own until its time; frames whose time
 * is the same stay in order. There are PV_IMPAIR_BLOCKS blocks per way, made beforehand, because
 * the worker may not ask the system for memory. What finds no room is lost, and counted.
 *
 * A frame that is reordered waits for the next frame of its way that is not lost, and goes just
 * behind it; REORDER_NS later, it goes in any case.
 *
 * Corruption turns one bit over, behind the Ethernet header. If the frame's checksum is still to be
 * made, it is made first, so that the receiver notices. For a frame that is to be segmented, this
 * cannot be done: such a frame is left alone and counted.
 *
 * A frame that is cut short loses its end, from a random byte or a given one on: the used length of
 * a receive buffer covers no more. The checksum, and a frame that is to be segmented, are treated
 * as above, and the header's hdr_len becomes 0, for it may be more than what is left. On its way to
 * the host, a frame keeps its Ethernet header.
 *
 * Of a packet's used entries, pv_impair_used() only says that they are to come behind those of the
 * next packet. They wait in the worker, which knows what the ring allows (net_worker.h).
 *
 * A limit of the rate is a token bucket: a frame takes as many tokens as it has bytes, and waits
 * for those that are missing. A frame that is lost, by whichever rule or because it finds no room,
 * takes none, or else a guest that sends too much would slow down what there is room for.
 *
 * A frame that is to pass and cannot go yet has been decided about, and is not asked about again;
 * frames that wait do not go before it.
 *
 * The worker calls from one thread at a time. Other threads change the rules by pv_impair_commit(),
 * which waits until the worker does not look at the old ones any more.
 */
#ifndef PV_IMPAIR_H
#define PV_IMPAIR_H

#include "filter.h"

/* cffi: begin */
#define PV_IMPAIR_RULES	    16	  /* at most so many rules at a time */
#define PV_IMPAIR_BLOCKS    4096  /* of a way: at most so many frames wait, */
#define PV_IMPAIR_BLOCK	    2048  /* and so many bytes in each block */
#define PV_IMPAIR_FRAME_MAX 69632 /* a longer frame is left alone */
/* struct pv_chance: every */
#define PV_CHANCE_ALWAYS 1

/* What can be done to a frame, a kick or an interrupt; bits. */
enum pv_deed {
	PV_DEED_LOSS = 1,
	PV_DEED_DUPLICATE = 2,
	PV_DEED_REORDER = 4,
	PV_DEED_CORRUPT = 8,
	PV_DEED_DELAY = 16,
	PV_DEED_RATE = 32,	     /* waits for tokens */
	PV_DEED_FULL = 64,	     /* lost, because no more frames may wait */
	PV_DEED_HOLD_IRQ = 128,	     /* an interrupt waits */
	PV_DEED_EXTRA_IRQ = 256,     /* an interrupt that the driver has not asked for */
	PV_DEED_HOLD_KICK = 512,     /* a kick waits */
	PV_DEED_TRUNCATE = 1024,     /* cut short */
	PV_DEED_REORDER_USED = 2048, /* used entries came behind those of the next packet */
	PV_DEED_LATE_USED = 4096     /* used entries waited in vain for a next packet */
};

/* Whether something happens. Both 0: never. */
struct pv_chance {
	uint32_t odds;	/* of 2^32; looked at if every is 0 */
	uint32_t every; /* each nth time */
};

/*
 * A rule. Its conditions are looked at from the first member on to chance. The rules of frames
 * leave the last four members 0, those of used entries, kicks and interrupts the members before
 * these.
 */
struct pv_impair_rule {
	uint32_t ways; /* bit 0: receive, bit 1: transmit */
	uint32_t filter_count;
	const void *filter; /* instructions, copied; NULL: all frames */
	uint64_t from_ns;   /* since the rules were set */
	uint64_t until_ns;  /* 0: for ever */
	uint64_t after;	    /* so many are let be first */
	uint64_t count;	    /* then so many are looked at; 0: all */
	struct pv_chance chance;
	struct pv_chance loss;
	struct pv_chance duplicate;
	struct pv_chance reorder;
	struct pv_chance corrupt;
	struct pv_chance truncate;
	uint64_t keep; /* bytes of the frame that are left then; UINT64_MAX: a random number */
	uint64_t delay_ns;
	uint64_t jitter_ns; /* more or less than delay_ns, evenly spread */
	uint64_t rate;	    /* bits per second; 0: no limit */
	uint64_t burst;	    /* bytes of the bucket, beside the frame itself */
	uint32_t queue;	 /* at most so many frames wait for delay or rate; 0: all that have room */
	uint32_t frames; /* whether this is a rule of frames */
	uint64_t hold_irq_ns;
	uint64_t hold_kick_ns;
	struct pv_chance extra_irq;
	struct pv_chance reorder_used;
};

/* Of a way; written by the worker only, read by pv_impair_counters(). */
struct pv_impair_counters {
	uint64_t frames; /* that a rule was looked at for, with its conditions fulfilled */
	uint64_t loss;
	uint64_t duplicate;
	uint64_t reorder;
	uint64_t corrupt;
	uint64_t corrupt_left; /* left alone: to be segmented, or nothing behind the header */
	uint64_t delay;
	uint64_t rate;
	uint64_t full;
	uint64_t hold_irq;
	uint64_t extra_irq;
	uint64_t hold_kick;
	uint64_t cleared; /* frames that waited, thrown away by pv_impair_clear() */
	uint64_t truncate;
	uint64_t truncate_left;	    /* left alone: to be segmented, or no longer than that */
	uint64_t reorder_used;	    /* packets whose used entries came behind those of the next */
	uint64_t late_used;	    /* that waited for a next one until their time was over */
	uint64_t reorder_used_left; /* left alone: the ring has to keep its order */
};

struct pv_impair;

struct pv_impair *pv_impair_new(uint32_t pair);
void pv_impair_free(struct pv_impair *im);
int pv_impair_set(struct pv_impair *im, const struct pv_impair_rule *rule, uint32_t count,
		  uint64_t seed, uint64_t now);
int pv_impair_prepare(struct pv_impair *im, const struct pv_impair_rule *rule, uint32_t count,
		      uint64_t seed, uint64_t now);
int pv_impair_commit(struct pv_impair *im);
void pv_impair_clear(struct pv_impair *im);
void pv_impair_counters(const struct pv_impair *im, uint32_t way, struct pv_impair_counters *out);
uint32_t pv_impair_waiting(const struct pv_impair *im, uint32_t way);
/* cffi: end */

/* A frame that the worker shows. */
struct pv_impair_frame {
	const struct iovec *iov; /* has the frame, header included */
	size_t len;		 /* header included */
	uint32_t hdr_len;	 /* 0, or at least that of struct virtio_net_hdr */
};

/* A frame whose time has come. */
struct pv_impair_due {
	const struct iovec *iov; /* valid until pv_impair_sent() */
	uint32_t niov;
	uint32_t len; /* header included */
	uint32_t hdr_len;
};

/* The most segments of a frame whose time has come. */
#define PV_IMPAIR_IOV (PV_IMPAIR_FRAME_MAX / PV_IMPAIR_BLOCK)

bool pv_impair_idle(const struct pv_impair *im, int way);
bool pv_impair_take(struct pv_impair *im, int way, const struct pv_impair_frame *f, bool keep,
		    uint64_t now, uint32_t *deeds);
void pv_impair_set_passing(struct pv_impair *im, int way, bool passing);
bool pv_impair_passing(const struct pv_impair *im, int way);
bool pv_impair_due(struct pv_impair *im, int way, uint64_t now, struct pv_impair_due *out);
void pv_impair_sent(struct pv_impair *im, int way);
uint64_t pv_impair_next(const struct pv_impair *im, int way);
uint64_t pv_impair_interrupt(struct pv_impair *im, int way, uint64_t now, bool wanted);
uint64_t pv_impair_kick(struct pv_impair *im, int way, uint64_t now);
bool pv_impair_used_idle(const struct pv_impair *im, int way);
bool pv_impair_used(struct pv_impair *im, int way, uint64_t now);
void pv_impair_used_done(struct pv_impair *im, int way, uint32_t deed);

#endif
