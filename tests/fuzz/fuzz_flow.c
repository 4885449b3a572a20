/* SPDX-License-Identifier: MIT */
/*
 * Fuzzes the hash of a frame's flow (cext/flow_hash.c). Input: types (1 byte), how much of the frame
 * there is (1), the key (8), the frame.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/virtio_net.h>

#include "flow_hash.h"
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct pv_flow_hash h;
	uint16_t report = 99, again = 99;
	uint32_t hash, other;
	uint8_t *frame;
	size_t len;

	if (size < 10)
		return 0;
	pv_flow_hash_init(&h, data[0], data + 2, 8);
	data += 10;
	size -= 10;
	len = size > PV_FLOW_HEAD_MAX ? PV_FLOW_HEAD_MAX : size;
	/* An allocation of its own: ASan sees a byte too far. */
	frame = malloc(size);
	if (!frame && size)
		return 0;
	memcpy(frame, data, size);
	hash = pv_flow_hash(&h, frame, size, &report);
	other = pv_flow_hash(&h, frame, len, &again); /* what lies beyond has no effect */
	if (report > VIRTIO_NET_HASH_REPORT_UDPv6 || hash != other || report != again ||
	    (report == VIRTIO_NET_HASH_REPORT_NONE && hash)) {
		fprintf(stderr, "report %u and %u, hash %x and %x\n", report, again, hash, other);
		abort();
	}
	free(frame);
	return 0;
}
