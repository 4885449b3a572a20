/* SPDX-License-Identifier: MIT */
/*
 * Captures: copies of a card's packets, from where they change hands to a pcapng file.
 *
 * Theory of operation
 *
 * A capture has sources, and one reader that makes pcapng blocks of what they have, in the order of
 * time. There are two kinds of sources:
 *
 * - A ring in memory, which one worker (net_worker.h) fills as it hands packets over. It copies a
 *   packet that the filter wants, with its virtio_net_hdr, and never waits: if there is no room,
 *   the packet is counted as lost. The worker makes a system call only if the reader sleeps, or if
 *   the ring is half full.
 * - A packet socket on a tap (packet(7), TPACKET_V3), for data paths of the kernel and of other
 *   processes: hostnet.packets makes the socket, and the kernel fills a ring that is mapped here.
 *   The kernel runs the filter, but it cannot see the VLAN tag of a frame, which it keeps beside
 *   the frame. So it lets frames with a tag pass, and they are filtered here, when the tag is in
 *   its place again.
 *
 * The reader is one thread at a time: it calls pv_capture_drain() with room for blocks, and
 * pv_capture_ask() before it sleeps. Memory is bounded by the rings.
 *
 * A packet becomes an Enhanced Packet Block (draft-ietf-opsawg-pcapng, section 4.3) with the
 * options epb_flags (direction), epb_queue (at the ring: index of the virtqueue), epb_dropcount
 * (packets lost just before) and opt_comment (the virtio_net_hdr, if it says anything).
 */
#ifndef PV_CAPTURE_H
#define PV_CAPTURE_H

#include "filter.h"

/* cffi: begin */
#define PV_CAPTURES	    4	    /* at most so many captures of a worker at a time */
#define PV_CAPTURE_SNAPLEN  262144  /* the largest snaplen, longer than any frame */
#define PV_CAPTURE_RING	    4194304 /* bytes of a ring that a worker fills */
#define PV_CAPTURE_ROOM	    1048576 /* a good size for pv_capture_drain() */
#define PV_CAPTURE_BLOCK    262144  /* the kernel's ring: bytes of a block, */
#define PV_CAPTURE_BLOCKS   32	    /* their number, */
#define PV_CAPTURE_BLOCK_MS 10	    /* and milliseconds until a block is shown that has room */
#define PV_CAPTURE_COMMENT  256

struct pv_capture_counts {
	uint64_t seen;	   /* packets that the filter has looked at; of a socket: has let pass */
	uint64_t accepted; /* packets that the filter wants */
	uint64_t lost;	   /* of these, packets for which there was no room, or discarded */
};

struct pv_capture;

struct pv_capture *pv_capture_ring(uint32_t interface, uint32_t snaplen, const void *filter,
				   uint32_t count, int wake_fd);
struct pv_capture *pv_capture_socket(uint32_t interface, uint32_t snaplen, const void *filter,
				     uint32_t count, int fd, bool mirrored);
int pv_capture_open(int fd, uint32_t interface_index);
int pv_capture_filter(int fd, uint32_t snaplen, const void *filter, uint32_t count);
void pv_capture_only(struct pv_capture *c, uint32_t queue);
void pv_capture_free(struct pv_capture *c);
size_t pv_capture_drain(struct pv_capture **from, uint32_t count, uint64_t now, uint64_t hold,
			uint8_t *out, size_t size);
uint32_t pv_capture_discard(struct pv_capture **from, uint32_t count, uint32_t max);
bool pv_capture_ask(struct pv_capture *c);
void pv_capture_note(struct pv_capture *c, uint64_t ts, const char *text);
const char *pv_capture_noted(const struct pv_capture *c, uint32_t number);
void pv_capture_count(struct pv_capture *c, struct pv_capture_counts *out);
/* cffi: end */

/* A packet that a worker hands over, beside its segments. */
struct pv_capture_packet {
	uint64_t ts;	  /* CLOCK_REALTIME, nanoseconds */
	uint16_t queue;	  /* index of the virtqueue; odd: the guest sends */
	uint16_t hdr_len; /* bytes of the virtio_net_hdr */
};

void pv_capture_put(struct pv_capture *c, const struct pv_capture_packet *p,
		    const struct iovec *iov, size_t len);

/* CLOCK_REALTIME in nanoseconds. */
static inline uint64_t pv_real_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_REALTIME, &t);
	return pv_ns(&t);
}

#endif
