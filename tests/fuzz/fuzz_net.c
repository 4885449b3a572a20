/* SPDX-License-Identifier: MIT */
/*
 * Fuzzes the worker (cext/net_worker.c): both rings of a queue pair are the input's, packets come
 * and go through a socket pair, or a cable with one or two ends.
 *
 * Input: base (2 bytes), features (1), packet lengths (13), then the image of the low region.
 * In-flight regions are made of the image, too, and some inputs have faults on demand.
 */
#include "check.h"
#include "net_worker.c"

#include <fcntl.h>
#include <stdio.h>
#include <sys/socket.h>

#include "fuzz.h"

#define LOG_BYTES 3 /* for less than there is of either region */

static uint8_t *low, *high, *inflight[2], *log_bits;
static int pair[2] = {-1, -1}, event[6];
static struct pv_impair *impair;
static struct pv_trace_event traced[16];
static struct pv_trace trace = {.mask = 15, .event = traced};

static void set_up(void)
{
	low = aligned_alloc(4096, FUZZ_REGION);
	high = aligned_alloc(4096, FUZZ_REGION);
	for (int q = 0; q < 2; q++)
		inflight[q] = malloc(PV_INFLIGHT_SIZE(FUZZ_SIZE));
	log_bits = malloc(LOG_BYTES);
	impair = pv_impair_new(0);
	CHECK(low && high && inflight[0] && inflight[1] && log_bits && impair);
	memset(log_bits, 0, LOG_BYTES);
	memset(low, 0, FUZZ_REGION);
	memset(high, 0, FUZZ_REGION);
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair));
	for (int i = 0; i < 6; i++)
		event[i] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
}

/* The cable of an input, and its far end; NULL: none, or a loop. */
static struct pv_cable *cable;
static struct pv_cable_end *far;

/* Rules of faults on demand, as an input has them. */
static void set_faults(struct pv_impair *im, const uint8_t *data)
{
	static const struct sock_filter odd[] = {BPF_STMT(BPF_LD | BPF_B | BPF_ABS, 12),
						 BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 1),
						 BPF_STMT(BPF_RET | BPF_A, 0)};
	const struct pv_impair_rule rule[] = {
		{.ways = 1 + data[10] % 3,
		 .frames = 1,
		 .filter = data[9] & 1 ? odd : NULL,
		 .filter_count = 3,
		 .after = data[9] >> 6,
		 .chance.every = 1,
		 .loss.every = data[9] & 2 ? 5 : 0,
		 .duplicate.odds = data[9] & 4 ? 0x80000000u : 0,
		 .reorder.every = data[9] & 8 ? 2 : 0,
		 .corrupt.every = data[9] & 16 ? 1 : 0,
		 .truncate.every = data[11] & 4 ? 2 : 0,
		 .keep = data[11] & 8 ? UINT64_MAX : data[11] >> 4,
		 .delay_ns = data[9] & 32 ? 1000 : 0,
		 .jitter_ns = data[10] & 4 ? 2000 : 0,
		 .rate = data[10] & 8 ? 8000000 : 0,
		 .burst = data[10] & 16 ? 10000 : 0,
		 .queue = data[10] & 32 ? 3 : 0},
		{.ways = 3,
		 .chance.every = 2,
		 .hold_irq_ns = 1000,
		 .extra_irq.every = 3,
		 .hold_kick_ns = data[10] & 64 ? 2000 : 0,
		 .reorder_used.odds = data[10] & 64 ? 0 : 0xc0000000u}};

	pv_impair_clear(im);
	CHECK(!pv_impair_set(im, rule, 2, data[9], pv_now_ns()));
}

/* A packet comes from outside. */
static void come(const uint8_t *packet, uint32_t len)
{
	if (far)
		(void)pv_cable_send(far, packet, len);
	else if (!cable)
		(void)!write(pair[1], packet, len);
}

