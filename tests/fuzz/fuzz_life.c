/* SPDX-License-Identifier: MIT */
/*
 * Fuzzes the life of a worker (cext/net_worker.c): what other threads ask of it (hold, attach, stop,
 * finish), and what its outside does to it (a link that is lost or takes no more, call eventfds that
 * a peer has spoilt), in any order with what a hostile guest does to its rings.
 *
 * Input: base (2 bytes), features (2), LIFE_ACTIONS actions of two bytes, the last two bytes of the
 * header, then the image of the low region.
 *
 * Built with -DFUZZ_THREADS the worker has its thread, for ThreadSanitizer; else its rounds come
 * between the actions, so that an input does the same each time.
 */
#include "check.h"
#include "net_worker.c"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>

#include "fuzz.h"

#define LIFE_ACTIONS 24u
#define LIFE_HEADER  (4 + 2 * LIFE_ACTIONS + 2)
#define LOG_BYTES    3
#define ROUNDS	     10000 /* more in a row than a worker can have work for */

enum {
	FRAME,	/* one comes from the outside */
	LOST,	/* the link */
	ATTACH, /* a new one */
	MORE,	/* the guest makes chains available */
	KICK,
	TAKE,  /* a kick that is an exit */
	DRAIN, /* the outside takes what was sent */
	HOLD,
	SPOIL, /* a call eventfd: full, and writes to it block */
	MEND,
	LOOK, /* at counters and events */
	SCRIBBLE,
	KINDS
};

static uint8_t *low, *high, *inflight[2], *log_bits;
static int kick[2], call[2], event_fd;
static int link_fd[2] = {-1, -1}; /* near, far */
static uint8_t packet[65536];
static struct pv_trace_event traced[16];
static struct pv_trace trace = {.mask = 15, .event = traced};

static void set_up(void)
{
	low = aligned_alloc(4096, FUZZ_REGION);
	high = aligned_alloc(4096, FUZZ_REGION);
	log_bits = malloc(LOG_BYTES);
	CHECK(low && high && log_bits);
	memset(low, 0, FUZZ_REGION);
	memset(high, 0, FUZZ_REGION);
	memset(log_bits, 0, LOG_BYTES);
	for (int q = RX; q <= TX; q++) {
		inflight[q] = malloc(PV_INFLIGHT_SIZE(FUZZ_SIZE));
		kick[q] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		call[q] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		CHECK(inflight[q] && kick[q] >= 0 && call[q] >= 0);
	}
	event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	signal(SIGPIPE, SIG_IGN);
	CHECK(!pv_interrupt_init());
}

static void new_link(void)
{
	int type = SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, size = 4096;

	CHECK(!socketpair(AF_UNIX, type, 0, link_fd));
	/* So that the outside takes no more after a few frames. */
	CHECK(!setsockopt(link_fd[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size)));
}

static void drain(void)
{
	while (read(link_fd[1], packet, sizeof(packet)) > 0)
		;
}

/* As a peer does that shares the eventfd: its flags are the file's. */
static void spoil(int fd, bool bad)
{
	(void)pv_event_take(fd);
	CHECK(!fcntl(fd, F_SETFL, O_RDWR | O_NONBLOCK));
	if (!bad)
		return;
	(void)!write(fd, &(uint64_t){0xfffffffffffffffe}, sizeof(uint64_t));
	CHECK(!fcntl(fd, F_SETFL, O_RDWR));
}

/* The guest makes more available. Atomic, because the worker's thread reads meanwhile. */
static void more(bool packed, uint32_t q, uint8_t what)
{
	uint8_t *ring = low + FUZZ_DESC(q);

	if (!packed) {
		uint16_t *idx = (uint16_t *)(void *)(low + FUZZ_AVAIL(q) + 2);

		__atomic_fetch_add(idx, what & 15, __ATOMIC_RELEASE);
		return;
	}
#ifdef FUZZ_THREADS
	/* Who changes descriptors that are not its own does race; race_net keeps to the rules. */
	return;
#endif
	for (uint32_t i = what & 3; i < FUZZ_SIZE; i += 1 + (what >> 5))
		__atomic_fetch_xor((uint16_t *)(void *)(ring + 16 * i + 14), 0x8080,
				   __ATOMIC_RELEASE);
}

/* --- the worker, with or without a thread ----------------------------------------------------- */

#ifdef FUZZ_THREADS
static void begin(struct pv_net_worker *w)
{
	struct pv_net_thread thread;

	CHECK(!pv_net_worker_start(w));
	pv_net_worker_go(w);
	pv_net_worker_await(w, &thread);
}

