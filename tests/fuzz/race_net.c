/* SPDX-License-Identifier: MIT */
/*
 * A worker (cext/net_worker.c) and the threads that may call it while it runs, for ThreadSanitizer:
 * race_net SECONDS.
 *
 * The main thread plays the guest of one life of a worker after the other: it sends, receives,
 * and in the end holds and stops the worker. Meanwhile one thread plays the outside and cuts the
 * link at times, one takes events and gives the worker a new link, and one reads what can be read
 * at any time. One captures packets, again and again. In every third life, transmit kicks are taken
 * by whoever kicks, as vCPUs do, and one
 * more thread kicks all the time. Each life must end with all chains given back. Every other life
 * has packed rings. In some lives the worker is on a cable, at whose far end is the outside, or
 * which is a loop.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "capture.h"
#include "impair.h"
#include "net_worker.h"
#include "thread.h"

enum { RX, TX };

#define SIZE	64u   /* entries of a ring */
#define BUFFER	2048u /* bytes of a buffer; one per entry */
#define FRAME	100u  /* bytes of a frame, header included */
#define HEADER	12u
#define RING(q) ((uint64_t)(q)*0x2000u)
#define BUFFERS 0x8000u /* where they start */
#define MEMORY	0x100000u
#define FRAMES	400u /* sent per life */

/*
 * A ring as its driver sees it (virtio 1.2, 2.7). Of a packed one (2.8) only desc is used, whose
 * last two fields then are the buffer id and the flags.
 */
struct ring {
	struct {
		uint64_t addr;
		uint32_t len;
		uint16_t flags;
		uint16_t next;
	} desc[SIZE];
	uint16_t avail_flags, avail_idx, avail[SIZE], used_event;
	uint16_t padding;
	uint16_t used_flags, used_idx;
	struct {
		uint32_t id, len;
	} used[SIZE];
	uint16_t avail_event;
};

static uint8_t *memory;
static uint8_t log_bits[MEMORY / 4096 / 8]; /* shared with a front-end */
static struct pv_net_worker *worker;
static struct pv_cable *cable;	 /* NULL: frames go by link_fd */
static struct pv_cable_end *far; /* NULL: it is a loop */
static struct pv_taker *taker;	 /* NULL: kicks come by the eventfd */
static int kick[2], call[2], bell[2], event_fd;
static int link_fd[2]; /* near, far; the outside changes them under the lock */
static pthread_mutex_t link_lock = PTHREAD_MUTEX_INITIALIZER;
static bool life_over; /* atomic */
static uint64_t faults, losses, captured;
static struct pv_impair *impair; /* NULL: no faults on demand in this life */
static bool packed;
static uint32_t next[2], seen[2]; /* places of the guest; packed: in two laps of the ring */

static struct ring *ring(int q)
{
	return (struct ring *)(void *)(memory + RING(q));
}

static bool over(void)
{
	return __atomic_load_n(&life_over, __ATOMIC_ACQUIRE);
}

static void new_link(void)
{
	int type = SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC;

	CHECK(!socketpair(AF_UNIX, type, 0, link_fd));
}

/* --- the guest -------------------------------------------------------------------------------- */

/* What a packed descriptor's AVAIL and USED bits are in the lap of a place (2.8.1). */
static uint16_t lap(uint32_t place, bool used)
{
	bool wrap = place < SIZE;

	return (uint16_t)((wrap ? 0x80 : 0) | (wrap == used ? 0x8000 : 0));
}

static uint32_t after(uint32_t place)
{
	return (place + 1) % (packed ? 2 * SIZE : 65536);
}

/* Kick: by the eventfd, or as a vCPU does whose kick is an exit. */
static void notify(int q)
{
	if (taker && q == TX)
		taker->take(taker);
	else
		CHECK(eventfd_write(kick[q], 1) == 0);
}

static void offer_packed(int q, uint16_t id)
{
	uint32_t i = next[q] % SIZE;
	struct ring *r = ring(q);
	uint16_t flags = (uint16_t)(lap(next[q], false) | (q == TX ? 0 : 2));

	__atomic_store_n(&r->desc[i].addr, BUFFERS + BUFFER * ((uint64_t)q * SIZE + id),
			 __ATOMIC_RELAXED);
	__atomic_store_n(&r->desc[i].len, q == TX ? FRAME : BUFFER, __ATOMIC_RELAXED);
	__atomic_store_n(&r->desc[i].flags, id, __ATOMIC_RELAXED);
	__atomic_store_n(&r->desc[i].next, flags, __ATOMIC_RELEASE);
	next[q] = after(next[q]);
	notify(q);
}