/* What the worker has sent leaves. */
static void leave(uint8_t *packet, size_t max)
{
	const uint8_t *frame;
	uint32_t len;

	while (!cable && read(pair[1], packet, max) > 0)
		;
	while (far && (frame = pv_frames_peek(far->in, &len))) {
		CHECK(len <= PV_CABLE_FRAME_MAX && len <= max);
		memcpy(packet, frame, len);
		pv_frames_take(far->in, len);
	}
	if (far && pv_frames_release(far->in))
		pv_cable_ring(far);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static uint8_t packet[PV_CABLE_FRAME_MAX];
	struct pv_memory mem = {.count = 2};
	struct pv_net_config cfg = {0};
	struct pv_net_event ev = {0};
	struct pv_net_worker *w;
	bool off[2] = {false, false};
	uint16_t base, ahead[2];

	if (size < FUZZ_HEADER)
		return 0;
	if (!low)
		set_up();
	memcpy(low, data + FUZZ_HEADER,
	       size - FUZZ_HEADER < FUZZ_IMAGE ? size - FUZZ_HEADER : FUZZ_IMAGE);
	mem.region[0] = (struct pv_mem_region){.gpa = 0, .size = FUZZ_REGION, .host = low};
	mem.region[1] = (struct pv_mem_region){.gpa = FUZZ_HIGH, .size = FUZZ_REGION, .host = high};
	memcpy(&base, data, sizeof(base));
	for (uint32_t q = 0; q < 2; q++)
		cfg.ring[q] = (struct pv_net_ring){
			.size = FUZZ_SIZE,
			.base = FUZZ_PACKED(data) ? FUZZ_POSITION(base) : base,
			.desc = FUZZ_DESC(q),
			.avail = FUZZ_AVAIL(q),
			.used = FUZZ_USED(q),
			.kick = event[q],
			.call = event[2 + q],
		};
	for (uint32_t q = 0; q < 2 && data[2] & 64; q++) {
		/* As a hostile peer may hand it over; half of them with a good head. */
		memcpy(inflight[q], low + FUZZ_TABLE + 256 * q, PV_INFLIGHT_SIZE(FUZZ_SIZE));
		if (data[2] & 128)
			memcpy(inflight[q] + 8, &(uint16_t[]){1, FUZZ_SIZE}, 4);
		cfg.ring[q].inflight = inflight[q];
	}
	cfg.fd = pair[0];
	if (data[12] & 4) {
		cable = pv_cable_new(event[5], data[12] & 8 ? event[4] : -1);
		CHECK(cable);
		far = data[12] & 8 ? pv_cable_end(cable, 1) : NULL;
		cfg.cable = pv_cable_end(cable, 0);
		cfg.fd = event[5];
	}
	cfg.event_fd = event[4];
	cfg.hdr_len = data[2] & 8 ? 10 : data[12] & 1 ? HASH_HDR : V1_HDR;
	if (cfg.hdr_len == HASH_HDR) {
		pv_flow_hash_init(&cfg.hash, data[13] >> 2, data, FUZZ_HEADER);
		memcpy(packet, low, FUZZ_IMAGE);
		packet[HASH_HDR + 12] = data[13] & 1 ? 0x08 : data[13] & 2 ? 0x81 : 0x86;
		packet[HASH_HDR + 13] = data[13] & 1 || data[13] & 2 ? 0x00 : 0xdd;
	}
	cfg.max_frame = data[2] & 16 ? 65565 : 1530;
	cfg.poll_us = data[2] & 32 ? 1 : 0;
	for (uint32_t q = 0; q < 2 && data[14] & 1 && !(data[2] & 64); q++) {
		cfg.ring[q].coalesce_packets = data[14] >> 4;
		cfg.ring[q].coalesce_us = 1u << (data[14] >> 1 & 7);
	}
	cfg.log_call = -1;
	if (data[14] & 8) {
		/* Addresses are the input's, as a hostile peer may choose them. */
		cfg.log = log_bits;
		cfg.log_size = 1 + data[13] % LOG_BYTES;
		cfg.log_call = event[data[14] >> 5 & 3];
		for (uint32_t q = 0; q < 2; q++) {
			cfg.ring[q].log_used = data[14] & 16;
			memcpy(&cfg.ring[q].log_addr, data + 3 + q, sizeof(uint64_t));
			if (data[14] & 128)
				cfg.ring[q].log_addr = FUZZ_USED(q);
		}
	}
	cfg.format.packed = FUZZ_PACKED(data);
	cfg.format.indirect = data[2] & 1;
	cfg.format.event_idx = data[2] & 2;
	cfg.mrg_rxbuf = data[2] & 4;
	cfg.guest_csum = data[2] & 64;
	cfg.in_order = data[13] & 128;
	cfg.unbatched = data[11] & 1;
	cfg.in_exit = data[11] & 2 && !cfg.poll_us && !(data[2] & 64) && !cable;
	if (data[12] & 2)
		cfg.trace = &trace;
	w = pv_net_worker_new(&cfg, &mem, &ev);
	CHECK(w);
	if (data[10] & 128) {
		set_faults(impair, data);
		pv_net_worker_impair(w, impair);
	}
	let_kickers(w, false);
	for (uint32_t q = RX; q <= TX; q++) {
		if (w->inflight[q].region)
			pv_inflight_recover(&w->inflight[q]);
		if (cfg.log && cfg.ring[q].log_used)
			pv_vring_log(&w->ring[q], &w->log, cfg.ring[q].log_addr, FUZZ_DESC(q));
	}
	for (int q = RX; q <= TX; q++)
		ahead[q] = (uint16_t)(w->ring[q].last_avail - w->ring[q].used_next);
	for (uint32_t i = 3; i < FUZZ_HEADER; i++) {
		uint32_t len = 1 + (uint32_t)data[i] * (data[i] & 1 ? 8 : 97);

		come(packet, len);
		if (i % 4 == 3) {
			/* As serve() does, but without sleeping. */
			for (int round = 0; net_round(w); round++)
				CHECK(round < 10000);
			while (pv_net_worker_event(w, &ev)) {
				CHECK(ev.kind == PV_NET_RING_FAULT);
				CHECK(!off[ev.queue]);
				off[ev.queue] = true;
			}
			if (data[i] & 2 || !cable) /* else the queue becomes full */
				leave(packet, sizeof(packet));
			/* The guest goes on: more of what there is; sometimes it kicks. */
			if (FUZZ_PACKED(data))
				fuzz_toggle(low + FUZZ_DESC(i / 4 & 1), data[i]);
			else
				low[FUZZ_AVAIL(i / 4 & 1) + 2] =
					(uint8_t)(low[FUZZ_AVAIL(i / 4 & 1) + 2] + (data[i] & 7));
			if (data[i] & 64)
				(void)!write(event[i / 4 & 1], &(uint64_t){1}, sizeof(uint64_t));
			if (data[i] & 32 && cfg.in_exit) {
				let_kickers(w, true);
				w->taker.take(&w->taker);
				let_kickers(w, false);
			}
			/*
			 * Awake, so that net_sleep never sleeps; spinning and lingering take that
			 * from it.
			 */
			(void)!write(w->wake_fd, &(uint64_t){1}, sizeof(uint64_t));
			if (cable)
				(void)cable_wait(w);
			else
				CHECK((cfg.poll_us ? spin(w) : linger(w)) >= 0);
			(void)!write(w->wake_fd, &(uint64_t){1}, sizeof(uint64_t));
			if (!cfg.poll_us)
				CHECK(net_sleep(w) >= 0);
			CHECK(!w->link_down);
		}
	}
	w->stop = 1;
	if (w->held.len && data[3] & 1)
		rx_finish(w);
	serve_end(w);
	let_kickers(w, true);
	for (int q = RX; q <= TX; q++) {
		/* Nothing taken is left: what was popped was pushed and published. */
		CHECK((uint16_t)(w->ring[q].last_avail - w->ring[q].used_next) == ahead[q]);
		CHECK(w->ring[q].used_idx == w->ring[q].used_next);
	}
	pv_net_worker_free(w);
	pv_cable_free(cable);
	cable = NULL;
	far = NULL;
	while (read(pair[0], packet, sizeof(packet)) > 0)
		;
	while (read(pair[1], packet, sizeof(packet)) > 0)
		;
	return 0;
}
