/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "cable.h"
#include "capture.h"
#include "event.h"
#include "impair.h"
#include "net_worker.h"
#include "thread.h"

/*
 * As vhost: what one direction may do before the other has its turn (VHOST_NET_PKT_WEIGHT,
 * VHOST_NET_WEIGHT).
 */
#define TURN_PACKETS 256
#define TURN_BYTES   (512u << 10)
/* Publish at the latest after this much, so that the guest works while we do. */
#define BATCH_PACKETS 64
#define BATCH_BYTES   (64u << 10)
#define SCRATCH_SIZE  (68u << 10) /* more than a tap ever returns: 64 KiB and headers */
#define WINDOW_IOV    (4 * PV_CHAIN_MAX)
#define READV_MAX     (PV_CHAIN_MAX - 1) /* IOV_MAX less the scratch buffer */
/* With the scratch buffer, what readv takes without allocating (UIO_FASTIOV). */
#define READV_SMALL  7
#define LARGE_CREDIT 64 /* reads with the whole window after a frame that needed it */
/* How long a vCPU waits for the thread at most, before it leaves its kick to the thread. */
#define LOCK_MS 100
/* The worker copies one packet at most until it has let go of a capture. */
#define CAPTURE_MS 1000
#define LEGACY_HDR 10 /* struct virtio_net_hdr; all headers begin with it */
#define V1_HDR	   12 /* struct virtio_net_hdr_v1 */
#define HASH_HDR   20 /* struct virtio_net_hdr_v1_hash */
#define TUNNEL_HDR 24 /* struct virtio_net_hdr_v1_hash_tunnel */
/* gso_type of segments in a UDP tunnel over IPv4 or IPv6; linux/virtio_net.h since Linux 6.17 */
#define GSO_TUNNEL 0x60
/* On a cable: chains that are taken at once, so that the processor fetches what they refer to. */
#define BURST	   32
#define BURST_IOV  (2 * PV_CHAIN_MAX)
#define CABLE_US   50 /* looks for work so long after there was some, where others linger() */
#define CABLE_LOOK 32 /* in vain, before the worker at the far end may have this processor */
/* See linger(). */
#define LINGER_MIN_US  10
#define LINGER_MAX_US  200
#define LINGER_BULK_US 1000 /* the most after a burst of LINGER_BULK bytes */
#define LINGER_BULK    (32u << 10)

/* How long used entries wait for those of another packet, and how many of a packet do. */
#define BACK_NS	 10000000u
#define BACK_MAX 64

/*
 * Slots of the ring of events, a power of two, and how many of them are kept for what comes once:
 * a fault of each ring, NOT_PINNED, STOPPED and ERROR.
 */
#define EVENTS	    16
#define EVENTS_ONCE 5

enum { RX, TX };
enum { HOLD_NO, HOLD_ASKED, HOLD_DONE };
enum { EV_RX_KICK, EV_TX_KICK, EV_FD, EV_WAKE };

/* Batches that the guest sees already, and of which nobody has told it yet. */
struct delayed {
	uint32_t chains;  /* 0: nothing waits */
	uint64_t packets; /* the ring's counter when the guest was told, or asked, last */
	uint64_t since;	  /* when the first of them came, in microseconds */
};

/* A chain of the receive window. */
struct slot {
	uint64_t len;
	uint32_t niov;
	uint16_t head;
	uint16_t slots;
	uint16_t at; /* position in the available ring, as struct pv_vring has it */
};

/*
 * A burst is what is sent between two times that the transmit ring was empty. See linger().
 */
struct burst {
	uint32_t packets;
	uint32_t bytes;
	uint64_t idle_since; /* when the ring was empty, in microseconds */
	uint64_t gap_us;     /* from then until this burst began */
	uint64_t linger_us;
	bool lingered; /* this burst came while lingering: how soon is not known */
};

/* The receive window: chains that were taken from the ring and are not used yet. */
struct window {
	uint32_t slot_at, slot_end;
	uint32_t iov_at, iov_end;
	uint64_t bytes;
	uint32_t slots; /* of all its chains */
	uint32_t large; /* reads left with the whole window */
	struct slot slot[WINDOW_IOV];
	struct iovec iov[WINDOW_IOV + 1];
};

/*
 * A frame that was read and not placed yet: its first "direct" bytes are in the window, the rest is
 * in scratch.
 */
struct held {
	size_t len; /* 0: none */
	size_t direct;
	uint64_t since; /* when the guest was found to lack buffers, in microseconds; 0: not yet */
	uint64_t read_at, read_end; /* for the trace: of the system call, in nanoseconds */
	uint8_t scratch[SCRATCH_SIZE];
};

/*
 * The used entries of a packet that are to come behind those of the next packet. Both are pushed in
 * one batch then, and what was published is always as many chains as were taken first: so whoever
 * goes on with the ring, after a kill too, needs no more than the ring's position.
 */
struct back {
	struct pv_done done[BACK_MAX];
	uint32_t count; /* 0: none waits */
	uint64_t due;	/* when they wait no more, CLOCK_MONOTONIC in nanoseconds */
	size_t len;	/* for the trace: of the packet */
};

/* One writer, the worker, and one reader, pv_net_worker_event(). */
struct events {
	struct pv_net_event event[EVENTS];
	uint32_t written; /* atomic; by the worker */
	uint32_t read;	  /* atomic; by the reader */
	/* The reader's: what it has told last of the link, and the value of events_missed then. */
	bool down;
	uint64_t missed;
};

struct pv_net_worker {
	struct pv_taker taker; /* first: take_kick() makes a worker of it */
	struct pv_thread thread;
	/* With in_exit: held by the thread while it is not in epoll, and by the vCPU that kicks. */
	pthread_mutex_t lock;
	pthread_mutex_t gate; /* held by the one who waits for lock: see let_kickers() */
	bool owed;	      /* with in_exit: the thread is to transmit; else always true */
	bool by_kicker;	      /* a vCPU, not the thread, has the lock */
	uint32_t turn;	      /* packets per turn of the thread */
	uint32_t batch;	      /* packets per publication */
	struct pv_vring ring[2];
	struct pv_inflight inflight[2];
	struct pv_dirty_log log; /* bits: NULL if there is none */
	struct pv_net_config cfg;
	struct events events;
	int epoll_fd;
	int wake_fd;
	int answer_fd; /* eventfd: hold is HOLD_DONE; made when it is first needed, else -1 */
	/* Atomic; set by any thread, then wake_fd is written. */
	int hold;   /* HOLD_ASKED, answered with HOLD_DONE: transmit no more */
	int finish; /* before stop: bring a held frame to the guest first */
	int stop;
	int attach;	   /* descriptor to use from now on, -1 for none */
	bool rx_ready;	   /* fd may have frames: edge seen, EAGAIN not yet */
	bool rx_waiting;   /* the guest must add buffers first */
	bool fd_muted;	   /* no wake-ups by fd for reading */
	bool tx_blocked;   /* fd took no more */
	bool fd_watched;   /* epoll has fd; changed by the thread only */
	bool link_down;	   /* atomic */
	uint32_t interest; /* of fd, as epoll has it */
	struct burst burst;
	struct delayed delayed[2];
	struct pv_net_counters count;
	uint64_t traced; /* time of the latest event of the trace */
	/* Atomic; see pv_net_worker_capture(). */
	struct pv_capture *capture[PV_CAPTURES];
	uint32_t captures;	  /* how many of these there are */
	bool capturing;		  /* the worker uses one of them */
	struct pv_impair *impair; /* atomic; see pv_net_worker_impair() */
	/* Until when an interrupt, or a kick, is held, CLOCK_MONOTONIC in nanoseconds; 0: none. */
	uint64_t held_irq[2];
	uint64_t held_kick[2];
	struct back back[2];
	bool late; /* on a cable: the frame at hand is one that waited */
	struct window window;
	struct held held;
	struct iovec tx_iov[BURST_IOV];
	/* A burst of transmit chains, and the place of each in the ring, for the trace. */
	struct pv_chain tx_chain[BURST];
	uint16_t tx_at[BURST];
};

/* Counters have one writer; readers must only not see halves. */
static void add(uint64_t *counter, uint64_t n)
{
	__atomic_store_n(counter, *counter + n, __ATOMIC_RELAXED);
}

static uint64_t now_us(void)
{
	return pv_now_ns() / 1000;
}

static bool stopping(const struct pv_net_worker *w)
{
	return __atomic_load_n(&w->stop, __ATOMIC_ACQUIRE);
}

/* Tell whoever reads the events. Never waits: see the theory of operation. */
static void report(struct pv_net_worker *w, struct pv_net_event ev)
{
	struct events *e = &w->events;
	uint32_t used = e->written - __atomic_load_n(&e->read, __ATOMIC_ACQUIRE);
	bool link = ev.kind == PV_NET_LINK_DOWN || ev.kind == PV_NET_LINK_UP;

	if (used < (link ? EVENTS - EVENTS_ONCE : EVENTS)) {
		e->event[e->written % EVENTS] = ev;
		/* Release: the reader that sees the number sees the event. */
		__atomic_store_n(&e->written, e->written + 1, __ATOMIC_RELEASE);
	} else {
		/* Release: the reader that sees the number sees link_down as new as this. */
		__atomic_store_n(&w->count.events_missed, w->count.events_missed + 1,
				 __ATOMIC_RELEASE);
	}
	pv_event_signal(w->cfg.event_fd);
}

/* For the trace: a batch began at the latest with what was noted here last. */
static void trace_event(struct pv_net_worker *w, uint16_t kind, int q, uint32_t count, bool call)
{
	uint64_t now = pv_now_ns();
	struct pv_trace_event e = {
		.kind = kind, .reg = (uint32_t)q, .count = count, .write = call, .ts = now};

	if (kind == PV_TRACE_BATCH) {
		const struct pv_vring *vr = &w->ring[q];

		e.ts = w->traced;
		e.dur = now - w->traced;
		e.value = pv_vring_position(vr, vr->used_idx);
		if (vr->event_idx && !vr->packed) {
			e.reason = 1;
			e.addr = __atomic_load_n(vr->used_event, __ATOMIC_RELAXED);
		}
	}
	w->traced = now;
	if (kind)
		pv_trace_put(w->cfg.trace, &e);
}

/* What is done wrong on purpose; NULL for most workers. */
static struct pv_impair *impair_of(const struct pv_net_worker *w)
{
	return __atomic_load_n(&w->impair, __ATOMIC_ACQUIRE);
}

/* The same, if it concerns the frames of ring q. */
static struct pv_impair *impair_way(const struct pv_net_worker *w, int q)
{
	struct pv_impair *im = impair_of(w);

	return im && !pv_impair_idle(im, q) ? im : NULL;
}

/* For the trace: PV_DEED_* bits of what was done to a frame of ring q, or to a notification. */
static void trace_deeds(struct pv_net_worker *w, int q, size_t len, uint32_t deeds)
{
	const struct pv_trace_event e = {.kind = PV_TRACE_FAULT,
					 .ts = pv_now_ns(),
					 .value = len,
					 .reg = (uint32_t)q,
					 .count = deeds};

	if (w->cfg.trace && deeds)
		pv_trace_put(w->cfg.trace, &e);
}

static uint64_t packets_of(const struct pv_net_worker *w, int q)
{
	return q == RX ? w->count.rx_packets : w->count.tx_packets;
}

/* Interrupt the guest. */
static void interrupt(struct pv_net_worker *w, const struct pv_net_ring *ring)
{
	if (ring->inject)
		pv_inject(ring->inject);
	else if (w->by_kicker)
		pv_event_nudge(ring->call); /* a peer may have spoilt it, and the bus is locked */
	else
		pv_event_add(ring->call);
}

/*
 * Whether to interrupt the guest for ring q, after what is done wrong on purpose. Returns false for
 * an interrupt that is held.
 */
static bool impair_call(struct pv_net_worker *w, struct pv_impair *im, int q, bool call)
{
	uint64_t now = pv_now_ns(), at = pv_impair_interrupt(im, q, now, call);

	if (at == UINT64_MAX)
		return false;
	if (at <= now) {
		trace_deeds(w, q, 0, call ? 0 : PV_DEED_EXTRA_IRQ);
		return true;
	}
	if (!w->held_irq[q])
		w->held_irq[q] = at;
	trace_deeds(w, q, 0, PV_DEED_HOLD_IRQ);
	return false;
}