static void offer(int q, uint16_t head)
{
	struct ring *r = ring(q);
	uint16_t idx = r->avail_idx;

	if (packed) {
		offer_packed(q, head);
		return;
	}
	r->desc[head].addr = BUFFERS + BUFFER * ((uint64_t)q * SIZE + head);
	r->desc[head].len = q == TX ? FRAME : BUFFER;
	r->desc[head].flags = q == TX ? 0 : 2; /* VRING_DESC_F_WRITE */
	__atomic_store_n(&r->avail[idx % SIZE], head, __ATOMIC_RELAXED);
	__atomic_store_n(&r->avail_idx, (uint16_t)(idx + 1), __ATOMIC_RELEASE);
	notify(q);
}

/* Whether the device has returned a chain that was not taken back. */
static bool returned(int q)
{
	struct ring *r = ring(q);

	if (!packed)
		return __atomic_load_n(&r->used_idx, __ATOMIC_ACQUIRE) != seen[q];
	return (__atomic_load_n(&r->desc[seen[q] % SIZE].next, __ATOMIC_ACQUIRE) & 0x8080) ==
	       lap(seen[q], true);
}

/* Take back what is done; returns how many. Received frames are given to the worker again. */
static uint32_t reap(int q)
{
	struct ring *r = ring(q);
	uint32_t n = 0;

	for (; returned(q); seen[q] = after(seen[q]), n++) {
		uint32_t i = seen[q] % SIZE;
		uint32_t head = packed ? __atomic_load_n(&r->desc[i].flags, __ATOMIC_RELAXED)
				       : __atomic_load_n(&r->used[i].id, __ATOMIC_RELAXED);
		uint8_t *buffer = memory + BUFFERS + BUFFER * ((uint32_t)q * SIZE + head);

		CHECK(head < SIZE);
		if (q == RX && !over()) {
			CHECK(buffer[FRAME - 1] == 0x5a);
			buffer[FRAME - 1] = 0;
			offer(RX, (uint16_t)head);
		}
	}
	return n;
}

static void guest(void)
{
	uint32_t sent = 0, done = 0, place;

	memset(next, 0, sizeof(next));
	memset(seen, 0, sizeof(seen));
	for (uint16_t i = 0; i < SIZE; i++)
		offer(RX, i);
	while (done < FRAMES) {
		for (; sent < FRAMES && sent - done < SIZE / 2; sent++) {
			memset(memory + BUFFERS + BUFFER * (SIZE + sent % SIZE), 0, FRAME);
			memory[BUFFERS + BUFFER * (SIZE + sent % SIZE) + FRAME - 1] = 0x5a;
			offer(TX, (uint16_t)(sent % SIZE));
		}
		done += reap(TX);
		reap(RX);
	}
	CHECK(pv_net_worker_hold(worker, 10000) == 0);
	done += reap(TX);
	offer(TX, 0); /* is not taken any more */
	pv_net_worker_stop(worker, done % 2);
	pv_net_worker_join(worker);
	CHECK(!returned(TX));
	reap(RX);
	for (int q = RX; q <= TX; q++) {
		place = seen[q];
		if (packed)
			place = (place % SIZE | (place < SIZE ? 0x8000 : 0)) * 0x10001u;
		CHECK(pv_net_worker_base(worker, q) == place);
	}
}

/* --- the other threads ------------------------------------------------------------------------ */

/* The worker at the far end of the cable; it does not sleep. */
static void far_end(void)
{
	uint8_t frame[FRAME - HEADER] = {[FRAME - HEADER - 1] = 0x5a};
	const uint8_t *got;
	uint32_t len;

	while (!over()) {
		while ((got = pv_frames_peek(far->in, &len))) {
			CHECK(len == sizeof(frame) && got[len - 1] == 0x5a);
			pv_frames_take(far->in, len);
		}
		if (pv_frames_release(far->in))
			pv_cable_ring(far);
		for (uint32_t i = 0; i < 50 && pv_cable_send(far, frame, sizeof(frame)); i++)
			;
	}
}

