/* SPDX-License-Identifier: MIT */
/*
 * A network without privileges: libslirp between a card and the sockets of this process.
 *
 * Theory of operation
 *
 * libslirp is a TCP/IP stack that ends the guest's connections, and opens others in the host by
 * plain sockets. It is a library of the system, which is looked up when it is needed (dlopen). One
 * thread runs all: it waits for the card's socket and for all sockets of the stack.
 *
 * The card's socket is one end of a pair that keeps packet boundaries. Each frame follows a
 * virtio-net header of 12 bytes, which is empty: the stack has no offloads. To a card that does not
 * take its frames, the stack sends nothing more, and reads nothing more from the host: the socket
 * between them is full. The worker at the other end never waits, so neither end waits for ever.
 *
 * A tap may have the place of the socket: its frames follow the same header, and it never fills up,
 * because the kernel drops what is too much. Then the socket only tells of the card's end.
 */
#ifndef PV_SLIRP_H
#define PV_SLIRP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
/* Addresses are IPv4, in network byte order. */
struct pv_slirp_config {
	int fd;	 /* of the card, SOCK_SEQPACKET, lent */
	int tap; /* has the frames instead, and fd none; lent. -1: there is none */
	uint32_t network;
	uint32_t netmask;
	uint32_t host; /* the gateway */
	uint32_t nameserver;
	uint32_t guest; /* the first that DHCP gives away */
	uint32_t mtu;
	bool loopback; /* the gateway's address stands for the host's 127.0.0.1 */
};
struct pv_slirp_forward {
	bool udp;
	uint16_t host_port; /* host byte order */
	uint16_t guest_port;
	uint32_t host;
	uint32_t guest;
};
struct pv_slirp;

struct pv_slirp *pv_slirp_new(const struct pv_slirp_config *config, char *why, size_t size);
int pv_slirp_forward(struct pv_slirp *s, const struct pv_slirp_forward *forward);
void pv_slirp_input(struct pv_slirp *s, const uint8_t *frame, int len);
int pv_slirp_serve(struct pv_slirp *s);
/* cffi: end */

#endif
