/* SPDX-License-Identifier: MIT */
#include "flow_hash.h"

#include <linux/if_ether.h>
#include <linux/virtio_net.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <string.h>

#define IPV4_MIN   20
#define IPV6_LEN   40
#define FRAGMENTED 0x3fff /* of IPv4: more fragments, or an offset */

static uint16_t half(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

/**
 * pv_flow_hash_init() - Prepare for a key
 * @h:		Filled in
 * @types:	Enabled: 1 << VIRTIO_NET_HASH_TYPE_*, of IPv4, IPv6, and TCP and UDP over each
 * @key:	The secret key
 * @len:	Its length in bytes, at most PV_FLOW_KEY_MAX; what is missing counts as zeros
 */
void pv_flow_hash_init(struct pv_flow_hash *h, uint32_t types, const uint8_t *key, size_t len)
{
	uint8_t k[PV_FLOW_KEY_MAX] = {0};

	memcpy(k, key, len < sizeof(k) ? len : sizeof(k));
	*h = (struct pv_flow_hash){.types = types};
	for (size_t i = 0; i < sizeof(h->part) / sizeof(h->part[0]); i++) {
		uint64_t at = 0; /* 40 bits of the key from the byte of this half byte on */

		for (size_t b = 0; b < 5; b++)
			at = at << 8 | (i / 2 + b < sizeof(k) ? k[i / 2 + b] : 0);
		for (uint32_t value = 0; value < 16; value++)
			for (uint32_t bit = 0; bit < 4; bit++)
				if (value & 8u >> bit)
					h->part[i][value] ^=
						(uint32_t)(at >> (8 - 4 * (i % 2) - bit));
	}
}

/* Add bytes to a hash; at is how many came before. */
static uint32_t hash_add(const struct pv_flow_hash *h, uint32_t hash, size_t at,
			 const uint8_t *from, size_t len)
{
	for (size_t i = 0; i < len; i++) {
		hash ^= h->part[2 * (at + i)][from[i] >> 4];
		hash ^= h->part[2 * (at + i) + 1][from[i] & 15];
	}
	return hash;
}

/* Where the transport header of an IPv6 packet begins, and what kind it is; 0 as kind: none. */
static size_t skip_extensions(const uint8_t *frame, size_t at, size_t len, uint8_t *kind)
{
	uint8_t next = frame[at + 6];

	at += IPV6_LEN;
	for (int i = 0; i < PV_FLOW_EXTENSIONS_MAX && at + 2 <= len; i++) {
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS)
			break;
		next = frame[at];
		at += 8 * (1 + (size_t)frame[at + 1]);
	}
	*kind = next;
	return at;
}

/**
 * pv_flow_hash() - Hash a frame
 * @h:		Initialised
 * @frame:	Its first bytes, beginning with the Ethernet header
 * @len:	How many; more than PV_FLOW_HEAD_MAX are not looked at
 * @report:	Filled in: VIRTIO_NET_HASH_REPORT_*
 *
 * Return: the hash; 0 with VIRTIO_NET_HASH_REPORT_NONE if no enabled type applies
 */
uint32_t pv_flow_hash(const struct pv_flow_hash *h, const uint8_t *frame, size_t len,
		      uint16_t *report)
{
	size_t at = 2 * ETH_ALEN, from, addresses, transport;
	bool v4, ports;
	uint32_t tcp, udp, ip, hash;
	uint8_t kind;

	*report = VIRTIO_NET_HASH_REPORT_NONE;
	if (len > PV_FLOW_HEAD_MAX)
		len = PV_FLOW_HEAD_MAX;
	if (!h->types || len < ETH_HLEN)
		return 0;
	for (int i = 0; i < PV_FLOW_TAGS_MAX; i++) {
		if (half(frame + at) != ETH_P_8021Q && half(frame + at) != ETH_P_8021AD)
			break;
		at += 4;
		if (at + 2 > len)
			return 0;
	}
	v4 = half(frame + at) == ETH_P_IP;
	if (!v4 && half(frame + at) != ETH_P_IPV6)
		return 0;
	at += 2;
	if (at + (v4 ? IPV4_MIN : IPV6_LEN) > len)
		return 0;
	if (v4) {
		from = at + 12;
		addresses = 8;
		kind = half(frame + at + 6) & FRAGMENTED ? 0 : frame[at + 9];
		transport = at + 4 * (frame[at] & 15u);
		if (transport < at + IPV4_MIN)
			return 0;
	} else {
		from = at + 8;
		addresses = 32;
		transport = skip_extensions(frame, at, len, &kind);
	}
	tcp = v4 ? VIRTIO_NET_RSS_HASH_TYPE_TCPv4 : VIRTIO_NET_RSS_HASH_TYPE_TCPv6;
	udp = v4 ? VIRTIO_NET_RSS_HASH_TYPE_UDPv4 : VIRTIO_NET_RSS_HASH_TYPE_UDPv6;
	ip = v4 ? VIRTIO_NET_RSS_HASH_TYPE_IPv4 : VIRTIO_NET_RSS_HASH_TYPE_IPv6;
	ports = transport + 4 <= len && ((kind == IPPROTO_TCP && h->types & tcp) ||
					 (kind == IPPROTO_UDP && h->types & udp));
	if (!ports && !(h->types & ip))
		return 0;
	hash = hash_add(h, 0, 0, frame + from, addresses);
	*report = v4 ? VIRTIO_NET_HASH_REPORT_IPv4 : VIRTIO_NET_HASH_REPORT_IPv6;
	if (!ports)
		return hash;
	*report = (uint16_t)(*report + (kind == IPPROTO_TCP ? 1 : 2));
	return hash_add(h, hash, addresses, frame + transport, 4);
}