static void *outside(void *arg)
{
	uint8_t frame[BUFFER] = {0};
	uint32_t count = 0;

	(void)arg;
	if (far)
		far_end();
	if (cable)
		return NULL;
	frame[FRAME - 1] = 0x5a;
	while (!over()) {
		pthread_mutex_lock(&link_lock);
		while (read(link_fd[1], frame, sizeof(frame)) > 0)
			;
		frame[FRAME - 1] = 0x5a;
		if (write(link_fd[1], frame, FRAME) == FRAME && ++count % 200 == 0)
			shutdown(link_fd[1], SHUT_RDWR);
		pthread_mutex_unlock(&link_lock);
	}
	return NULL;
}

static void *supervisor(void *arg)
{
	struct pollfd p = {.fd = event_fd, .events = POLLIN};
	struct pv_net_event ev;
	uint64_t value;
	int old;

	(void)arg;
	while (!over()) {
		if (poll(&p, 1, 10) > 0)
			CHECK(read(event_fd, &value, sizeof(value)) == sizeof(value));
		while (pv_net_worker_event(worker, &ev)) {
			faults += ev.kind != PV_NET_LINK_DOWN && ev.kind != PV_NET_LINK_UP;
			if (ev.kind != PV_NET_LINK_DOWN)
				continue;
			losses++;
			/* The worker has let go of the old descriptor, so that it can be closed. */
			pthread_mutex_lock(&link_lock);
			old = link_fd[0];
			close(link_fd[1]);
			new_link();
			pv_net_worker_attach(worker, link_fd[0]);
			pthread_mutex_unlock(&link_lock);
			close(old);
		}
	}
	return NULL;
}

static void *observer(void *arg)
{
	const struct pv_impair_rule rule = {.ways = 3,
					    .frames = 1,
					    .chance.every = 2,
					    .duplicate.every = 3,
					    .delay_ns = 50000,
					    .jitter_ns = 50000};
	struct pv_impair_counters deeds;
	struct pv_net_counters c;
	uint64_t packets = 0;

	(void)arg;
	for (uint32_t round = 0; !over(); round++) {
		if (impair) {
			CHECK(!pv_impair_set(impair, &rule, round % 2, round, pv_now_ns()));
			pv_impair_counters(impair, round / 2 % 2, &deeds);
			(void)pv_impair_waiting(impair, round / 2 % 2);
		}
		/* As a front-end does that copies the marked pages. */
		for (size_t i = 0; i < sizeof(log_bits); i++)
			(void)__atomic_exchange_n(&log_bits[i], 0, __ATOMIC_ACQUIRE);
		pv_net_worker_counters(worker, &c);
		CHECK(c.tx_packets + c.tx_drop_link >= packets);
		packets = c.tx_packets + c.tx_drop_link;
		CHECK(pv_net_worker_cpu_ns(worker) > 0);
	}
	return NULL;
}

/* Another vCPU, which kicks without having anything to send. */
static void *kicker(void *arg)
{
	(void)arg;
	while (!over()) {
		notify(TX);
		usleep(100);
	}
	return NULL;
}

/* Captures that come and go, each with a reader that takes all. */
static void *capturer(void *arg)
{
	uint8_t *room = malloc(PV_CAPTURE_ROOM);
	int wake_fd = eventfd(0, EFD_NONBLOCK);

	(void)arg;
	CHECK(room && wake_fd >= 0);
	while (!over()) {
		struct pv_capture *c = pv_capture_ring(0, 64, NULL, 0, wake_fd);
		struct pv_capture_counts counts;
		uint64_t blocks = 0;
		size_t size;

		CHECK(c);
		CHECK(pv_net_worker_capture(worker, 1, c));
		for (int round = 0; round < 50; round++) {
			if (round == 49) /* nothing comes after this */
				CHECK(pv_net_worker_capture(worker, 1, NULL));
			else if (!pv_capture_ask(c))
				poll(&(struct pollfd){.fd = wake_fd, .events = POLLIN}, 1, 1);
			(void)!read(wake_fd, &(uint64_t){0}, sizeof(uint64_t));
			while ((size = pv_capture_drain(&c, 1, 0, 0, room, PV_CAPTURE_ROOM)))
				for (size_t at = 0; at < size; blocks++) {
					uint32_t length;

					memcpy(&length, room + at + 4, sizeof(length));
					CHECK(length >= 32 && length % 4 == 0);
					at += length;
				}
		}
		pv_capture_count(c, &counts);
		CHECK(counts.accepted == counts.seen && counts.accepted == blocks + counts.lost);
		pv_capture_free(c);
		captured += blocks;
	}
	close(wake_fd);
	free(room);
	return NULL;
}

/* --- lives ------------------------------------------------------------------------------------ */

