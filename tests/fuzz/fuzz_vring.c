/* SPDX-License-Identifier: MIT */
/*
 * Fuzzes the device side of a ring of either format (cext/vring.c, vring_packed.c): memory of two
 * regions is filled from the input, then chains are popped and pushed in an order that the input
 * gives. Checks what must hold whatever the guest writes.
 *
 * Input: base (2 bytes), features (1), operations (13), then the image of the low region.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fuzz.h"
#include "vring.h"

#define BURST 64 /* chains */

static uint8_t *low, *high;

static bool in_ram(const void *p, size_t len)
{
	const uint8_t *at = p;

	return (at >= low && at + len <= low + FUZZ_REGION) ||
	       (at >= high && at + len <= high + FUZZ_REGION);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct iovec iov[PV_CHAIN_MAX];
	struct pv_vring_format format;
	uint32_t ahead, span, slots = 0;
	struct pv_chain chains[BURST + FUZZ_HEADER];
	struct pv_done done[BURST];
	uint32_t most, taken = 0;
	uint16_t base;
	struct pv_memory mem = {.count = 2};
	struct pv_vring vr;
	enum pv_fault fault;

	if (size < FUZZ_HEADER)
		return 0;
	format = (struct pv_vring_format){
		.packed = FUZZ_PACKED(data), .indirect = data[2] & 1, .event_idx = data[2] & 2};
	span = format.packed ? 2 * FUZZ_SIZE : 65536;
	/* Each region is an allocation of its own: ASan sees a byte too far. */
	if (!low) {
		low = aligned_alloc(4096, FUZZ_REGION);
		high = aligned_alloc(4096, FUZZ_REGION);
		CHECK(low && high);
	}
	memcpy(low, data + FUZZ_HEADER,
	       size - FUZZ_HEADER < FUZZ_IMAGE ? size - FUZZ_HEADER : FUZZ_IMAGE);
	mem.region[0] = (struct pv_mem_region){.gpa = 0, .size = FUZZ_REGION, .host = low};
	mem.region[1] = (struct pv_mem_region){.gpa = FUZZ_HIGH, .size = FUZZ_REGION, .host = high};
	memcpy(&base, data, sizeof(base));
	fault = pv_vring_init(&vr, &mem, FUZZ_SIZE, FUZZ_DESC(0), FUZZ_AVAIL(0), FUZZ_USED(0),
			      format.packed ? FUZZ_POSITION(base) : base, format);
	CHECK(fault == PV_FAULT_NONE);
	/* A guest may have scribbled over the used index; then the difference stays. */
	ahead = (vr.last_avail + span - vr.used_next) % span;
	CHECK(!format.packed || !ahead);
	for (uint32_t i = 3; i < FUZZ_HEADER; i++) {
		struct pv_chain c;
		enum pv_step step;

		switch (data[i] & 7) {
		default:
			step = pv_vring_pop(&vr, iov, data[i] & 0x80 ? 4 : PV_CHAIN_MAX, &c);
			CHECK((step == PV_BAD) == (vr.fault != PV_FAULT_NONE));
			if (step != PV_MORE)
				break;
			CHECK(format.packed || (c.head < FUZZ_SIZE && c.slots == 1));
			slots += c.slots;
			CHECK(!format.packed || slots <= FUZZ_SIZE);
			CHECK(c.out_num + c.in_num >= 1);
			for (uint32_t k = 0; k < (uint32_t)c.out_num + c.in_num; k++) {
				CHECK(iov[k].iov_len);
				CHECK(in_ram(iov[k].iov_base, iov[k].iov_len));
			}
			chains[taken++] = c;
			break;
		case 7:
			most = taken < BURST ? BURST - taken : 0;
			if (most > data[i] >> 3)
				most = data[i] >> 3;
			most = pv_vring_pop_burst(&vr, iov, chains + taken, most);
			CHECK(!vr.fault || !most);
			for (uint32_t k = 0; k < most; k++) {
				c = chains[taken++];
				CHECK(format.packed || c.head < FUZZ_SIZE);
				CHECK(c.slots == 1 && c.out_num + c.in_num == 1);
				CHECK(iov[k].iov_len && in_ram(iov[k].iov_base, iov[k].iov_len));
			}
			slots += most;
			CHECK(!format.packed || slots <= FUZZ_SIZE);
			break;
		case 1:
			for (most = 0; taken && most < BURST; most++) {
				c = chains[--taken];
				done[most] = (struct pv_done){c.head, c.slots, data[i]};
				slots -= c.slots;
			}
			pv_vring_push_burst(&vr, done, most);
			break;
		case 2:
			while (taken && taken > (data[i] >> 5)) {
				c = chains[--taken];
				pv_vring_push(&vr, c.head, c.slots, data[i]);
				slots -= c.slots;
			}
			break;
		case 3:
			if (taken) {
				pv_vring_unpop(&vr, chains[--taken].slots);
				slots -= chains[taken].slots;
			}
			break;
		case 4:
			(void)pv_vring_flush(&vr);
			break;
		case 5:
			(void)pv_vring_enable_notify(&vr);
			break;
		case 6:
			pv_vring_disable_notify(&vr);
			/* The guest goes on meanwhile. */
			if (format.packed)
				fuzz_toggle(low + FUZZ_DESC(0), data[i]);
			else
				memcpy(low + FUZZ_AVAIL(0) + 2, &data[i], 1);
			break;
		}
		CHECK((vr.last_avail + span - vr.used_next) % span == (ahead + slots) % span);
	}
	CHECK(pv_vring_init(&vr, &mem, data[3] * 257u, (uint64_t)data[4] << (data[5] & 63),
			    (uint64_t)data[6] << (data[7] & 63),
			    (uint64_t)data[8] << (data[9] & 63), base | (uint32_t)base << 16,
			    format) < PV_FAULT_COUNT);
	return 0;
}
