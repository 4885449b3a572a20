/* SPDX-License-Identifier: MIT */
/*
 * The hash of a frame's flow, as a driver asks for it (virtio 1.3, 5.1.6.4.3): Toeplitz over
 * addresses and, where the frame has them, ports.
 *
 * Steering by this hash (RSS) is the tap's business, by a program that computes the same
 * (pyvmm/hostnet/steering.py). This is the hash that the driver finds in a packet's header.
 */
#ifndef PV_FLOW_HASH_H
#define PV_FLOW_HASH_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
#define PV_FLOW_KEY_MAX	 40  /* bytes */
#define PV_FLOW_HEAD_MAX 256 /* of a frame only so many bytes are looked at */
/* Tags of VLANs, and extension headers of IPv6, that are skipped. */
#define PV_FLOW_TAGS_MAX       2
#define PV_FLOW_EXTENSIONS_MAX 4

struct pv_flow_hash {
	uint32_t types; /* enabled: 1 << VIRTIO_NET_HASH_TYPE_*; 0: no hash at all */
	/* What each value of each half byte of the longest input contributes. */
	uint32_t part[2 * 36][16];
};

void pv_flow_hash_init(struct pv_flow_hash *h, uint32_t types, const uint8_t *key, size_t len);
uint32_t pv_flow_hash(const struct pv_flow_hash *h, const uint8_t *frame, size_t len,
		      uint16_t *report);
/* cffi: end */

#endif