static void step(struct pv_net_worker *w)
{
	(void)w;
	sched_yield();
}

/* Whoever spoils an eventfd while the worker is about to write to it makes it wait: event.h. */
static void hold(struct pv_net_worker *w)
{
	spoil(call[RX], false);
	spoil(call[TX], false);
	CHECK(!pv_net_worker_hold(w, 20000));
}

static void end(struct pv_net_worker *w, bool finish)
{
	pv_net_worker_stop(w, finish);
	pv_net_worker_join(w);
}
#else
static void begin(struct pv_net_worker *w)
{
	let_kickers(w, false);
	for (uint32_t q = RX; q <= TX; q++) {
		if (w->log.bits && w->cfg.ring[q].log_used)
			pv_vring_log(&w->ring[q], &w->log, w->cfg.ring[q].log_addr, FUZZ_DESC(q));
		if (!w->ring[q].fault)
			pv_vring_disable_notify(&w->ring[q]);
		if (w->inflight[q].region)
			pv_inflight_recover(&w->inflight[q]);
	}
	let_kickers(w, true);
}

/* What serve() does until it would sleep, which it cannot: it is always awake. */
static void step(struct pv_net_worker *w)
{
	let_kickers(w, false);
	for (int round = 0; net_round(w); round++)
		CHECK(round < ROUNDS);
	pv_event_signal(w->wake_fd);
	CHECK((w->cfg.poll_us ? spin(w) : linger(w)) >= 0);
	pv_event_signal(w->wake_fd);
	if (!w->cfg.poll_us)
		CHECK(net_sleep(w) >= 0);
	let_kickers(w, true);
}

static void hold(struct pv_net_worker *w)
{
	if (w->answer_fd < 0)
		w->answer_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (w->hold == HOLD_NO)
		w->hold = HOLD_ASKED;
	step(w);
	CHECK(!pv_net_worker_hold(w, 0));
}

static void end(struct pv_net_worker *w, bool finish)
{
	pv_net_worker_stop(w, finish);
	let_kickers(w, false);
	if (w->held.len && finish)
		rx_finish(w);
	serve_end(w);
	let_kickers(w, true);
}
#endif

/* --- a life ----------------------------------------------------------------------------------- */

static void look(struct pv_net_worker *w, bool off[2], bool *down)
{
	struct pv_net_counters c;
	struct pv_net_event ev;

	pv_net_worker_counters(w, &c);
	while (pv_net_worker_event(w, &ev)) {
		switch (ev.kind) {
		case PV_NET_RING_FAULT:
			CHECK(!off[ev.queue]);
			off[ev.queue] = true;
			break;
		case PV_NET_LINK_DOWN:
			CHECK(!*down);
			*down = true;
			break;
		case PV_NET_LINK_UP:
			CHECK(*down);
			*down = false;
			break;
		default:
			CHECK(ev.kind == PV_NET_NOT_PINNED);
		}
	}
}