/* Interrupt the guest where it wants it. n chains have been published since it was last asked. */
static void decide(struct pv_net_worker *w, int q, uint32_t n)
{
	struct pv_vring *vr = &w->ring[q];
	bool call;

	w->delayed[q] = (struct delayed){.packets = packets_of(w, q)};
	call = w->inflight[q].region ? pv_inflight_flush(&w->inflight[q]) : pv_vring_flush(vr);
	if (impair_of(w))
		call = impair_call(w, impair_of(w), q, call);
	if (w->cfg.trace)
		trace_event(w, PV_TRACE_BATCH, q, n, call);
	if (call) {
		interrupt(w, &w->cfg.ring[q]);
		add(q == RX ? &w->count.rx_calls : &w->count.tx_calls, 1);
	} else {
		add(q == RX ? &w->count.rx_calls_suppressed : &w->count.tx_calls_suppressed, 1);
	}
}

/* Microseconds that the waiting interrupt of ring q may still wait; 0: its time has come. */
static uint64_t delay_left(const struct pv_net_worker *w, int q)
{
	uint64_t waited = now_us() - w->delayed[q].since;

	return waited < w->cfg.ring[q].coalesce_us ? w->cfg.ring[q].coalesce_us - waited : 0;
}

/* Tell the guest of what has waited for long enough. Returns how long the others may sleep. */
static uint64_t decide_delayed(struct pv_net_worker *w)
{
	uint64_t left, min = UINT64_MAX;

	for (int q = RX; q <= TX; q++) {
		if (!w->delayed[q].chains)
			continue;
		left = delay_left(w, q);
		if (!left)
			decide(w, q, w->delayed[q].chains);
		else if (left < min)
			min = left;
	}
	return min;
}

/* Publish a batch. Returns whether the interrupt is to wait for more packets. */
static bool delay(struct pv_net_worker *w, int q)
{
	const struct pv_net_ring *ring = &w->cfg.ring[q];
	struct pv_vring *vr = &w->ring[q];
	struct delayed *d = &w->delayed[q];

	if (!ring->coalesce_us || vr->fault)
		return false;
	pv_vring_publish(vr);
	if (!d->chains)
		d->since = now_us();
	d->chains = vr->pushed;
	if ((ring->coalesce_packets && packets_of(w, q) - d->packets >= ring->coalesce_packets) ||
	    vr->undecided >= vr->size)
		return false;
	add(q == RX ? &w->count.rx_calls_delayed : &w->count.tx_calls_delayed, 1);
	return true;
}

/* Publish a batch and interrupt the guest where it wants it. */
static void flush(struct pv_net_worker *w, int q)
{
	struct pv_vring *vr = &w->ring[q];
	uint32_t n = vr->pushed - w->delayed[q].chains;
	uint64_t *bins = q == RX ? w->count.rx_batch_size : w->count.tx_batch_size;
	uint32_t bin;

	if (!n)
		return;
	bin = 31u - (uint32_t)__builtin_clz(n);
	add(&bins[bin < PV_NET_BATCH_BINS ? bin : PV_NET_BATCH_BINS - 1], 1);
	add(q == RX ? &w->count.rx_batches : &w->count.tx_batches, 1);
	if (!delay(w, q))
		decide(w, q, vr->pushed);
}

/* Give a chain back, with the next flush. */
static void push(struct pv_net_worker *w, int q, uint16_t head, uint16_t slots, uint32_t len)
{
	if (w->inflight[q].region)
		pv_inflight_push(&w->inflight[q], head, slots, len);
	else
		pv_vring_push(&w->ring[q], head, slots, len);
}

/* Give several chains back. */
static void push_burst(struct pv_net_worker *w, int q, const struct pv_done *done, uint32_t n)
{
	if (!w->inflight[q].region)
		pv_vring_push_burst(&w->ring[q], done, n);
	else
		for (uint32_t i = 0; i < n; i++)
			pv_inflight_push(&w->inflight[q], done[i].head, done[i].slots, done[i].len);
}

/*
 * A packet of ring q, of so many chains, is done. Returns whether its used entries are to wait for
 * those of the next packet.
 */
static bool back_begins(struct pv_net_worker *w, int q, uint32_t chains, size_t len)
{
	struct pv_impair *im = impair_of(w);
	struct back *b = &w->back[q];
	uint64_t now;

	if (!im || pv_impair_used_idle(im, q))
		return false;
	now = pv_now_ns();
	if (!pv_impair_used(im, q, now) || b->count)
		return false;
	/* A packed ring's notes have room for a single packet that is being sent. */
	if (w->cfg.in_order || chains > BACK_MAX ||
	    (q == TX && w->inflight[q].region && w->ring[q].packed)) {
		pv_impair_used_done(im, q, 0);
		return false;
	}
	b->due = now + BACK_NS;
	b->len = len;
	return true;
}

/* Have a chain wait, after back_begins(). */
static void back_add(struct pv_net_worker *w, int q, uint16_t head, uint16_t slots, uint32_t len)
{
	struct back *b = &w->back[q];

	b->done[b->count++] = (struct pv_done){.head = head, .slots = slots, .len = len};
}

/* For the trace: the chains that wait are about to be given back. */
static void trace_back(struct pv_net_worker *w, int q, uint32_t deed)
{
	const struct back *b = &w->back[q];
	struct pv_trace_event e = {.ts = pv_now_ns(),
				   .kind = PV_TRACE_FAULT,
				   .value = b->len,
				   .reg = (uint32_t)q,
				   .count = deed,
				   .size = b->done[0].head,
				   .region = pv_vring_position(&w->ring[q], w->ring[q].used_next),
				   .write = true};

	pv_trace_put(w->cfg.trace, &e);
}

/* Give back the chains that wait, with the next flush: behind another packet's, or too late. */
static void back_push(struct pv_net_worker *w, int q, uint32_t deed)
{
	struct back *b = &w->back[q];

	if (!b->count)
		return;
	if (w->cfg.trace)
		trace_back(w, q, deed);
	push_burst(w, q, b->done, b->count);
	b->count = 0;
	pv_impair_used_done(impair_of(w), q, deed);
}

/* No other packet is waited for any more. */
static void back_ends(struct pv_net_worker *w, int q)
{
	uint16_t head = w->back[q].done[0].head;

	if (!w->back[q].count)
		return;
	back_push(w, q, PV_DEED_LATE_USED);
	if (q == TX && w->inflight[q].region)
		pv_inflight_end(&w->inflight[q], &head, 1);
	flush(w, q);
}

static uint32_t window_chains(const struct window *win)
{
	return win->slot_end - win->slot_at;
}

/* Forget the chains of the window. */
static void window_clear(struct window *win)
{
	win->slot_at = win->slot_end = win->iov_at = win->iov_end = 0;
	win->bytes = win->slots = 0;
}

/* The held frame was placed or dropped. */
static void held_clear(struct held *held)
{
	held->len = held->since = 0;
}

/* Give the window back to the ring; a frame that is held has nowhere to go. */
static void rx_abandon(struct pv_net_worker *w)
{
	if (w->held.len)
		add(&w->count.rx_drop_held, 1);
	held_clear(&w->held);
	pv_vring_unpop(&w->ring[RX], w->window.slots);
	window_clear(&w->window);
}

/* The guest got ring q wrong: that direction is over. */
static void ring_fault(struct pv_net_worker *w, int q, enum pv_fault fault)
{
	if (q == RX)
		rx_abandon(w);
	else if (impair_of(w))
		pv_impair_set_passing(impair_of(w), TX, false);
	back_ends(w, q);
	flush(w, q);
	w->ring[q].fault = fault;
	add(&w->count.ring_faults, 1);
	report(w, (struct pv_net_event){.kind = PV_NET_RING_FAULT, .queue = q, .fault = fault});
}

/*
 * By the thread: if fd has gone, epoll is to look at fd no more. Only then is the loss told,
 * because the supervisor closes fd when told.
 */
static void unwatch_gone(struct pv_net_worker *w)
{
	if (!w->link_down || !w->fd_watched)
		return;
	w->fd_watched = false;
	epoll_ctl(w->epoll_fd, EPOLL_CTL_DEL, w->cfg.fd, NULL);
	report(w, (struct pv_net_event){.kind = PV_NET_LINK_DOWN});
}

static void fd_gone(struct pv_net_worker *w)
{
	if (w->link_down)
		return;
	w->tx_blocked = false;
	w->owed = true; /* what the tap did not take is to be dropped */
	add(&w->count.link_losses, 1);
	__atomic_store_n(&w->link_down, true, __ATOMIC_RELAXED);
	if (!w->by_kicker) /* the vCPU may not call epoll_ctl(): see vcpu_calls in confine.c */
		unwatch_gone(w);
}

static int watch(struct pv_net_worker *w, int fd, uint32_t what, uint32_t events)
{
	struct epoll_event ev = {.events = events, .data.u32 = what};

	return epoll_ctl(w->epoll_fd, EPOLL_CTL_ADD, fd, &ev);
}

/* Someone wrote to wake_fd: there may be a new tap. */
static int woken(struct pv_net_worker *w)
{
	uint64_t count;
	struct iovec v = {.iov_base = &count, .iov_len = sizeof(count)};
	int fd;

	(void)!readv(w->wake_fd, &v, 1);
	if (stopping(w))
		return 0;
	fd = __atomic_exchange_n(&w->attach, -1, __ATOMIC_ACQUIRE);
	if (fd < 0 || !w->link_down)
		return 0;
	w->interest = EPOLLIN | EPOLLET | EPOLLPRI;
	if (watch(w, fd, EV_FD, w->interest))
		return -1;
	w->cfg.fd = fd;
	w->inflight[TX].taken = PV_INFLIGHT_UNCOUNTED;
	w->fd_watched = true;
	w->fd_muted = false;
	w->rx_ready = true;
	__atomic_store_n(&w->link_down, false, __ATOMIC_RELAXED);
	report(w, (struct pv_net_event){.kind = PV_NET_LINK_UP});
	return 0;
}

static bool rx_possible(const struct pv_net_worker *w)
{
	return !w->ring[RX].fault && !w->link_down;
}

static bool tx_possible(const struct pv_net_worker *w)
{
	return !w->ring[TX].fault && !w->tx_blocked && !w->held_kick[TX] &&
	       !__atomic_load_n(&w->hold, __ATOMIC_RELAXED);
}

/* Whether frames of the guest's that have waited may go: not before one that is to pass. */
static bool late_possible(const struct pv_net_worker *w)
{
	const struct pv_impair *im = impair_of(w);

	return !w->tx_blocked && !__atomic_load_n(&w->hold, __ATOMIC_RELAXED) &&
	       !(im && pv_impair_passing(im, TX));
}