static void life(uint32_t number)
{
	void *(*const others[])(void *) = {outside, supervisor, observer, kicker, capturer};
	struct pv_memory mem = {.count = 1, .region[0] = {.size = MEMORY, .host = memory}};
	struct pv_net_config cfg = {
		.hdr_len = HEADER,
		.max_frame = 1530,
		.poll_us = number % 4 == 3 ? 20 : 0,
		.in_exit = number % 3 == 2 && number % 4 != 3 && !(number / 4 % 2),
		.unbatched = number % 7 > 3,
		.hold_ms = 10,
		.taken = PV_INFLIGHT_UNCOUNTED,
		.mrg_rxbuf = true,
		.format.event_idx = number % 2,
		.log = number % 5 ? log_bits : NULL,
		.log_size = sizeof(log_bits),
		.log_call = -1,
		.event_fd = event_fd,
		.cpu = number % 8 ? -1 : 0,
		.name = "race",
	};
	struct pv_net_event why = {0};
	struct pv_net_thread thread;
	pthread_t pthread[5];
	uint64_t value;

	packed = number / 2 % 2;
	cfg.format.packed = packed;
	memset(memory, 0, MEMORY);
	new_link();
	cfg.fd = link_fd[0];
	if (number / 4 % 2) {
		cable = pv_cable_new(bell[0], number % 2 ? bell[1] : -1);
		CHECK(cable);
		far = number % 2 ? pv_cable_end(cable, 1) : NULL;
		cfg.cable = pv_cable_end(cable, 0);
		cfg.fd = bell[0];
	}
	for (int q = RX; q <= TX; q++)
		cfg.ring[q] = (struct pv_net_ring){
			.size = SIZE,
			.base = packed ? 0x80008000 : 0,
			.coalesce_packets = number % 3 ? 0 : 8,
			.coalesce_us = number % 3 ? 0 : 50,
			.desc = RING(q) + offsetof(struct ring, desc),
			.avail = RING(q) + offsetof(struct ring, avail_flags),
			.used = RING(q) + offsetof(struct ring, used_flags),
			.log_used = true,
			.log_addr = RING(q) + offsetof(struct ring, used_flags),
			.kick = kick[q],
			.call = call[q],
		};
	worker = pv_net_worker_new(&cfg, &mem, &why);
	CHECK(worker);
	impair = number % 5 == 3 ? pv_impair_new(0) : NULL;
	if (impair)
		pv_net_worker_impair(worker, impair);
	CHECK(!pv_net_worker_start(worker));
	if (number % 16 == 15) { /* all threads or none: this one was in vain */
		pv_net_worker_join(worker);
		CHECK(!ring(RX)->used_flags && !ring(TX)->used_flags);
		CHECK(!pv_net_worker_start(worker));
	}
	taker = cfg.in_exit ? pv_net_worker_taker(worker) : NULL;
	pv_net_worker_go(worker);
	pv_net_worker_await(worker, &thread);
	CHECK(thread.tid > 0 && thread.began > 0);
	__atomic_store_n(&life_over, false, __ATOMIC_RELEASE);
	for (int i = 0; i < 5; i++)
		CHECK(!pthread_create(&pthread[i], NULL, others[i], NULL));
	guest();
	__atomic_store_n(&life_over, true, __ATOMIC_RELEASE);
	for (int i = 0; i < 5; i++)
		pthread_join(pthread[i], NULL);
	pv_net_worker_free(worker);
	pv_impair_free(impair);
	pv_cable_free(cable);
	cable = NULL;
	far = NULL;
	close(link_fd[0]);
	close(link_fd[1]);
	for (int q = RX; q <= TX; q++) {
		(void)!read(kick[q], &value, sizeof(value));
		(void)!read(call[q], &value, sizeof(value));
	}
}

int main(int argc, char **argv)
{
	uint64_t end = pv_now_ns() + (argc > 1 ? strtoull(argv[1], NULL, 10) : 5) * 1000000000u;
	uint32_t lives = 0;

	memory = aligned_alloc(4096, MEMORY);
	CHECK(memory);
	for (int q = RX; q <= TX; q++) {
		kick[q] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		call[q] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		bell[q] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	}
	event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	while (pv_now_ns() < end)
		life(lives++);
	CHECK(!faults && losses && captured);
	printf("%s: %u lives, %llu links lost, %llu packets captured, no race\n", argv[0], lives,
	       (unsigned long long)losses, (unsigned long long)captured);
	free(memory);
	return 0;
}