static void configure(struct pv_net_config *cfg, const uint8_t *data)
{
	uint8_t f = data[2], g = data[3];
	bool packed = g & 1;
	uint16_t base;

	memcpy(&base, data, sizeof(base));
	for (uint32_t q = RX; q <= TX; q++)
		cfg->ring[q] = (struct pv_net_ring){
			.size = FUZZ_SIZE,
			.base = packed ? FUZZ_POSITION(base) : base,
			.desc = FUZZ_DESC(q),
			.avail = FUZZ_AVAIL(q),
			.used = FUZZ_USED(q),
			.kick = kick[q],
			.call = call[q],
			.coalesce_packets = f & 64 ? 0 : g >> 5,
			.coalesce_us = f & 64 || !(g & 16) ? 0 : 20,
			.log_used = g & 8,
			.log_addr = FUZZ_USED(q),
		};
	for (uint32_t q = RX; q <= TX && f & 64; q++) {
		memcpy(inflight[q], low + FUZZ_TABLE + 256 * q, PV_INFLIGHT_SIZE(FUZZ_SIZE));
		if (f & 128)
			memcpy(inflight[q] + 8, &(uint16_t[]){1, FUZZ_SIZE}, 4);
		cfg->ring[q].inflight = inflight[q];
	}
	cfg->fd = link_fd[0];
	cfg->event_fd = event_fd;
	cfg->hdr_len = f & 8 ? 10 : V1_HDR;
	cfg->max_frame = f & 16 ? 65565 : 1530;
	cfg->poll_us = f & 32 ? 1 : 0;
	cfg->in_exit = g & 2 && !cfg->poll_us && !(f & 64);
	cfg->unbatched = g & 4;
	cfg->hold_ms = 1;
	cfg->taken = PV_INFLIGHT_UNCOUNTED;
	cfg->mrg_rxbuf = f & 4;
	cfg->guest_csum = f & 1;
	cfg->format.packed = packed;
	cfg->format.indirect = f & 1;
	cfg->format.event_idx = f & 2;
	cfg->log = g & 8 ? log_bits : NULL;
	cfg->log_size = LOG_BYTES;
	cfg->log_call = -1;
	cfg->trace = g & 128 ? &trace : NULL;
	cfg->cpu = -1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct pv_memory mem = {.count = 2};
	struct pv_net_config cfg = {0};
	struct pv_net_event why = {0};
	struct pv_net_worker *w;
	bool off[2] = {false, false}, down = false;
	uint32_t span;
#ifndef FUZZ_THREADS
	uint32_t ahead[2];
#endif

	if (size < LIFE_HEADER)
		return 0;
	if (!low)
		set_up();
	memcpy(low, data + LIFE_HEADER,
	       size - LIFE_HEADER < FUZZ_IMAGE ? size - LIFE_HEADER : FUZZ_IMAGE);
	mem.region[0] = (struct pv_mem_region){.gpa = 0, .size = FUZZ_REGION, .host = low};
	mem.region[1] = (struct pv_mem_region){.gpa = FUZZ_HIGH, .size = FUZZ_REGION, .host = high};
	new_link();
	configure(&cfg, data);
	span = cfg.format.packed ? 2 * FUZZ_SIZE : 65536;
	w = pv_net_worker_new(&cfg, &mem, &why);
	CHECK(w);
	begin(w);
#ifndef FUZZ_THREADS
	for (int q = RX; q <= TX; q++)
		ahead[q] = (w->ring[q].last_avail + span - w->ring[q].used_next) % span;
#else
	(void)span;
#endif
	for (uint32_t i = 4; i < 4 + 2 * LIFE_ACTIONS; i += 2) {
		uint8_t what = data[i + 1];
		uint32_t q = what & 1;

		switch (data[i] % KINDS) {
		case FRAME:
			(void)!write(link_fd[1], packet, 1 + (size_t)what * (what & 2 ? 8 : 97));
			break;
		case LOST:
			CHECK(!shutdown(link_fd[1], SHUT_RDWR));
			break;
		case ATTACH:
			if (down) {
				int old[2] = {link_fd[0], link_fd[1]};

				/* It has let go of the old one, so that it can be closed. */
				new_link();
				pv_net_worker_attach(w, link_fd[0]);
				close(old[0]);
				close(old[1]);
				while (down) {
					spoil(call[q], false);
					spoil(call[!q], false);
					step(w);
					look(w, off, &down);
				}
			}
			break;
		case MORE:
			more(cfg.format.packed, q, what >> 1);
			break;
		case KICK:
			(void)!write(kick[q], &(uint64_t){1}, sizeof(uint64_t));
			break;
		case TAKE:
			if (cfg.in_exit) {
				struct pv_taker *t = pv_net_worker_taker(w);

				t->take(t);
			}
			break;
		case DRAIN:
			drain();
			break;
		case HOLD:
			hold(w);
			break;
		case SPOIL:
			spoil(call[q], true);
			break;
		case MEND:
			spoil(call[q], false);
			break;
		case LOOK:
			break;
		case SCRIBBLE:
#ifndef FUZZ_THREADS /* no driver does it, so it would be a race */
			low[(what * 23u + data[i + 2]) % FUZZ_IMAGE] ^= (uint8_t)(1 << (what & 7));
#endif
			break;
		}
		step(w);
		look(w, off, &down);
	}
	end(w, data[LIFE_HEADER - 1] & 1);
	look(w, off, &down);
	for (int q = RX; q <= TX; q++) {
		/* Nothing taken is left: what was popped was pushed and published. */
#ifndef FUZZ_THREADS
		CHECK((w->ring[q].last_avail + span - w->ring[q].used_next) % span == ahead[q]);
#endif
		CHECK(w->ring[q].used_idx == w->ring[q].used_next);
		(void)pv_net_worker_base(w, q);
		spoil(call[q], false);
		(void)pv_event_take(kick[q]);
	}
	(void)pv_event_take(event_fd);
	pv_net_worker_free(w);
	close(link_fd[0]);
	close(link_fd[1]);
	return 0;
}
