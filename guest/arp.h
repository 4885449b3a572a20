/* SPDX-License-Identifier: MIT */
/* ARP over Ethernet (RFC 826), for guests that ask the host one question. */
#ifndef PYVMM_ARP_H
#define PYVMM_ARP_H

#include "guest.h"

#define ARP_FRAME 60 /* the shortest frame of Ethernet */

struct arp {
	uint8_t to[6], from[6], type[2];
	uint8_t hardware[2], protocol[2], sizes[2], operation[2];
	uint8_t sender[6], sender_ip[4], target[6], target_ip[4];
};

/* Convert A.B.C.D to four bytes. */
static inline void parse_ip(const char *text, uint8_t *ip)
{
	for (int i = 0; i < 4; i++) {
		unsigned int part = 0;

		for (; *text >= '0' && *text <= '9'; text++)
			part = part * 10 + (unsigned int)(*text - '0');
		ip[i] = (uint8_t)part;
		if (*text == '.')
			text++;
	}
}

/* Write a frame of ARP_FRAME bytes: own, which is at mac, asks who has target. */
static inline void arp_request(uint8_t *frame, const uint8_t *mac, const uint8_t *own,
			       const uint8_t *target)
{
	struct arp *a = (struct arp *)frame;

	memset(frame, 0, ARP_FRAME);
	*a = (struct arp){.type = {8, 6},
			  .hardware = {0, 1},
			  .protocol = {8, 0},
			  .sizes = {6, 4},
			  .operation = {0, 1}};
	memset(a->to, 0xff, 6);
	memcpy(a->from, mac, 6);
	memcpy(a->sender, mac, 6);
	memcpy(a->sender_ip, own, 4);
	memcpy(a->target_ip, target, 4);
}

/* Whether a frame is the answer of target to mac. */
static inline bool arp_answers(const uint8_t *frame, uint32_t length, const uint8_t *mac,
			       const uint8_t *target)
{
	static const uint8_t reply[10] = {8, 6, 0, 1, 8, 0, 6, 4, 0, 2};
	const struct arp *a = (const struct arp *)frame;

	return length >= sizeof(*a) && !memcmp(a->type, reply, sizeof(reply)) &&
	       !memcmp(a->to, mac, 6) && !memcmp(a->sender_ip, target, 4);
}

#endif
