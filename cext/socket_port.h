/* SPDX-License-Identifier: MIT */
/*
 * Moves frames between a card's worker and a socket of somebody else's.
 *
 * Theory of operation
 *
 * The worker (net_worker.h) wants sockets that keep packet boundaries, with a virtio-net header
 * before each frame. Other programs have no such headers: a UNIX datagram or seqpacket socket of
 * theirs carries one frame per packet, and a stream socket has four bytes with the length of the
 * frame, in network byte order, before each frame (QEMU's "stream", passt, vde_plug). So a thread
 * stands between a pair of sockets, whose other end is the worker's, and that socket.
 *
 * The thread has room for one frame per direction, or, of a stream, for what one call returns. It
 * reads from one side what the other side has taken: nothing is dropped but packets that are no
 * frames, and whoever sends too fast finds its socket full. It ends when either side closes its
 * socket, and then closes the worker's for it. The peer is not trusted: a length that no frame has
 * ends the thread, too.
 */
#ifndef PV_SOCKET_PORT_H
#define PV_SOCKET_PORT_H

#include "thread.h"

/* cffi: begin */
/* Why the thread has ended. */
enum pv_socket_end {
	PV_SOCKET_SERVES, /* it has not */
	PV_SOCKET_LEFT,	  /* the worker's end was closed */
	PV_SOCKET_CLOSED, /* the peer has closed its socket */
	PV_SOCKET_LENGTH, /* value: the length that a frame cannot have */
	PV_SOCKET_ERROR,  /* value: errno of the peer's socket */
	PV_SOCKET_STOPPED /* value: number of a system call that the thread may not make */
};

struct pv_socket_config {
	int fd;	  /* of the peer, connected, lent; it may block */
	int type; /* of fd: SOCK_DGRAM, SOCK_SEQPACKET, or SOCK_STREAM: lengths are before frames */
	int inner;     /* SOCK_SEQPACKET, whose other end is the worker's; lent */
	char name[16]; /* of the thread */
};

struct pv_socket_report {
	enum pv_socket_end end;
	uint32_t value;
	uint64_t dropped; /* packets that were no frames */
};

struct pv_socket_port;

struct pv_socket_port *pv_socket_port_new(const struct pv_socket_config *cfg, int *error);
void pv_socket_port_report(const struct pv_socket_port *p, struct pv_socket_report *out);
void pv_socket_port_free(struct pv_socket_port *p);
/* cffi: end */

#endif