static uint64_t earlier(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* When something that waits on purpose is to be done; UINT64_MAX: nothing waits. */
static uint64_t impair_at(const struct pv_net_worker *w)
{
	const struct pv_impair *im = impair_of(w);
	uint64_t at = UINT64_MAX;

	if (!im)
		return at;
	if (rx_possible(w) && !w->rx_waiting)
		at = earlier(at, pv_impair_next(im, RX));
	if (late_possible(w))
		at = earlier(at, pv_impair_next(im, TX));
	for (int q = RX; q <= TX; q++) {
		if (w->held_irq[q])
			at = earlier(at, w->held_irq[q]);
		if (w->held_kick[q])
			at = earlier(at, w->held_kick[q]);
		if (w->back[q].count)
			at = earlier(at, w->back[q].due);
	}
	return at;
}

/* Tell the guest of what has waited. Returns for how many microseconds the worker may sleep. */
static uint64_t time_left(struct pv_net_worker *w)
{
	uint64_t left = decide_delayed(w), at = impair_at(w), now;

	if (at == UINT64_MAX)
		return left;
	now = pv_now_ns();
	return at > now ? earlier(left, (at - now + 999) / 1000) : 0;
}

/* A kick has come. Returns whether it is to be overlooked for a while. */
static bool impair_kick(struct pv_net_worker *w, int q)
{
	struct pv_impair *im = impair_of(w);
	uint64_t now, until;

	if (!im)
		return false;
	now = pv_now_ns();
	until = pv_impair_kick(im, q, now);
	if (until <= now)
		return false;
	if (!w->held_kick[q])
		w->held_kick[q] = until;
	trace_deeds(w, q, 0, PV_DEED_HOLD_KICK);
	return true;
}

/* Move the window to the front of its arrays, so that one more chain fits behind it. */
static void window_compact(struct window *win)
{
	memmove(win->slot, &win->slot[win->slot_at], window_chains(win) * sizeof(win->slot[0]));
	memmove(win->iov, &win->iov[win->iov_at],
		(win->iov_end - win->iov_at) * sizeof(win->iov[0]));
	win->slot_end -= win->slot_at;
	win->iov_end -= win->iov_at;
	win->slot_at = win->iov_at = 0;
}

/* Store bytes at an offset of the window, which is long enough. */
static void window_store(struct window *win, size_t at, const uint8_t *from, size_t len)
{
	for (const struct iovec *iov = &win->iov[win->iov_at]; len; iov++) {
		size_t n = iov->iov_len;

		if (at >= n) {
			at -= n;
			continue;
		}
		n = n - at < len ? n - at : len;
		memcpy((uint8_t *)iov->iov_base + at, from, n);
		from += n;
		len -= n;
		at = 0;
	}
}

/* Mark the first len bytes of the window, which have been written. */
static void window_mark(struct pv_net_worker *w, size_t len)
{
	for (const struct iovec *iov = &w->window.iov[w->window.iov_at]; len; iov++) {
		size_t n = iov->iov_len < len ? iov->iov_len : len;

		pv_dirty_mark_host(&w->log, w->ring[RX].mem, iov->iov_base, n);
		len -= n;
	}
}

/* Tell whoever wants to know that something was marked. */
static void tell_log(struct pv_net_worker *w)
{
	w->log.marked = false;
	__atomic_store_n(&w->count.log_missed, w->log.missed, __ATOMIC_RELAXED);
	pv_event_add(w->cfg.log_call);
}

/* The segments of the window that nothing has been placed in. */
static const struct iovec *window_iov(const struct window *win)
{
	return &win->iov[win->iov_at];
}

/*
 * The offsets of a frame's tunnel are 0 if it has none: some taps leave there what was in the
 * kernel's memory (tun_put_user() before Linux commit 7f2fcff15e99).
 */
static void rx_tunnel(struct pv_net_worker *w)
{
	uint8_t gso_type;

	pv_segments_load(window_iov(&w->window), 1, &gso_type, 1);
	if (!(gso_type & GSO_TUNNEL))
		window_store(&w->window, HASH_HDR, (const uint8_t[TUNNEL_HDR - HASH_HDR]){0},
			     TUNNEL_HDR - HASH_HDR);
}

/*
 * For the trace: a packet of len bytes lies in iov; head and at are those of its first chain, which
 * is to be pushed next, or to come behind another packet's.
 */
static void trace_packet(struct pv_net_worker *w, int q, const struct iovec *iov, uint32_t niov,
			 size_t len, uint16_t head, uint16_t at, uint64_t begin, uint64_t end,
			 bool moved, bool back)
{
	const struct pv_vring *vr = &w->ring[q];
	struct pv_trace *t = w->cfg.trace;
	uint8_t first[PV_TRACE_HEAD];
	size_t have = len < sizeof(first) ? len : sizeof(first);
	struct pv_trace_event e = {
		.kind = PV_TRACE_PACKET,
		.ts = begin,
		.dur = end - begin,
		.addr = vr->packed ? 0 : vr->avail_idx,
		.value = len,
		.reason = pv_vring_position(vr, at),
		.region = back ? PV_TRACE_LATER : pv_vring_position(vr, vr->used_next),
		.reg = (uint32_t)q,
		.count = niov,
		.size = head,
		.write = moved,
	};

	pv_trace_put(t, &e);
	for (uint32_t i = 0; i < niov && i < PV_TRACE_SEGMENTS; i++) {
		e = (struct pv_trace_event){
			.kind = PV_TRACE_SEGMENT, .ts = begin, .value = iov[i].iov_len};
		(void)pv_mem_gpa(vr->mem, iov[i].iov_base, &e.addr);
		pv_trace_put(t, &e);
	}
	if (!moved) /* the tap found no page of the host there, and this would be SIGBUS */
		return;
	pv_segments_load(iov, 0, first, have);
	for (size_t from = 0; from < have; from += PV_TRACE_DATA) {
		size_t n = have - from < PV_TRACE_DATA ? have - from : PV_TRACE_DATA;

		e = (struct pv_trace_event){.kind = PV_TRACE_BYTES,
					    .ts = begin,
					    .size = (uint16_t)n,
					    .write = (uint8_t)w->cfg.hdr_len};
		memcpy(e.bytes, first + from, n);
		pv_trace_put(t, &e);
	}
}

/* The time for a packet that is being handed over; 0 if nobody captures. */
static uint64_t capture_time(const struct pv_net_worker *w)
{
	return __atomic_load_n(&w->captures, __ATOMIC_RELAXED) ? pv_real_ns() : 0;
}

/* Give each capture a packet, which has been handed over: its pages are there. */
static void capture(struct pv_net_worker *w, int q, uint64_t ts, const struct iovec *iov,
		    size_t len)
{
	const struct pv_capture_packet p = {.ts = ts,
					    .queue = (uint16_t)(w->cfg.first_queue + (uint32_t)q),
					    .hdr_len = (uint16_t)w->cfg.hdr_len};

	/* Either this is seen by whoever takes a capture away, or its place is found empty. */
	__atomic_store_n(&w->capturing, true, __ATOMIC_SEQ_CST);
	for (int i = 0; i < PV_CAPTURES; i++) {
		struct pv_capture *c = __atomic_load_n(&w->capture[i], __ATOMIC_SEQ_CST);

		if (c)
			pv_capture_put(c, &p, iov, len);
	}
	__atomic_store_n(&w->capturing, false, __ATOMIC_RELEASE);
}

/* Count a packet in the window by what its header says. */
static void rx_count_header(struct pv_net_worker *w, size_t len)
{
	struct pv_net_counters *c = &w->count;
	uint8_t head[2]; /* flags and gso_type */

	pv_segments_load(window_iov(&w->window), 0, head, sizeof(head));
	if (head[0] & VIRTIO_NET_HDR_F_NEEDS_CSUM)
		add(&c->rx_csum_needed, 1);
	if (head[0] & VIRTIO_NET_HDR_F_DATA_VALID)
		add(&c->rx_csum_valid, 1);
	if (!(head[0] & (VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID)))
		add(&c->rx_csum_none, 1);
	if (head[1] != VIRTIO_NET_HDR_GSO_NONE) {
		add(&c->rx_gso_packets, 1);
		add(&c->rx_gso_bytes, len);
	}
}

/* Count a packet that was sent by what its header says. */
static void tx_count_header(struct pv_net_worker *w, const struct iovec *iov, size_t len)
{
	struct pv_net_counters *c = &w->count;
	uint8_t head[2];

	if (iov->iov_len >= sizeof(head))
		memcpy(head, iov->iov_base, sizeof(head));
	else
		pv_segments_load(iov, 0, head, sizeof(head));
	add(head[0] & VIRTIO_NET_HDR_F_NEEDS_CSUM ? &c->tx_csum_needed : &c->tx_csum_none, 1);
	if (head[1] != VIRTIO_NET_HDR_GSO_NONE) {
		add(&c->tx_gso_packets, 1);
		add(&c->tx_gso_bytes, len);
	}
}

/* 5.1.6.4.4: tell the driver the hash of the frame in the window. */
static void rx_hash(struct pv_net_worker *w, size_t len)
{
	struct {
		uint32_t value;
		uint16_t report;
		uint16_t padding;
	} hash = {0};
	uint8_t head[PV_FLOW_HEAD_MAX];

	len -= w->cfg.hdr_len;
	if (len > sizeof(head))
		len = sizeof(head);
	if (w->cfg.hash.types) {
		pv_segments_load(window_iov(&w->window), w->cfg.hdr_len, head, len);
		hash.value = pv_flow_hash(&w->cfg.hash, head, len, &hash.report);
	}
	window_store(&w->window, V1_HDR, (const uint8_t *)&hash, sizeof(hash));
}

/* Whether a chain is none that a frame can be received into. */
static bool rx_bad(const struct pv_net_worker *w, const struct pv_chain *c)
{
	return c->out_num || c->in_len < w->cfg.hdr_len;
}

/* Add a chain to the window, whose segments are at its end already. */
static void window_add(struct window *win, const struct pv_chain *c, uint16_t at)
{
	win->slot[win->slot_end++] = (struct slot){
		.len = c->in_len, .niov = c->in_num, .head = c->head, .slots = c->slots, .at = at};
	win->iov_end += c->in_num;
	win->bytes += c->in_len;
	win->slots += c->slots;
}

/* Take one more chain into the window. PV_DONE: the guest has no more. */
static enum pv_step rx_take(struct pv_net_worker *w)
{
	struct pv_vring *vr = &w->ring[RX];
	struct window *win = &w->window;
	uint16_t at = vr->last_avail;
	struct pv_chain c;
	enum pv_step step;

	if (win->iov_end + PV_CHAIN_MAX > WINDOW_IOV || win->slot_end == WINDOW_IOV)
		window_compact(win);
	step = pv_vring_pop(vr, &win->iov[win->iov_end], PV_CHAIN_MAX, &c);
	if (step == PV_DONE)
		return PV_DONE;
	if (step == PV_MORE && rx_bad(w, &c)) {
		pv_vring_unpop(vr, c.slots);
		vr->fault = c.out_num ? PV_FAULT_DIRECTION : PV_FAULT_SHORT;
		step = PV_BAD;
	}
	if (step == PV_BAD) {
		ring_fault(w, RX, vr->fault);
		return PV_BAD;
	}
	window_add(win, &c, at);
	return PV_MORE;
}

/*
 * Take chains until the window holds want bytes (one without MRG_RXBUF). PV_DONE: the guest has no
 * more.
 */
static enum pv_step rx_fill(struct pv_net_worker *w, size_t want)
{
	struct window *win = &w->window;
	enum pv_step step;

	while (win->bytes < want && win->iov_end - win->iov_at < READV_MAX) {
		if (!w->cfg.mrg_rxbuf && window_chains(win))
			break;
		step = rx_take(w);
		if (step != PV_MORE)
			return step;
	}
	return PV_MORE;
}

/* Read one frame into the window and, what does not fit, the scratch buffer. Sets held.direct. */
static ssize_t rx_read(struct pv_net_worker *w)
{
	struct window *win = &w->window;
	struct held *held = &w->held;
	struct iovec *iov = &win->iov[win->iov_at], saved;
	uint32_t max = win->iov_end - win->iov_at, n = 0;
	size_t size = 0;
	ssize_t got;

	if (impair_way(w, RX))
		max = 0; /* it may be lost, or wait: the guest's buffers are not for it yet */
	else if (win->large)
		win->large--;
	else if (max > READV_SMALL)
		max = READV_SMALL;
	if (max > READV_MAX)
		max = READV_MAX;
	while (n < max && size < w->cfg.max_frame)
		size += iov[n++].iov_len;
	saved = iov[n];
	iov[n] = (struct iovec){.iov_base = held->scratch, .iov_len = SCRATCH_SIZE};
	if (w->cfg.trace)
		held->read_at = pv_now_ns();
	got = readv(w->cfg.fd, iov, (int)n + 1);
	if (w->cfg.trace)
		held->read_end = pv_now_ns();
	iov[n] = saved;
	add(&w->count.fd_reads, 1);
	held->direct = got > 0 && (size_t)got > size ? size : got > 0 ? (size_t)got : 0;
	if (w->log.bits) {
		/* A frame that the host could not write (EFAULT) may be there in part. */
		if (got < 0 && errno == EFAULT)
			window_mark(w, size < SCRATCH_SIZE ? size : SCRATCH_SIZE);
		else
			window_mark(w, held->direct);
	}
	return got;
}

/* The guest has its frame: the first len bytes of the window, but for what the device fills in. */
static void rx_hand_over(struct pv_net_worker *w, size_t len)
{
	struct window *win = &w->window;
	size_t left = len;
	uint32_t segments = 0;
	uint16_t buffers = 0;
	uint64_t captured;
	bool back;

	for (uint32_t i = win->slot_at; left; i++, buffers++) {
		left -= win->slot[i].len < left ? win->slot[i].len : left;
		segments += win->slot[i].niov;
	}
	/*
	 * 5.1.6.4: always 1 without MRG_RXBUF. The field follows the legacy header.
	 */
	if (w->cfg.hdr_len >= V1_HDR)
		window_store(win, LEGACY_HDR,
			     (uint8_t[]){(uint8_t)buffers, (uint8_t)(buffers >> 8)}, 2);
	if (w->cfg.hdr_len >= HASH_HDR)
		rx_hash(w, len);
	if (w->cfg.hdr_len >= TUNNEL_HDR)
		rx_tunnel(w);
	if (w->log.bits)
		window_mark(w, len);
	rx_count_header(w, len - w->cfg.hdr_len);
	back = back_begins(w, RX, buffers, len);
	if (w->cfg.trace)
		trace_packet(w, RX, window_iov(win), segments, len, win->slot[win->slot_at].head,
			     win->slot[win->slot_at].at, w->held.read_at, w->held.read_end, true,
			     back);
	captured = capture_time(w);
	if (captured)
		capture(w, RX, captured, window_iov(win), len);
	for (left = len; left; win->slot_at++) {
		const struct slot *s = &win->slot[win->slot_at];
		size_t n = s->len < left ? s->len : left;

		if (back)
			back_add(w, RX, s->head, s->slots, (uint32_t)n);
		else
			push(w, RX, s->head, s->slots, (uint32_t)n);
		left -= n;
		win->iov_at += s->niov;
		win->bytes -= s->len;
		win->slots -= s->slots;
	}
	if (!back) /* together, whatever the number of buffers is (5.1.6.4.1) */
		back_push(w, RX, PV_DEED_REORDER_USED);
	if (!window_chains(win))
		window_clear(win);
	add(&w->count.rx_packets, 1);
	add(&w->count.rx_bytes, len - w->cfg.hdr_len);
	held_clear(&w->held);
}

/*
 * Hand the held frame to the guest. False if the guest lacks the buffers: the frame stays held, or
 * was dropped because waiting would be in vain or the ring is malformed.
 */
static bool rx_place(struct pv_net_worker *w)
{
	struct pv_vring *vr = &w->ring[RX];
	struct window *win = &w->window;
	struct held *held = &w->held;
	size_t len = held->len;

	if (win->bytes < len) {
		enum pv_step step = rx_fill(w, len);

		if (step == PV_BAD)
			return false;
		if (win->bytes < len) {
			if (step == PV_DONE && w->cfg.mrg_rxbuf && win->slots < vr->size) {
				if (!held->since)
					held->since = now_us();
				w->rx_waiting = true;
			} else {
				add(&w->count.rx_drop_long, 1);
				held_clear(held);
			}
			return false;
		}
	}
	if (held->direct < len) {
		window_store(win, held->direct, held->scratch, len - held->direct);
		win->large = LARGE_CREDIT;
		add(&w->count.rx_overflows, 1);
	}
	/*
	 * A tap sets DATA_VALID whatever it was told, and in a socket is what another guest has
	 * written. Lengths and offsets mean nothing without the flags.
	 */
	if (!w->cfg.guest_csum)
		window_store(win, 0, (const uint8_t[LEGACY_HDR]){0}, LEGACY_HDR);
	rx_hand_over(w, len);
	return true;
}

/* Hold a frame whose time has come. Returns whether there is one. */
static bool rx_late(struct pv_net_worker *w)
{
	struct pv_impair *im = impair_of(w);
	struct held *held = &w->held;
	struct pv_impair_due due;
	uint64_t now;

	if (!im || pv_impair_next(im, RX) == UINT64_MAX)
		return false;
	now = pv_now_ns();
	if (!pv_impair_due(im, RX, now, &due))
		return false;
	pv_segments_load(due.iov, 0, held->scratch, due.len);
	pv_impair_sent(im, RX);
	held->len = due.len;
	held->direct = 0;
	held->read_at = held->read_end = w->cfg.trace ? now : 0;
	return true;
}

/* Decide about the held frame, which has just been read. Returns whether it waits or is lost. */
static bool rx_impair(struct pv_net_worker *w)
{
	struct pv_impair *im = impair_way(w, RX);
	const struct iovec iov = {.iov_base = w->held.scratch, .iov_len = w->held.len};
	const struct pv_impair_frame f = {
		.iov = &iov, .len = w->held.len, .hdr_len = w->cfg.hdr_len};
	uint32_t deeds;
	bool taken;

	if (!im || w->held.direct)
		return false;
	taken = pv_impair_take(im, RX, &f, false, pv_now_ns(), &deeds);
	trace_deeds(w, RX, f.len, deeds);
	if (taken)
		held_clear(&w->held);
	return taken;
}

/*
 * Hold a frame, one that has waited or one that is read from fd. With PV_MORE, held.len is 0 if it
 * is to be forgotten. PV_DONE: there is none, or nobody to give it to.
 */
static enum pv_step rx_next(struct pv_net_worker *w, uint32_t *packets)
{
	ssize_t n;

	if (rx_fill(w, w->cfg.max_frame) == PV_BAD)
		return PV_BAD;
	if (!window_chains(&w->window)) {
		w->rx_waiting = true;
		add(&w->count.rx_waits, 1);
		return PV_DONE;
	}
	if (rx_late(w)) {
		++*packets;
		return PV_MORE;
	}
	n = rx_read(w);
	if (n <= 0) {
		if (n < 0 && errno == EINTR)
			return PV_MORE;
		if (n < 0 && errno == EFAULT) {
			/* The host has no page for the guest's buffer; the frame is lost. */
			++*packets;
			add(&w->count.rx_drop_error, 1);
			return PV_MORE;
		}
		if (n < 0 && errno == EAGAIN)
			w->rx_ready = false;
		else
			fd_gone(w);
		return PV_DONE;
	}
	++*packets;
	if ((size_t)n < w->cfg.hdr_len) {
		add(&w->count.rx_drop_short, 1);
		return PV_MORE;
	}
	w->held.len = (size_t)n;
	(void)rx_impair(w);
	return PV_MORE;
}

/* Receive: from fd to the guest. Returns whether more may be waiting. */
static bool rx_turn(struct pv_net_worker *w)
{
	uint32_t packets = 0, bytes = 0, batch_packets = 0, batch_bytes = 0;
	bool more = true;

	while (packets < w->turn && bytes < TURN_BYTES) {
		size_t len;

		if (!w->held.len) {
			enum pv_step step = rx_next(w, &packets);

			if (step == PV_BAD)
				return false;
			if (step == PV_DONE) {
				more = false;
				break;
			}
			if (!w->held.len)
				continue;
		}
		len = w->held.len;
		if (!rx_place(w)) {
			if (w->ring[RX].fault)
				return false;
			if (w->held.len) {
				more = false;
				break;
			}
			continue;
		}
		bytes += (uint32_t)len;
		batch_bytes += (uint32_t)len;
		if (++batch_packets >= w->batch || batch_bytes >= BATCH_BYTES) {
			flush(w, RX);
			batch_packets = batch_bytes = 0;
		}
	}
	flush(w, RX);
	return more;
}

/* Whether a chain is none that can be transmitted. */
static bool tx_bad(const struct pv_net_worker *w, const struct pv_chain *c)
{
	return c->in_num || c->out_len < w->cfg.hdr_len;
}

/* Take a chain to transmit. With PV_BAD, ring_fault() has not been called yet. */
static enum pv_step tx_take(struct pv_net_worker *w, struct iovec *iov, struct pv_chain *c)
{
	struct pv_vring *vr = &w->ring[TX];
	enum pv_step step = pv_vring_pop(vr, iov, PV_CHAIN_MAX, c);

	if (step == PV_MORE && tx_bad(w, c)) {
		pv_vring_unpop(vr, c->slots);
		vr->fault = c->in_num ? PV_FAULT_DIRECTION : PV_FAULT_SHORT;
		step = PV_BAD;
	}
	return step;
}

/* So many packets were sent in a turn that began at this time, in microseconds. */
static void tx_note_burst(struct pv_net_worker *w, uint32_t packets, uint32_t bytes, uint64_t begun)
{
	if (packets && !w->burst.packets)
		w->burst.gap_us = begun - w->burst.idle_since;
	w->burst.packets += packets;
	w->burst.bytes += bytes;
}

/* A packet has left the transmit ring: count it, and show it to the captures if there are any. */
static void tx_count(struct pv_net_worker *w, const struct iovec *iov, size_t len,
		     uint64_t captured)
{
	add(&w->count.tx_packets, 1);
	add(&w->count.tx_bytes, len - w->cfg.hdr_len);
	if (w->cfg.cable) /* no offload is negotiated, and the header may be in a line of its own */
		add(&w->count.tx_csum_none, 1);
	else
		tx_count_header(w, iov, len - w->cfg.hdr_len);
	if (captured)
		capture(w, TX, captured, iov, len);
}

/* What became of a packet for fd. */
enum sent {
	SENT_DROPPED, /* counted */
	SENT,
	SENT_NOT_YET /* fd takes no more */
};

/* Write a packet to fd. */
static enum sent tx_write(struct pv_net_worker *w, const struct iovec *iov, int segments)
{
	ssize_t n;

	do {
		n = writev(w->cfg.fd, iov, segments);
		add(&w->count.fd_writes, 1);
	} while (n < 0 && errno == EINTR);
	if (n >= 0) {
		if (w->inflight[TX].taken != PV_INFLIGHT_UNCOUNTED)
			w->inflight[TX].taken++;
		return SENT;
	}
	if (errno == EAGAIN) {
		w->tx_blocked = true;
		add(&w->count.tx_blocks, 1);
		return SENT_NOT_YET;
	}
	if (errno == EBADFD || errno == EPIPE || errno == ECONNRESET || errno == ENOTCONN ||
	    errno == ECONNREFUSED) {
		fd_gone(w);
		add(&w->count.tx_drop_link, 1);
	} else {
		add(&w->count.tx_drop_error, 1);
	}
	return SENT_DROPPED;
}

/*
 * Decide about a frame of the guest's, once. Returns whether it waits or is lost: for the guest, it
 * has been sent.
 */
static bool tx_impair(struct pv_net_worker *w, struct pv_impair *im, const struct iovec *iov,
		      size_t len)
{
	const struct pv_impair_frame f = {.iov = iov, .len = len, .hdr_len = w->cfg.hdr_len};
	uint32_t deeds;
	bool taken;

	if (pv_impair_passing(im, TX))
		return false;
	taken = pv_impair_take(im, TX, &f, false, pv_now_ns(), &deeds);
	trace_deeds(w, TX, len, deeds);
	if (taken)
		tx_count(w, iov, len, capture_time(w));
	return taken;
}

/*
 * The chain at hand is done with: give it back, and what was to come behind it, or have it wait.
 * The next is to be decided about.
 */
static void tx_done(struct pv_net_worker *w, const struct pv_chain *c, bool back)
{
	struct pv_inflight *in = &w->inflight[TX];
	struct pv_impair *im = impair_of(w);
	uint16_t head[2] = {c->head, w->back[TX].done[0].head};
	uint32_t n = w->back[TX].count ? 2 : 1;

	if (im)
		pv_impair_set_passing(im, TX, false);
	if (back) {
		back_add(w, TX, c->head, c->slots, 0);
		return;
	}
	push(w, TX, c->head, c->slots, 0);
	back_push(w, TX, PV_DEED_REORDER_USED);
	if (in->region)
		pv_inflight_end(in, head, n);
}

/* Put a frame that has waited into the cable. Returns whether there was room. */
static bool cable_put_late(struct pv_net_worker *w, const struct pv_impair_due *due)
{
	uint32_t len = due->len - due->hdr_len;
	uint8_t *to;

	if (len > PV_CABLE_FRAME_MAX) {
		add(&w->count.tx_drop_error, 1);
		return true;
	}
	to = pv_frames_put(w->cfg.cable->out, len);
	if (!to) {
		w->tx_blocked = true;
		add(&w->count.tx_blocks, 1);
		return false;
	}
	pv_segments_load(due->iov, due->hdr_len, to, len);
	return true;
}

/* Send the guest's frames that have waited and whose time has come. */
static void tx_late(struct pv_net_worker *w)
{
	struct pv_impair *im = impair_of(w);
	struct pv_impair_due due;
	uint64_t now;

	if (!im || !late_possible(w) || pv_impair_next(im, TX) == UINT64_MAX)
		return;
	now = pv_now_ns();
	for (uint32_t n = 0; n < TURN_PACKETS && pv_impair_due(im, TX, now, &due); n++) {
		if (w->link_down)
			add(&w->count.tx_drop_link, 1);
		else if (w->cfg.cable ? !cable_put_late(w, &due)
				      : tx_write(w, due.iov, (int)due.niov) == SENT_NOT_YET)
			break;
		pv_impair_sent(im, TX);
	}
	if (w->cfg.cable && pv_frames_publish(w->cfg.cable->out))
		pv_cable_ring(w->cfg.cable);
}

/* Transmit: from the guest to fd. Returns whether more may be waiting. */
static bool tx_turn(struct pv_net_worker *w)
{
	struct pv_impair *im = impair_way(w, TX);
	struct pv_vring *vr = &w->ring[TX];
	uint32_t packets = 0, bytes = 0, batch_packets = 0, batch_bytes = 0;
	uint64_t begun = w->burst.packets ? 0 : now_us();
	bool more = true;

	while (packets < w->turn && bytes < TURN_BYTES) {
		struct pv_chain c;
		uint64_t sent_at = 0, captured = 0;
		uint16_t at = vr->last_avail;
		enum pv_step step = tx_take(w, w->tx_iov, &c);
		enum sent sent = SENT_DROPPED;
		uint32_t n;
		bool back;

		if (step == PV_DONE) {
			more = false;
			break;
		}
		if (step == PV_BAD) {
			ring_fault(w, TX, vr->fault);
			return false;
		}
		pv_vring_disable_notify(vr);
		if (w->cfg.trace)
			sent_at = pv_now_ns();
		if (w->link_down) {
			add(&w->count.tx_drop_link, 1);
		} else if (im && tx_impair(w, im, w->tx_iov, c.out_len)) {
			sent = SENT;
		} else if (w->inflight[TX].region && pv_inflight_begin(&w->inflight[TX], &c)) {
			add(&w->count.tx_in_doubt, 1);
		} else {
			captured = capture_time(w);
			sent = tx_write(w, w->tx_iov, c.out_num);
			if (sent == SENT_NOT_YET) {
				pv_vring_unpop(vr, c.slots);
				if (im)
					pv_impair_set_passing(im, TX, true);
				if (w->inflight[TX].region)
					pv_inflight_cancel(&w->inflight[TX], &c);
				more = false;
				break;
			}
			if (sent == SENT)
				tx_count(w, w->tx_iov, c.out_len, captured);
		}
		back = back_begins(w, TX, 1, c.out_len);
		if (w->cfg.trace)
			trace_packet(w, TX, w->tx_iov, c.out_num, c.out_len, c.head, at, sent_at,
				     pv_now_ns(), sent == SENT, back);
		tx_done(w, &c, back);
		packets++;
		/* A frame longer than 64 KiB was refused, but counts as work. */
		n = c.out_len < TURN_BYTES ? (uint32_t)c.out_len : TURN_BYTES;
		bytes += n;
		batch_bytes += n;
		if (++batch_packets >= w->batch || batch_bytes >= BATCH_BYTES) {
			flush(w, TX);
			batch_packets = batch_bytes = 0;
		}
		if (!im)
			continue;
		tx_late(w); /* what goes behind this frame */
		if (w->tx_blocked) {
			more = false;
			break;
		}
	}
	flush(w, TX);
	tx_note_burst(w, packets, bytes, begun);
	return more;
}

/* --- cable ------------------------------------------------------------------------------------ */

/*
 * Take a burst of transmit chains, at most max. Returns how many there are; more is false if they
 * are all. If the ring is malformed behind them, its fault is set.
 */
static uint32_t cable_tx_take(struct pv_net_worker *w, uint32_t max, bool *more)
{
	uint32_t n = 0, segments;

	if (!w->cfg.trace) /* which wants each chain's place */
		n = pv_vring_pop_burst(&w->ring[TX], w->tx_iov, w->tx_chain, max);
	for (uint32_t i = 0; i < n; i++) {
		if (tx_bad(w, &w->tx_chain[i])) { /* tx_take() takes it again, and tells */
			pv_vring_unpop(&w->ring[TX], n - i);
			n = i;
			break;
		}
		__builtin_prefetch((const uint8_t *)w->tx_iov[i].iov_base + w->cfg.hdr_len);
	}
	segments = n;
	while (n < max && segments <= BURST_IOV - PV_CHAIN_MAX) {
		struct iovec *iov = &w->tx_iov[segments];

		w->tx_at[n] = w->ring[TX].last_avail;
		if (tx_take(w, iov, &w->tx_chain[n]) != PV_MORE) {
			*more = false;
			break;
		}
		__builtin_prefetch((const uint8_t *)iov->iov_base + w->cfg.hdr_len);
		segments += w->tx_chain[n++].out_num;
	}
	return n;
}

/*
 * Send the frames of up to n chains of one segment each, of which nothing but their number is to be
 * known: the usual case of what cable_send() does. All are copied before the first chain is given
 * back, as in cable_place_burst(). Returns how many there were, and adds their bytes.
 */
static uint32_t cable_send_burst(struct pv_net_worker *w, uint32_t n, uint32_t *bytes)
{
	struct pv_frames *out = w->cfg.cable->out;
	const uint32_t hdr_len = (uint32_t)w->cfg.hdr_len;
	struct pv_done done[BURST];
	uint32_t i, sum = 0;

	if (w->cfg.trace || w->inflight[TX].region || capture_time(w) || impair_of(w))
		return 0;
	for (i = 0; i < n; i++) {
		const struct pv_chain *c = &w->tx_chain[i];
		uint32_t len = (uint32_t)w->tx_iov[i].iov_len - hdr_len;
		uint8_t *to;

		if (c->out_num != 1 || len > PV_CABLE_FRAME_MAX)
			break;
		to = pv_frames_put(out, len);
		if (!to)
			break;
		memcpy(to, (const uint8_t *)w->tx_iov[i].iov_base + hdr_len, len);
		done[i] = (struct pv_done){.head = c->head, .slots = c->slots};
		sum += len;
	}
	pv_vring_push_burst(&w->ring[TX], done, i);
	add(&w->count.tx_packets, i);
	add(&w->count.tx_bytes, sum);
	add(&w->count.tx_csum_none, i);
	*bytes += sum + i * hdr_len;
	return i;
}

/* Send the frame of a chain. Returns whether there was room for it, or it needs none. */
static bool cable_send(struct pv_net_worker *w, const struct iovec *iov, const struct pv_chain *c,
		       uint16_t at)
{
	uint64_t len = c->out_len - w->cfg.hdr_len, begin = w->cfg.trace ? pv_now_ns() : 0;
	struct pv_inflight *in = &w->inflight[TX];
	struct pv_frames *out = w->cfg.cable->out;
	struct pv_impair *im = impair_way(w, TX);
	uint64_t captured;
	uint8_t *to = NULL;
	bool moved = false, back;

	if (len > PV_CABLE_FRAME_MAX) {
		add(&w->count.tx_drop_error, 1);
	} else if (im && tx_impair(w, im, iov, c->out_len)) {
		moved = true;
	} else if (in->region && pv_frames_room(out, (uint32_t)len) && pv_inflight_begin(in, c)) {
		add(&w->count.tx_in_doubt, 1);
	} else {
		to = pv_frames_put(out, (uint32_t)len);
		if (!to) {
			if (im)
				pv_impair_set_passing(im, TX, true);
			return false;
		}
		if (iov->iov_len >= c->out_len)
			memcpy(to, (const uint8_t *)iov->iov_base + w->cfg.hdr_len, (size_t)len);
		else
			pv_segments_load(iov, w->cfg.hdr_len, to, (size_t)len);
		captured = capture_time(w);
		tx_count(w, iov, c->out_len, captured);
		moved = true;
	}
	back = back_begins(w, TX, 1, c->out_len);
	if (w->cfg.trace)
		trace_packet(w, TX, iov, c->out_num, c->out_len, c->head, at, begin, pv_now_ns(),
			     moved, back);
	tx_done(w, c, back);
	if (im)
		tx_late(w); /* what goes behind this frame */
	return true;
}

/* Transmit: from the guest to the cable. Returns whether more may be waiting. */
static bool cable_tx_turn(struct pv_net_worker *w)
{
	struct pv_vring *vr = &w->ring[TX];
	uint64_t begun = w->burst.packets ? 0 : now_us();
	uint32_t packets = 0, bytes = 0;
	bool more = true;

	while (more && packets < w->turn && bytes < TURN_BYTES) {
		const struct iovec *iov = w->tx_iov;
		uint32_t max = w->turn - packets < BURST ? w->turn - packets : BURST;
		uint32_t n = cable_tx_take(w, max, &more), i;

		if (n)
			pv_vring_disable_notify(vr);
		pv_vring_fetch(vr, n);
		/* No frame goes before one that has waited and found no room. */
		i = w->tx_blocked ? 0 : cable_send_burst(w, n, &bytes);
		for (iov += i; i < n && !w->tx_blocked; i++) {
			uint64_t len = w->tx_chain[i].out_len;

			if (!cable_send(w, iov, &w->tx_chain[i], w->tx_at[i]))
				break;
			bytes += len < TURN_BYTES ? (uint32_t)len : TURN_BYTES;
			iov += w->tx_chain[i].out_num;
		}
		packets += i;
		if (i < n) {
			/* What was malformed behind these is found again. */
			vr->fault = PV_FAULT_NONE;
			for (; i < n; i++)
				pv_vring_unpop(vr, w->tx_chain[i].slots);
			if (!w->tx_blocked) {
				w->tx_blocked = true;
				add(&w->count.tx_blocks, 1);
			}
		}
		if (w->tx_blocked)
			more = false;
		if (pv_frames_publish(w->cfg.cable->out))
			pv_cable_ring(w->cfg.cable);
		flush(w, TX);
		if (vr->fault) {
			ring_fault(w, TX, vr->fault);
			break;
		}
	}
	tx_note_burst(w, packets, bytes, begun);
	return more;
}

/*
 * Place up to max frames of the cable, each of which fits the first buffer of its chain: the usual
 * case of what cable_place() does. All frames are copied before the first chain is pushed, because
 * a processor has room for few stores that wait for lines of another core: with nothing in between,
 * it waits for many lines at once. Returns how many there were, and adds their bytes.
 */
static uint32_t cable_place_burst(struct pv_net_worker *w, uint32_t max, uint32_t *bytes)
{
	static const uint8_t header[V1_HDR] = {[LEGACY_HDR] = 1}; /* num_buffers */
	struct pv_frames *in = w->cfg.cable->in;
	struct window *win = &w->window;
	const struct slot *s = &win->slot[win->slot_at];
	const struct iovec *iov = window_iov(win);
	struct pv_done done[BURST];
	uint32_t n, len, sum = 0, slots = 0;
	size_t room = 0;

	if (w->cfg.hdr_len != V1_HDR || w->cfg.trace || w->log.bits || capture_time(w) || w->late ||
	    impair_of(w))
		return 0;
	if (max > window_chains(win))
		max = window_chains(win);
	for (n = 0; n < max && n < BURST; n++) {
		const uint8_t *frame = pv_frames_peek(in, &len);

		if (!frame || V1_HDR + len > iov->iov_len)
			break;
		/*
		 * A buffer that went round has this header already. A store would take its line
		 * from the front-end's core, and back, for each frame.
		 */
		if (memcmp(iov->iov_base, header, V1_HDR))
			memcpy(iov->iov_base, header, V1_HDR);
		memcpy((uint8_t *)iov->iov_base + V1_HDR, frame, len);
		pv_frames_take(in, len);
		done[n] = (struct pv_done){
			.head = s[n].head, .slots = s[n].slots, .len = V1_HDR + len};
		iov += s[n].niov;
		sum += len;
		slots += s[n].slots;
		room += s[n].len;
	}
	push_burst(w, RX, done, n);
	win->slot_at += n;
	win->iov_at = (uint32_t)(iov - win->iov);
	win->bytes -= room;
	win->slots -= slots;
	add(&w->count.rx_packets, n);
	add(&w->count.rx_bytes, sum);
	add(&w->count.rx_csum_none, n);
	*bytes += sum;
	return n;
}

/*
 * Place a frame of the cable in the guest's buffers. False if the guest lacks the buffers: the
 * frame has to wait (held.since), is to be dropped because waiting would be in vain, or the ring is
 * malformed.
 */
static bool cable_place(struct pv_net_worker *w, const uint8_t *frame, uint32_t len)
{
	static const uint8_t header[TUNNEL_HDR];
	struct window *win = &w->window;
	struct held *held = &w->held;
	const struct slot *s = &win->slot[win->slot_at];
	uint32_t need = w->cfg.hdr_len + len;

	if (w->cfg.mrg_rxbuf && win->bytes < need) {
		enum pv_step step = rx_fill(w, need);

		if (step == PV_BAD)
			return false;
		if (step == PV_DONE && win->bytes < need && win->slots < w->ring[RX].size) {
			if (!held->since)
				held->since = now_us();
			w->rx_waiting = true;
			return false;
		}
	}
	if ((w->cfg.mrg_rxbuf ? win->bytes : s->len) < need) {
		add(&w->count.rx_drop_long, 1);
		held_clear(held);
		return false;
	}
	held->read_at = held->read_end = w->cfg.trace ? pv_now_ns() : 0;
	/* Nothing of another guest's header comes through. */
	window_store(win, 0, header, w->cfg.hdr_len);
	window_store(win, w->cfg.hdr_len, frame, len);
	rx_hand_over(w, need);
	return true;
}

/* Have the processor take the first line of a buffer, and the one that a frame begins in. */
static void fetch_buffer(const struct pv_net_worker *w, const uint8_t *at)
{
	__builtin_prefetch(at);
	pv_fetch_to_write(at + w->cfg.hdr_len);
}

/* Take receive chains of a single buffer each into the empty window. */
static void cable_fill_burst(struct pv_net_worker *w)
{
	struct pv_vring *vr = &w->ring[RX];
	struct window *win = &w->window;
	struct pv_chain chain[BURST];
	uint32_t n;

	if (w->cfg.trace) /* which wants each chain's place */
		return;
	n = pv_vring_pop_burst(vr, win->iov, chain, BURST);
	for (uint32_t i = 0; i < n; i++) {
		if (rx_bad(w, &chain[i])) { /* rx_take() takes it again, and tells */
			pv_vring_unpop(vr, n - i);
			break;
		}
		fetch_buffer(w, win->iov[i].iov_base);
		window_add(win, &chain[i], 0);
	}
}

/* Take receive chains ahead, if there are none. Returns whether the ring is well. */
static bool cable_fill(struct pv_net_worker *w)
{
	struct window *win = &w->window;

	if (window_chains(win))
		return true;
	window_clear(win);
	cable_fill_burst(w);
	while (win->slot_end < BURST && win->iov_end < READV_MAX) {
		enum pv_step step = rx_take(w);

		if (step == PV_DONE)
			break;
		if (step == PV_BAD)
			return false;
		fetch_buffer(w, win->iov[win->iov_end - 1].iov_base);
	}
	pv_vring_fetch(&w->ring[RX], win->slot_end);
	return true;
}

/* Give back what was read from the cable, and let the guest see what it got. */
static void cable_flush(struct pv_net_worker *w)
{
	if (pv_frames_release(w->cfg.cable->in))
		pv_cable_ring(w->cfg.cable);
	flush(w, RX);
}

/*
 * The frame of the cable that is to be placed next, which stays there until cable_took(). NULL:
 * there is none.
 */
static const uint8_t *cable_next(struct pv_net_worker *w, uint32_t *len)
{
	struct pv_impair *im = impair_way(w, RX);
	struct pv_frames *in = w->cfg.cable->in;
	struct pv_impair_due due;
	uint32_t deeds;

	w->late = false;
	if (!im)
		return pv_frames_peek(in, len);
	for (uint32_t n = 0; n < TURN_PACKETS; n++) {
		const uint8_t *frame;
		struct iovec iov;
		bool taken;

		w->late = pv_impair_due(im, RX, pv_now_ns(), &due);
		if (w->late) {
			pv_segments_load(due.iov, 0, w->held.scratch, due.len);
			*len = due.len;
			return w->held.scratch;
		}
		frame = pv_frames_peek(in, len);
		if (!frame)
			return NULL;
		iov = (struct iovec){.iov_base = (void *)(uintptr_t)frame, .iov_len = *len};
		/* It waits in any case, so that it is decided about only once. */
		taken = pv_impair_take(im, RX, &(struct pv_impair_frame){.iov = &iov, .len = *len},
				       true, pv_now_ns(), &deeds);
		trace_deeds(w, RX, *len, deeds);
		if (!taken)
			return frame;
		pv_frames_take(in, *len);
	}
	return NULL;
}

/* The frame of cable_next() was placed, or is to be forgotten. */
static void cable_took(struct pv_net_worker *w, uint32_t len)
{
	if (w->late)
		pv_impair_sent(impair_of(w), RX);
	else
		pv_frames_take(w->cfg.cable->in, len);
	w->late = false;
}

/* Receive: from the cable to the guest. Returns whether more may be waiting. */
static bool cable_rx_turn(struct pv_net_worker *w)
{
	uint32_t packets = 0, bytes = 0, len;
	bool more = true;

	while (packets < w->turn && bytes < TURN_BYTES) {
		const uint8_t *frame = cable_next(w, &len);
		uint32_t n;

		if (!frame) {
			w->rx_ready = more = false;
			break;
		}
		if (!cable_fill(w)) {
			more = false;
			break;
		}
		if (!window_chains(&w->window)) {
			w->rx_waiting = true;
			add(&w->count.rx_waits, 1);
			more = false;
			break;
		}
		n = cable_place_burst(w, w->turn - packets, &bytes);
		packets += n;
		if (n)
			continue;
		if (!cable_place(w, frame, len) && (w->ring[RX].fault || w->rx_waiting)) {
			more = false;
			break;
		}
		cable_took(w, len);
		bytes += len;
		packets++;
	}
	cable_flush(w);
	return more;
}

/* See what the other end of the cable has done. */
static void cable_look(struct pv_net_worker *w)
{
	w->rx_ready = pv_frames_pending(w->cfg.cable->in);
	if (w->tx_blocked && pv_frames_again(w->cfg.cable->out))
		w->tx_blocked = false;
}

/* Begin a round: the processor has fetched the receive buffers when the frames are there. */
static void cable_begin(struct pv_net_worker *w)
{
	cable_look(w);
	if (rx_possible(w) && !w->rx_waiting)
		(void)cable_fill(w);
}

/* Before a sleep: ask the other end for its bell. Returns whether there is something to do. */
static bool cable_want(struct pv_net_worker *w)
{
	const struct pv_cable_end *end = w->cfg.cable;
	bool rx = rx_possible(w) && !w->rx_waiting, found;

	if (end->loop)
		return (rx && pv_frames_pending(end->in)) ||
		       (w->tx_blocked && pv_frames_again(end->out));
	found = rx && pv_frames_want(end->in);
	return (w->tx_blocked && pv_frames_want_room(end->out)) || found;
}

/* The guest has added buffers, or it makes no sense to wait for them any more. */
static void rx_resume(struct pv_net_worker *w)
{
	pv_vring_disable_notify(&w->ring[RX]);
	w->rx_waiting = w->fd_muted = false;
}

/* Do what has waited on purpose, and whose time has come. */
static void impair_round(struct pv_net_worker *w)
{
	uint64_t now = impair_at(w) != UINT64_MAX ? pv_now_ns() : 0;

	for (int q = RX; q <= TX; q++) {
		if (w->held_irq[q] && now >= w->held_irq[q]) {
			w->held_irq[q] = 0;
			interrupt(w, &w->cfg.ring[q]);
			add(q == RX ? &w->count.rx_calls : &w->count.tx_calls, 1);
		}
		if (w->held_kick[q] && now >= w->held_kick[q]) {
			w->held_kick[q] = 0;
			w->owed |= q == TX;
		}
		if (w->back[q].count && now >= w->back[q].due)
			back_ends(w, q);
	}
	tx_late(w);
}

/* Whether a frame for the guest has waited for long enough. */
static bool rx_is_due(const struct pv_net_worker *w)
{
	const struct pv_impair *im = impair_of(w);
	uint64_t next = im ? pv_impair_next(im, RX) : UINT64_MAX;

	return next != UINT64_MAX && next <= pv_now_ns();
}

/* Give each direction a turn; a vCPU that kicks only transmits. Returns whether there is more. */
static bool net_round(struct pv_net_worker *w)
{
	bool more = false;

	/* Only here is it certain that no chain is in our hands. Acquire: answer_fd is there. */
	if (__atomic_load_n(&w->hold, __ATOMIC_ACQUIRE) == HOLD_ASKED) {
		back_ends(w, TX);
		__atomic_store_n(&w->hold, HOLD_DONE, __ATOMIC_RELEASE);
		pv_event_signal(w->answer_fd);
	}
	(void)decide_delayed(w);
	if (w->cfg.cable)
		cable_begin(w);
	if (impair_of(w)) /* with new room in the cable, what has waited goes first */
		impair_round(w);
	if (w->log.marked)
		tell_log(w);
	if (tx_possible(w) && w->owed)
		more = w->cfg.cable ? cable_tx_turn(w) : tx_turn(w);
	if (w->by_kicker)
		return more;
	if (w->cfg.cable)
		cable_look(w); /* a loop has frames now */
	else if (more)
		w->rx_ready = true; /* while we are busy, nobody polls fd for us */
	if (w->rx_waiting && rx_possible(w) && !w->held_kick[RX] && pv_vring_pending(&w->ring[RX]))
		rx_resume(w);
	if (rx_possible(w) && !w->rx_waiting && (w->rx_ready || w->held.len || rx_is_due(w)))
		more |= w->cfg.cable ? cable_rx_turn(w) : rx_turn(w);
	return more;
}

/* Tell epoll what we want of fd, where that changed. */
static int set_interest(struct pv_net_worker *w)
{
	/*
	 * EPOLLPRI never comes true for a tap. But a tap that is deleted wakes its pollers with a
	 * key of EPOLLIN and EPOLLPRI (sock_def_readable), and epoll asks it for EPOLLERR only if
	 * we want one of them: also when muted.
	 */
	struct epoll_event ev = {.events = EPOLLET | EPOLLPRI, .data.u32 = EV_FD};

	if (w->link_down || w->cfg.cable)
		return 0;
	if (!w->fd_muted && !w->ring[RX].fault)
		ev.events |= EPOLLIN;
	if (w->tx_blocked)
		ev.events |= EPOLLOUT;
	if (ev.events == w->interest)
		return 0;
	w->interest = ev.events;
	/* Reports at once what is ready already, so no edge is lost between the EAGAIN and here. */
	return epoll_ctl(w->epoll_fd, EPOLL_CTL_MOD, w->cfg.fd, &ev);
}

/*
 * Let vCPUs transmit, while the thread has nothing in its hands; or no more. A mutex goes to
 * whoever comes first, and a thread that unlocks and soon locks again comes before one that has to
 * wake up. So the thread, and a vCPU that has to wait, go through a gate, and keep the other there
 * until they have the lock.
 */
static void let_kickers(struct pv_net_worker *w, bool let)
{
	if (!w->cfg.in_exit)
		return;
	if (let) {
		pthread_mutex_unlock(&w->lock);
		return;
	}
	pthread_mutex_lock(&w->gate);
	pthread_mutex_lock(&w->lock);
	pthread_mutex_unlock(&w->gate);
}

/* Wait for events for up to timeout microseconds (negative: for ever) and note them. */
static int net_poll(struct pv_net_worker *w, int64_t timeout)
{
	struct timespec ts = {.tv_sec = timeout / 1000000, .tv_nsec = timeout % 1000000 * 1000};
	struct epoll_event evs[4];
	int n;

	if (w->log.marked)
		tell_log(w);
	let_kickers(w, true);
	/* glibc has a function for this since 2.35: a wheel with its symbol would need that one. */
	n = (int)syscall(SYS_epoll_pwait2, w->epoll_fd, evs, 4, timeout < 0 ? NULL : &ts, NULL, 0);
	let_kickers(w, false);
	if (n < 0)
		return errno == EINTR ? 0 : -1;
	unwatch_gone(w);
	if (w->cfg.trace && n)
		trace_event(w, PV_TRACE_NONE, 0, 0, false);
	for (int i = 0; i < n; i++) {
		uint32_t e = evs[i].events;

		switch (evs[i].data.u32) {
		case EV_RX_KICK:
			add(&w->count.rx_kicks, 1);
			if (w->cfg.trace)
				trace_event(w, PV_TRACE_KICK, RX, 1, false);
			(void)impair_kick(w, RX);
			break;
		case EV_TX_KICK:
			w->owed = true;
			add(&w->count.tx_kicks, 1);
			if (w->cfg.trace)
				trace_event(w, PV_TRACE_KICK, TX, 1, false);
			(void)impair_kick(w, TX);
			break;
		case EV_FD:
			if (w->cfg.cable) /* its bell: the next round looks */
				break;
			/* What is left to read comes first; the read behind it finds the end. */
			if (e & (EPOLLERR | EPOLLHUP) &&
			    !(e & EPOLLIN && rx_possible(w) && !w->rx_waiting))
				fd_gone(w);
			if (e & EPOLLOUT) {
				w->tx_blocked = false;
				w->owed = true;
			}
			if (e & EPOLLIN) {
				w->rx_ready = true;
				/* Frames that we cannot take: no wake-up for each of them. */
				w->fd_muted = w->rx_waiting;
			}
			break;
		case EV_WAKE:
			if (woken(w))
				return -1;
			break;
		}
	}
	return 0;
}

/* Microseconds that the held frame may still wait for buffers; 0: its time is over. */
static uint64_t hold_left(const struct pv_net_worker *w)
{
	uint64_t all = (uint64_t)w->cfg.hold_ms * 1000, waited = now_us() - w->held.since;

	return waited < all ? all - waited : 0;
}

/* The frame that waits for buffers has waited for too long. */
static void rx_give_up(struct pv_net_worker *w)
{
	uint32_t len = 0;

	add(&w->count.rx_drop_held, 1);
	held_clear(&w->held);
	if (w->cfg.cable && (w->late || pv_frames_peek(w->cfg.cable->in, &len))) {
		cable_took(w, len);
		cable_flush(w); /* the other end may wait for this room */
	}
	rx_resume(w);
}

/* Whether a round would move something, as far as the rings and the cable tell. */
static bool cable_work(struct pv_net_worker *w)
{
	cable_look(w);
	if (tx_possible(w) && pv_vring_pending(&w->ring[TX]))
		return true;
	if (!rx_possible(w))
		return false;
	if (w->rx_waiting)
		return !w->held_kick[RX] && pv_vring_pending(&w->ring[RX]);
	return w->rx_ready || rx_is_due(w);
}

/*
 * Look for work until us microseconds have passed. There is no descriptor to ask, and what other
 * threads want is in memory, so this makes no system call, but for one: if the worker at the other
 * end of the cable shares this processor, it can do nothing while we look.
 */
static bool cable_spin(struct pv_net_worker *w, uint32_t us)
{
	uint64_t end = now_us() + us;

	do {
		for (uint32_t i = 0; i < CABLE_LOOK; i++) {
			if (stopping(w) || cable_work(w) ||
			    __atomic_load_n(&w->hold, __ATOMIC_RELAXED) == HOLD_ASKED)
				return true;
			__builtin_ia32_pause();
		}
		if (!time_left(w))
			return true;
		if (w->log.marked)
			tell_log(w);
		if (w->held.since && !hold_left(w)) {
			rx_give_up(w);
			return true;
		}
		if (!w->cfg.cable->loop)
			sched_yield();
	} while (now_us() < end);
	return false;
}

/* On a cable, before a sleep: poll as long as is configured, else a while after there was work. */
static bool cable_wait(struct pv_net_worker *w)
{
	uint32_t us = w->cfg.poll_us;

	if (!us && w->burst.packets && !w->cfg.unbatched)
		us = CABLE_US;
	w->burst.packets = w->burst.bytes = 0;
	w->burst.idle_since = now_us();
	return us && cable_spin(w, us);
}

/* Look for work until poll_us have passed. Returns whether there is some; -1: epoll failed. */
static int spin(struct pv_net_worker *w)
{
	uint64_t end = now_us() + w->cfg.poll_us;

	if (set_interest(w))
		return -1;
	do {
		if (net_poll(w, 0))
			return -1;
		if (stopping(w) || (tx_possible(w) && pv_vring_pending(&w->ring[TX])))
			return 1;
		if (!time_left(w))
			return 1;
		if (!rx_possible(w))
			continue;
		if (w->rx_waiting && !w->held_kick[RX] && pv_vring_pending(&w->ring[RX]))
			rx_resume(w);
		if (!w->rx_waiting && (w->rx_ready || w->held.len))
			return 1;
	} while (now_us() < end);
	return 0;
}

/*
 * After a burst of transmits, sleep a little before asking for kicks: a guest that is still sending
 * gets by without them, and its next packets come as one batch. Asking at once makes a quick worker
 * and a slow guest take turns: an exit and an interrupt for every packet or two.
 *
 * How long follows from how soon the latest burst came after the one before: twice that, or not at
 * all if it would be too long. Less while a sleep brings many, so that the guest does not wait for
 * us with a full window. A frame that arrives ends the sleep: who sends and then waits for the
 * answer loses nothing. Returns whether there is something to do; -1: epoll failed.
 */
static int linger(struct pv_net_worker *w)
{
	struct burst *b = &w->burst;
	uint32_t packets = b->packets, bytes = b->bytes;
	uint64_t max = bytes >= LINGER_BULK ? LINGER_BULK_US : LINGER_MAX_US, left;

	if (!packets)
		return 0;
	b->packets = b->bytes = 0;
	if (w->cfg.in_exit || w->cfg.unbatched)
		return 0;
	b->idle_since = now_us();
	if (!b->lingered)
		b->linger_us = b->gap_us <= max / 2 ? 2 * b->gap_us : 0;
	else if (packets >= 16 || bytes >= 8 * LINGER_BULK)
		b->linger_us /= 2;
	b->lingered = false;
	if (!b->linger_us)
		return 0;
	if (b->linger_us < LINGER_MIN_US)
		b->linger_us = LINGER_MIN_US;
	left = time_left(w);
	if (!left)
		return 1;
	if (set_interest(w) || net_poll(w, (int64_t)(left < b->linger_us ? left : b->linger_us)))
		return -1;
	b->lingered = pv_vring_pending(&w->ring[TX]);
	if (b->lingered)
		add(&w->count.tx_lingers, 1);
	return b->lingered || w->rx_ready || stopping(w);
}

/*
 * Stopped, with a frame that has been read but not placed: wait for the guest's buffers as
 * net_sleep() does. The frame's time starts anew: the guest could not know before that this is its
 * last chance.
 */
static void rx_finish(struct pv_net_worker *w)
{
	uint64_t left;

	w->held.since = now_us();
	while (w->held.len && rx_possible(w) && !rx_place(w)) {
		left = hold_left(w);
		if (!w->held.len || !left)
			break;
		if (pv_vring_enable_notify(&w->ring[RX]))
			continue;
		if (net_poll(w, (int64_t)left))
			break;
	}
	flush(w, RX);
}

/* Between two rounds of the textbook device: see what else has come. */
static int net_look(struct pv_net_worker *w)
{
	add(&w->count.wakeups, 1);
	return set_interest(w) || net_poll(w, 0) ? -1 : 0;
}

/* Sleep until there is something to do. */
static int net_sleep(struct pv_net_worker *w)
{
	int64_t timeout = -1;
	int found = 0;
	uint64_t left;

	if (w->cfg.cable)
		found = cable_wait(w);
	else if (w->cfg.poll_us)
		found = spin(w);
	else if (tx_possible(w))
		found = linger(w);
	if (found)
		return found < 0 ? -1 : 0;
	/* Spinning or lingering may have taken the wake-up that came with it. */
	if (__atomic_load_n(&w->hold, __ATOMIC_RELAXED) == HOLD_ASKED)
		return 0;
	if (tx_possible(w) && w->owed) {
		if (pv_vring_enable_notify(&w->ring[TX]))
			return 0;
		w->owed = !w->cfg.in_exit;
	}
	if (w->rx_waiting && rx_possible(w)) {
		if (!w->held_kick[RX] && pv_vring_enable_notify(&w->ring[RX])) {
			rx_resume(w);
			return 0;
		}
		if (w->held.since) {
			timeout = (int64_t)hold_left(w);
			if (!timeout) {
				rx_give_up(w);
				return 0;
			}
		}
	}
	if (w->cfg.cable && cable_want(w))
		return 0;
	left = time_left(w);
	if (!left)
		return 0;
	if (left != UINT64_MAX && (timeout < 0 || left < (uint64_t)timeout))
		timeout = (int64_t)left;
	if (set_interest(w) || net_poll(w, timeout))
		return -1;
	add(&w->count.wakeups, 1);
	return 0;
}

/* Have the lock; false if the thread does not let go of it in time. */
static bool lock_as_kicker(struct pv_net_worker *w)
{
	uint64_t end = pv_now_ns() + LOCK_MS * 1000000u;
	struct timespec until = {.tv_sec = (time_t)(end / 1000000000),
				 .tv_nsec = (long)(end % 1000000000)};
	bool got;

	if (!pthread_mutex_trylock(&w->lock))
		return true;
	if (pthread_mutex_clocklock(&w->gate, CLOCK_MONOTONIC, &until))
		return false;
	got = !pthread_mutex_clocklock(&w->lock, CLOCK_MONOTONIC, &until);
	pthread_mutex_unlock(&w->gate);
	return got;
}

/* A transmit kick, in the thread of the vCPU: see the theory of operation. */
static void take_kick(struct pv_taker *t)
{
	struct pv_net_worker *w = (struct pv_net_worker *)t;
	bool wake;

	if (!lock_as_kicker(w)) {
		pv_event_nudge(w->cfg.ring[TX].kick);
		return;
	}
	w->by_kicker = w->owed = true;
	w->turn = TURN_PACKETS;
	add(&w->count.tx_kicks, 1);
	if (w->cfg.trace) {
		trace_event(w, PV_TRACE_NONE, 0, 0, false);
		trace_event(w, PV_TRACE_KICK, TX, 1, false);
	}
	/* With a kick that is held, the thread transmits later. */
	w->owed = impair_kick(w, TX) || net_round(w) ||
		  (tx_possible(w) && pv_vring_enable_notify(&w->ring[TX]));
	/*
	 * For the thread to wait for the tap, or for the time of an interrupt or a frame, or to
	 * forget a tap that has gone.
	 */
	wake = w->owed || w->tx_blocked || w->delayed[TX].chains || impair_at(w) != UINT64_MAX ||
	       (w->link_down && w->fd_watched);
	w->turn = w->cfg.unbatched ? 1 : TURN_PACKETS;
	w->by_kicker = false;
	pthread_mutex_unlock(&w->lock);
	if (wake)
		pv_event_signal(w->wake_fd);
}

/**
 * pv_net_worker_new() - Prepare a worker
 * @cfg:	Copied; all descriptors in it are lent until pv_net_worker_free()
 * @mem:	Guest memory; must outlive the worker
 * @why:	Filled in on failure: PV_NET_RING_FAULT or PV_NET_ERROR
 *
 * Guest memory is read, not written, so that on failure the rings are as they were.
 *
 * Return: the worker, to be freed; NULL on failure
 */
struct pv_net_worker *pv_net_worker_new(const struct pv_net_config *cfg,
					const struct pv_memory *mem, struct pv_net_event *why)
{
	struct pv_net_worker *w = calloc(1, sizeof(*w));
	enum pv_fault fault;

	if (!w) {
		*why = (struct pv_net_event){.kind = PV_NET_ERROR, .error = ENOMEM};
		return NULL;
	}
	w->cfg = *cfg;
	w->cfg.name[sizeof(w->cfg.name) - 1] = 0;
	w->epoll_fd = w->wake_fd = w->answer_fd = -1;
	w->taker.take = take_kick;
	w->owed = true;
	w->turn = cfg->unbatched ? 1 : cfg->cable ? BURST : TURN_PACKETS;
	w->batch = cfg->unbatched ? 1 : BATCH_PACKETS;
	pthread_mutex_init(&w->lock, NULL);
	pthread_mutex_init(&w->gate, NULL);
	for (int q = RX; q <= TX; q++) {
		const struct pv_net_ring *r = &cfg->ring[q];

		if (!r->size) {
			w->ring[q].fault = PV_FAULT_SIZE;
			continue;
		}
		fault = pv_vring_init(&w->ring[q], mem, r->size, r->desc, r->avail, r->used,
				      r->base, cfg->format);

		if (fault) {
			*why = (struct pv_net_event){
				.kind = PV_NET_RING_FAULT, .queue = q, .fault = fault};
			pv_net_worker_free(w);
			return NULL;
		}
	}
	for (int q = RX; q <= TX; q++) {
		w->inflight[q].vr = &w->ring[q];
		w->inflight[q].taken = cfg->taken;
		if (cfg->ring[q].size)
			w->inflight[q].region = cfg->ring[q].inflight;
	}
	if (w->inflight[TX].region)
		pv_inflight_settle(&w->inflight[TX]);
	w->ring[TX].notify_stays = cfg->in_exit || cfg->unbatched;
	w->log = (struct pv_dirty_log){.bits = cfg->log, .size = cfg->log_size};
	w->attach = -1;
	w->rx_ready = true;
	w->interest = EPOLLIN | EPOLLET | EPOLLPRI;
	w->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	w->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (w->epoll_fd < 0 || w->wake_fd < 0 || watch(w, w->wake_fd, EV_WAKE, EPOLLIN) ||
	    (cfg->ring[RX].size && watch(w, cfg->ring[RX].kick, EV_RX_KICK, EPOLLIN | EPOLLET)) ||
	    (cfg->ring[TX].size && watch(w, cfg->ring[TX].kick, EV_TX_KICK, EPOLLIN | EPOLLET)) ||
	    watch(w, cfg->fd, EV_FD, w->interest)) {
		*why = (struct pv_net_event){.kind = PV_NET_ERROR, .error = errno};
		pv_net_worker_free(w);
		return NULL;
	}
	w->fd_watched = true;
	return w;
}

/**
 * pv_net_worker_free() - Release a worker
 * @w:		Without a thread: joined, or never started; may be NULL
 */
void pv_net_worker_free(struct pv_net_worker *w)
{
	if (!w)
		return;
	if (w->epoll_fd >= 0)
		close(w->epoll_fd);
	if (w->wake_fd >= 0)
		close(w->wake_fd);
	if (w->answer_fd >= 0)
		close(w->answer_fd);
	pthread_mutex_destroy(&w->gate);
	pthread_mutex_destroy(&w->lock);
	free(w);
}

/* What remains to the thread, beside what each such thread has: see the theory of operation. */
static const uint16_t calls[] = {
	SYS_epoll_pwait2, SYS_epoll_ctl, SYS_readv, SYS_writev, SYS_ppoll, SYS_clock_gettime,
};

/* The thread has made another call, as if somebody else were in control of it. */
static void stopped(void *arg, int call)
{
	report(arg, (struct pv_net_event){.kind = PV_NET_STOPPED, .error = call});
}

/* What it needs beside these to raise interrupts by an ioctl. */
static const uint16_t inject_calls[] = {SYS_ioctl};
/* And on a cable with two ends. */
static const uint16_t cable_calls[] = {SYS_sched_yield};

/* Confine the thread to its calls. */
static void confine(struct pv_net_worker *w)
{
	uint16_t all[(sizeof(calls) + sizeof(inject_calls) + sizeof(cable_calls)) /
		     sizeof(calls[0])];
	uint16_t *end = all;

	end = mempcpy(end, calls, sizeof(calls));
	if (w->cfg.ring[RX].inject || w->cfg.ring[TX].inject)
		end = mempcpy(end, inject_calls, sizeof(inject_calls));
	if (w->cfg.cable && !w->cfg.cable->loop)
		end = mempcpy(end, cable_calls, sizeof(cable_calls));
	pv_thread_confine(&w->thread, all, (size_t)(end - all), stopped);
}

/* Before the first round: what is pending is served then, kicked or not. */
static void serve_begin(struct pv_net_worker *w)
{
	/* Nanoseconds; by default 50 us, more than linger() means. */
	prctl(PR_SET_TIMERSLACK, 1000UL);
	if (w->thread.pin_error)
		report(w, (struct pv_net_event){.kind = PV_NET_NOT_PINNED,
						.error = w->thread.pin_error});
	if (w->cfg.trace)
		trace_event(w, PV_TRACE_NONE, 0, 0, false);
	confine(w);
	for (int q = RX; q <= TX; q++) {
		const struct pv_net_ring *r = &w->cfg.ring[q];

		if (w->log.bits && r->log_used)
			pv_vring_log(&w->ring[q], &w->log, r->log_addr, r->desc);
		if (!w->ring[q].fault)
			pv_vring_disable_notify(&w->ring[q]);
		if (w->inflight[q].region)
			pv_inflight_recover(&w->inflight[q]);
	}
}

/*
 * After the last round: every chain that was taken is finished or given back. From then on kicks
 * gather in the eventfds until someone takes over.
 */
static void serve_end(struct pv_net_worker *w)
{
	rx_abandon(w);
	for (int q = RX; q <= TX; q++) {
		back_ends(w, q);
		if (w->delayed[q].chains)
			decide(w, q, w->delayed[q].chains);
		if (w->held_irq[q])
			interrupt(w, &w->cfg.ring[q]);
		if (!w->ring[q].fault)
			(void)pv_vring_enable_notify(&w->ring[q]);
	}
	if (w->log.marked)
		tell_log(w);
}

/* What the thread does. */
static void serve(void *arg)
{
	struct pv_net_worker *w = arg;

	let_kickers(w, false);
	serve_begin(w);
	while (!stopping(w)) {
		bool more = net_round(w);

		/* With in_exit, vCPUs have their turn in between. */
		if (more && !w->cfg.unbatched && !w->cfg.in_exit)
			continue;
		if (more ? !net_look(w) : !net_sleep(w))
			continue;
		report(w, (struct pv_net_event){.kind = PV_NET_ERROR, .error = errno});
		break;
	}
	if (w->held.len && __atomic_load_n(&w->finish, __ATOMIC_RELAXED))
		rx_finish(w);
	serve_end(w);
	let_kickers(w, true);
}

/**
 * pv_net_worker_start() - Make the worker's thread, which waits for pv_net_worker_go()
 * @w:		The worker; once
 *
 * Return: 0; -errno if the system has no thread left: then the worker is as before
 */
int pv_net_worker_start(struct pv_net_worker *w)
{
	return pv_thread_start(&w->thread, w->cfg.name, w->cfg.cpu, serve, w);
}

/**
 * pv_net_worker_go() - Let the worker serve its rings, from now until pv_net_worker_join() returns
 * @w:		Started
 */
void pv_net_worker_go(struct pv_net_worker *w)
{
	pv_thread_go(&w->thread);
}

/**
 * pv_net_worker_await() - Wait until the worker serves its rings
 * @w:		Told to go; once
 * @out:	Filled in
 */
void pv_net_worker_await(struct pv_net_worker *w, struct pv_net_thread *out)
{
	pv_thread_await(&w->thread);
	*out = (struct pv_net_thread){.tid = w->thread.tid, .began = w->thread.began};
}

/**
 * pv_net_worker_event() - Take the next event
 * @w:		Not freed yet; by one thread at a time
 * @ev:		Filled in
 *
 * If more than EVENTS - EVENTS_ONCE events wait, changes of the link are missed, but not the latest
 * one.
 *
 * Return: whether there was an event
 */
bool pv_net_worker_event(struct pv_net_worker *w, struct pv_net_event *ev)
{
	struct events *e = &w->events;
	uint64_t missed;
	bool down;

	while (e->read != __atomic_load_n(&e->written, __ATOMIC_ACQUIRE)) {
		*ev = e->event[e->read % EVENTS];
		__atomic_store_n(&e->read, e->read + 1, __ATOMIC_RELEASE);
		down = ev->kind == PV_NET_LINK_DOWN;
		if (!down && ev->kind != PV_NET_LINK_UP)
			return true;
		if (down != e->down) { /* else what was between them has been missed */
			e->down = down;
			return true;
		}
	}
	missed = __atomic_load_n(&w->count.events_missed, __ATOMIC_ACQUIRE);
	if (missed == e->missed)
		return false;
	e->missed = missed;
	down = __atomic_load_n(&w->link_down, __ATOMIC_RELAXED);
	if (down == e->down)
		return false;
	e->down = down;
	*ev = (struct pv_net_event){.kind = down ? PV_NET_LINK_DOWN : PV_NET_LINK_UP};
	return true;
}

/**
 * pv_net_worker_hold() - Have the worker transmit no more, but go on receiving
 * @w:		Serving, until it is stopped; by one thread at a time
 * @timeout_ms:	How long to wait for the answer
 *
 * Return: 0 as soon as the worker has no transmit chain in its hands; -ETIMEDOUT if it does not
 * answer in time, or -errno
 */
int pv_net_worker_hold(struct pv_net_worker *w, int timeout_ms)
{
	uint64_t until = pv_now_ns() + (uint64_t)timeout_ms * 1000000;
	struct pollfd answer = {.events = POLLIN};

	if (w->answer_fd < 0)
		w->answer_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (w->answer_fd < 0)
		return -errno;
	answer.fd = w->answer_fd;
	if (__atomic_load_n(&w->hold, __ATOMIC_ACQUIRE) == HOLD_NO) {
		/* Release: the worker that sees this sees answer_fd. */
		__atomic_store_n(&w->hold, HOLD_ASKED, __ATOMIC_RELEASE);
		pv_event_signal(w->wake_fd);
	}
	while (__atomic_load_n(&w->hold, __ATOMIC_ACQUIRE) != HOLD_DONE) {
		uint64_t now = pv_now_ns();

		if (now >= until)
			return -ETIMEDOUT;
		poll(&answer, 1, (int)((until - now + 999999) / 1000000));
	}
	return 0;
}

/**
 * pv_net_worker_taker() - What takes the worker's transmit kicks in the vCPUs' threads
 * @w:		Configured with in_exit
 *
 * Kicks that come by the eventfd are served nevertheless, by the thread.
 *
 * Return: the taker, to be used from pv_net_worker_go() until before pv_net_worker_stop()
 */
struct pv_taker *pv_net_worker_taker(struct pv_net_worker *w)
{
	return &w->taker;
}

/**
 * pv_net_worker_stop() - Tell the worker to end
 * @w:		Started, if at all; from any thread
 * @finish:	Another worker goes on: a frame that was read and waits for buffers is not dropped
 *		at once, the guest has the configuration's hold_ms from now on to add some
 */
void pv_net_worker_stop(struct pv_net_worker *w, bool finish)
{
	if (finish)
		__atomic_store_n(&w->finish, 1, __ATOMIC_RELAXED);
	__atomic_store_n(&w->stop, 1, __ATOMIC_RELEASE);
	pv_event_signal(w->wake_fd);
}

/**
 * pv_net_worker_join() - Wait for the worker's end
 * @w:		Stopped, or never told to go: then it has never touched its rings; or not started
 *
 * On return every chain that was taken is finished or given back, and nothing touches guest memory
 * any more. What happened until then can still be taken by pv_net_worker_event().
 */
void pv_net_worker_join(struct pv_net_worker *w)
{
	pv_thread_join(&w->thread);
}

/**
 * pv_net_worker_attach() - Give a worker that has reported PV_NET_LINK_DOWN a new tap
 * @w:		The worker; from any thread
 * @fd:		Non-blocking tap, lent; PV_NET_LINK_UP tells when it is in use
 */
void pv_net_worker_attach(struct pv_net_worker *w, int fd)
{
	__atomic_store_n(&w->attach, fd, __ATOMIC_RELEASE);
	pv_event_signal(w->wake_fd);
}

/**
 * pv_net_worker_capture() - Begin a capture, or end one
 * @w:		The worker, running or not; from one thread at a time
 * @place:	0 to PV_CAPTURES - 1
 * @c:		From pv_capture_ring(), lent until its place is taken away; NULL takes away what is
 *		there
 *
 * Return: whether the worker uses nothing any more that was there before. It is false only for a
 * thread that has been stopped (PV_NET_STOPPED) in the middle of a packet.
 */
bool pv_net_worker_capture(struct pv_net_worker *w, uint32_t place, struct pv_capture *c)
{
	const struct timespec moment = {.tv_nsec = 10000};
	uint64_t until = pv_now_ns() + CAPTURE_MS * 1000000ull;
	struct pv_capture *old = __atomic_exchange_n(&w->capture[place], c, __ATOMIC_SEQ_CST);

	__atomic_fetch_add(&w->captures, (c ? 1u : 0u) - (old ? 1u : 0u), __ATOMIC_SEQ_CST);
	/* What begins after this finds the place as it is now. */
	while (old && __atomic_load_n(&w->capturing, __ATOMIC_SEQ_CST)) {
		if (pv_now_ns() > until)
			return false;
		nanosleep(&moment, NULL);
	}
	return true;
}

/**
 * pv_net_worker_impair() - Have a worker do wrong on purpose what the rules of an object say
 * @w:		The worker, running or not; once, from any thread
 * @im:		Of the same queue pair, lent until the worker is freed; no other worker uses it
 */
void pv_net_worker_impair(struct pv_net_worker *w, struct pv_impair *im)
{
	__atomic_store_n(&w->impair, im, __ATOMIC_RELEASE);
}

/**
 * pv_net_worker_cpu_ns() - CPU time that the worker's thread has used
 * @w:		After pv_net_worker_await(), serving or joined; from any thread
 *
 * Return: nanoseconds
 */
uint64_t pv_net_worker_cpu_ns(const struct pv_net_worker *w)
{
	return pv_thread_cpu_ns(&w->thread);
}

/**
 * pv_net_worker_base() - Position of a ring
 * @w:		Joined, or never told to go
 * @queue:	0 receive, 1 transmit
 *
 * Return: where the next data path has to start
 */
uint32_t pv_net_worker_base(const struct pv_net_worker *w, int queue)
{
	return pv_vring_base(&w->ring[queue]);
}

/**
 * pv_net_worker_position() - Where a worker is in a ring, to look at
 * @w:		After pv_net_worker_await(), serving or joined; from any thread
 * @queue:	0 receive, 1 transmit
 *
 * Return: the position as of pv_net_worker_base(), which may have moved on
 */
uint32_t pv_net_worker_position(const struct pv_net_worker *w, int queue)
{
	return pv_vring_glance(&w->ring[queue]);
}

/**
 * pv_net_worker_counters() - Read the counters
 * @w:		Running or not
 * @out:	Filled in; each value is whole, the set is not a snapshot
 */
void pv_net_worker_counters(const struct pv_net_worker *w, struct pv_net_counters *out)
{
	const uint64_t *from = (const uint64_t *)&w->count;
	uint64_t *to = (uint64_t *)out;

	for (size_t i = 0; i < sizeof(*out) / sizeof(*to); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}
