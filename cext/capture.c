/* SPDX-License-Identifier: MIT */
#include "capture.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "event.h"

#define NOTES	    8	       /* that wait for their packets */
#define HDR_MAX	    24	       /* struct virtio_net_hdr_v1_hash_tunnel */
#define SOCKET_HDR  10	       /* struct virtio_net_hdr: what PACKET_VNET_HDR puts in front */
#define ADDRESSES   12	       /* of a frame, before a VLAN tag */
#define TAG	    4	       /* bytes of a VLAN tag */
#define SKIP	    UINT64_MAX /* in the place of a time: the ring goes on at its beginning */
#define KERNEL_RING ((size_t)PV_CAPTURE_BLOCK * PV_CAPTURE_BLOCKS)
/* Flags of virtio_net_hdr, and gso_type, that older headers lack. */
#define F_UDP_TUNNEL_CSUM 8
#define GSO_UDP_L4	  5
#define GSO_TUNNEL_IPV4	  0x20
#define GSO_TUNNEL_IPV6	  0x40
/* pcapng */
#define EPB	      6
#define EPB_FLAGS     2
#define EPB_DROPCOUNT 4
#define EPB_QUEUE     6
#define OPT_COMMENT   1
#define INBOUND	      1
#define OUTBOUND      2
/* All of a block but data and comment, and the longest comment: a note and a header. */
#define TEXT	    (NOTES * PV_CAPTURE_COMMENT + 320)
#define BLOCK_EXTRA (28 + 8 + 12 + 8 + 4 + 4 + TEXT)

/* What comes before a packet's bytes in a ring. */
struct record {
	uint64_t ts; /* or SKIP; then there is nothing else */
	uint32_t size;
	uint32_t caplen;
	uint32_t len;
	uint32_t lost;
	uint16_t queue;
	uint16_t hdr_len;
	uint32_t pad;
	uint8_t hdr[HDR_MAX];
};

/* A packet as the reader sees it; the pointers lead into the ring. */
struct view {
	uint64_t ts;
	const uint8_t *data[3]; /* in three pieces, the last two of which may be empty */
	uint32_t size[3];
	uint32_t len; /* of the frame */
	uint32_t lost;
	int queue; /* -1: not known */
	bool inbound;
	uint32_t hdr_len;
	uint8_t hdr[HDR_MAX];
	uint8_t tag[TAG];
};

/* A comment for the first packet from a time on. */
struct note {
	uint64_t ts;
	char text[PV_CAPTURE_COMMENT];
};

struct pv_capture {
	uint32_t interface;
	uint32_t snaplen;
	struct sock_filter *filter; /* NULL: all packets are wanted */
	/* The reader's. */
	uint64_t discarded;
	bool peeked; /* view is the next packet */
	struct view view;
	struct note note[NOTES]; /* in the order of time */
	uint32_t notes;
	/* A ring. */
	uint8_t *ring; /* NULL: a socket */
	int wake_fd;
	uint64_t head;	    /* atomic; bytes written so far, by the worker */
	uint64_t tail;	    /* atomic; bytes read so far, by the reader */
	uint64_t told;	    /* the tail when the reader was told that the ring is half full */
	uint32_t lost_here; /* packets lost after the last that is in the ring */
	uint32_t only;	    /* the only virtqueue's index, plus 1; 0: all */
	uint32_t asked;	    /* atomic; the reader sleeps */
	struct pv_capture_counts count;
	/* A socket. */
	int fd;
	bool mirrored; /* it sends what the guest sends */
	uint8_t *map;
	uint32_t block;			   /* the next block */
	uint32_t left;			   /* packets left in it; 0: it has not been opened */
	const struct tpacket3_hdr *packet; /* the next of these */
};

static void add(uint64_t *counter, uint64_t n)
{
	__atomic_store_n(counter, *counter + n, __ATOMIC_RELAXED);
}

static uint64_t align(uint64_t n, uint64_t to)
{
	return (n + to - 1) & ~(to - 1);
}

static struct pv_capture *new_source(uint32_t interface, uint32_t snaplen, const void *filter,
				     uint32_t count)
{
	struct pv_capture *c;

	if (!snaplen || snaplen > PV_CAPTURE_SNAPLEN || (count && !pv_filter_check(filter, count)))
		return NULL;
	c = calloc(1, sizeof(*c));
	if (!c)
		return NULL;
	c->interface = interface;
	c->snaplen = snaplen;
	c->fd = c->wake_fd = -1;
	if (!count)
		return c;
	c->filter = calloc(count, sizeof(*c->filter));
	if (!c->filter) {
		free(c);
		return NULL;
	}
	memcpy(c->filter, filter, count * sizeof(*c->filter));
	return c;
}

/**
 * pv_capture_ring() - Make a source that a worker fills
 * @interface:	Number of the interface in the file
 * @snaplen:	Bytes to keep of each packet at most, 1 to PV_CAPTURE_SNAPLEN
 * @filter:	Instructions, struct sock_filter each, copied
 * @count:	How many; 0: all packets are wanted
 * @wake_fd:	Eventfd of ours, to wake the reader by; lent
 *
 * Return: the source, to be freed; NULL if memory is short or the filter is malformed
 */
struct pv_capture *pv_capture_ring(uint32_t interface, uint32_t snaplen, const void *filter,
				   uint32_t count, int wake_fd)
{
	struct pv_capture *c = new_source(interface, snaplen, filter, count);
	void *ring;

	if (!c)
		return NULL;
	c->wake_fd = wake_fd;
	ring = mmap(NULL, PV_CAPTURE_RING, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		    0);
	if (ring == MAP_FAILED) {
		pv_capture_free(c);
		return NULL;
	}
	c->ring = ring;
	return c;
}

/**
 * pv_capture_socket() - Make a source of a packet socket
 * @interface:	As for pv_capture_ring(), and so are @snaplen, @filter and @count
 * @fd:		From pv_capture_open(); lent
 * @mirrored:	The interface is a macvtap: what the guest sends, the interface sends, too. Of a
 *		tap, the interface receives it.
 *
 * Return: as pv_capture_ring(), or NULL because the socket has no ring
 */
struct pv_capture *pv_capture_socket(uint32_t interface, uint32_t snaplen, const void *filter,
				     uint32_t count, int fd, bool mirrored)
{
	struct pv_capture *c = new_source(interface, snaplen, filter, count);
	void *map;

	if (!c)
		return NULL;
	c->fd = fd;
	c->mirrored = mirrored;
	map = mmap(NULL, KERNEL_RING, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED) {
		pv_capture_free(c);
		return NULL;
	}
	c->map = map;
	return c;
}

/**
 * pv_capture_free() - Free a source
 * @c:		Neither a worker nor a reader uses it any more; may be NULL
 */
void pv_capture_free(struct pv_capture *c)
{
	if (!c)
		return;
	if (c->ring)
		munmap(c->ring, PV_CAPTURE_RING);
	if (c->map)
		munmap(c->map, KERNEL_RING);
	free(c->filter);
	free(c);
}

/* --- a packet socket ------------------------------------------------------------------------- */

/**
 * pv_capture_open() - Give a packet socket its ring, and let it hear an interface
 * @fd:		Of socket(AF_PACKET, SOCK_RAW, 0)
 * @interface_index:	Of the interface, in the socket's network namespace
 *
 * The socket takes no packets until pv_capture_filter().
 *
 * Return: 0 or -errno
 */
int pv_capture_open(int fd, uint32_t interface_index)
{
	const int version = TPACKET_V3, on = 1;
	const struct tpacket_req3 ring = {.tp_block_size = PV_CAPTURE_BLOCK,
					  .tp_block_nr = PV_CAPTURE_BLOCKS,
					  .tp_frame_size = 2048,
					  .tp_frame_nr = KERNEL_RING / 2048,
					  .tp_retire_blk_tov = PV_CAPTURE_BLOCK_MS};
	const struct sockaddr_ll where = {.sll_family = AF_PACKET,
					  .sll_protocol = htons(ETH_P_ALL),
					  .sll_ifindex = (int)interface_index};
	int error = pv_capture_filter(fd, 0, NULL, 0);

	if (error)
		return error;
	if (setsockopt(fd, SOL_PACKET, PACKET_VERSION, &version, sizeof(version)) ||
	    setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &on, sizeof(on)) ||
	    setsockopt(fd, SOL_PACKET, PACKET_RX_RING, &ring, sizeof(ring)) ||
	    bind(fd, (const struct sockaddr *)&where, sizeof(where)))
		return -errno;
	return 0;
}

/**
 * pv_capture_filter() - Let a packet socket take what a filter wants
 * @fd:		From pv_capture_open()
 * @snaplen:	Bytes that the kernel copies of a packet at most; 0: it takes no packet any more
 * @filter:	Instructions that pv_filter_check() has accepted
 * @count:	How many; 0: all packets are wanted
 *
 * Return: 0 or -errno
 */
int pv_capture_filter(int fd, uint32_t snaplen, const void *filter, uint32_t count)
{
	struct sock_filter all = BPF_STMT(BPF_RET | BPF_K, snaplen);
	struct sock_fprog prog = {.len = 1, .filter = &all};
	struct sock_filter *tagged = NULL;
	int error = 0;

	if (count && snaplen) {
		if (count > PV_FILTER_MAX)
			return -EINVAL;
		tagged = calloc(count + 3, sizeof(*tagged));
		if (!tagged)
			return -ENOMEM;
		/* A frame whose tag is beside it passes. See the theory of operation. */
		tagged[0] = (struct sock_filter)BPF_STMT(
			BPF_LD | BPF_B | BPF_ABS, (uint32_t)SKF_AD_OFF + SKF_AD_VLAN_TAG_PRESENT);
		tagged[1] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, 0);
		tagged[2] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, PV_CAPTURE_SNAPLEN);
		memcpy(&tagged[3], filter, count * sizeof(*tagged));
		prog = (struct sock_fprog){.len = (uint16_t)(count + 3), .filter = tagged};
	}
	if (setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &prog, sizeof(prog)))
		error = -errno;
	free(tagged);
	return error;
}

static struct tpacket_hdr_v1 *block_of(const struct pv_capture *c)
{
	uint8_t *at = c->map + (size_t)c->block * PV_CAPTURE_BLOCK;

	return &((struct tpacket_block_desc *)(void *)at)->hdr.bh1;
}

static const struct tpacket3_hdr *packet_at(const void *from, uint32_t offset)
{
	return (const void *)((const uint8_t *)from + offset);
}

/* Go on to the next packet of the block, or give the block back to the kernel. */
static void socket_next(struct pv_capture *c)
{
	if (--c->left) {
		c->packet = packet_at(c->packet, c->packet->tp_next_offset);
		return;
	}
	__atomic_store_n(&block_of(c)->block_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
	c->block = (c->block + 1) % PV_CAPTURE_BLOCKS;
}

/* Whether there is a packet; opens the next block if need be. */
static bool socket_packet(struct pv_capture *c)
{
	while (!c->left) {
		struct tpacket_hdr_v1 *b = block_of(c);

		if (!(__atomic_load_n(&b->block_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER))
			return false;
		c->left = b->num_pkts;
		if (c->left) {
			uint8_t *at = c->map + (size_t)c->block * PV_CAPTURE_BLOCK;

			c->packet = packet_at(at, b->offset_to_first_pkt);
			break;
		}
		c->left = 1; /* an empty block */
		socket_next(c);
	}
	return true;
}

/* A header's field of two bytes, moved by the VLAN tag that goes into the frame. */
static void shift(uint8_t *field)
{
	uint16_t value;

	memcpy(&value, field, sizeof(value));
	value = (uint16_t)(value + TAG);
	memcpy(field, &value, sizeof(value));
}

/* Put the VLAN tag where it belongs. */
static void socket_tag(struct view *v, const struct tpacket3_hdr *p)
{
	uint16_t tpid = p->tp_status & TP_STATUS_VLAN_TPID_VALID ? p->hv1.tp_vlan_tpid
								 : (uint16_t)ETH_P_8021Q;
	uint32_t tci = p->hv1.tp_vlan_tci;

	v->tag[0] = (uint8_t)(tpid >> 8);
	v->tag[1] = (uint8_t)tpid;
	v->tag[2] = (uint8_t)(tci >> 8);
	v->tag[3] = (uint8_t)tci;
	v->data[2] = v->data[0] + ADDRESSES;
	v->size[2] = v->size[0] - ADDRESSES;
	v->data[1] = v->tag;
	v->size[1] = TAG;
	v->size[0] = ADDRESSES;
	v->len += TAG;
	if (v->hdr[1]) /* gso_type */
		shift(&v->hdr[2]);
	if (v->hdr[0] & VIRTIO_NET_HDR_F_NEEDS_CSUM)
		shift(&v->hdr[6]);
}

/* Cut what is more than max bytes. */
static void cut(struct view *v, uint32_t max)
{
	for (int i = 0; i < 3; i++) {
		if (v->size[i] > max)
			v->size[i] = max;
		max -= v->size[i];
	}
}

/* Whether the packet is wanted; cuts it to what is to be kept. */
static bool socket_wanted(struct pv_capture *c, struct view *v)
{
	uint32_t keep = c->snaplen, have = 0;
	struct iovec iov[3];

	for (int i = 0; i < 3; i++) {
		iov[i] = (struct iovec){.iov_base = (void *)(uintptr_t)v->data[i],
					.iov_len = v->size[i]};
		have += v->size[i];
	}
	if (c->filter && v->size[1])
		keep = pv_filter_run(c->filter, iov, 0, have);
	cut(v, keep < c->snaplen ? keep : c->snaplen);
	return keep;
}

static bool socket_peek(struct pv_capture *c)
{
	struct view *v = &c->view;

	while (socket_packet(c)) {
		const struct tpacket3_hdr *p = c->packet;
		const uint8_t *data = (const uint8_t *)p + p->tp_mac;
		const struct sockaddr_ll *from =
			(const void *)((const uint8_t *)p + align(sizeof(*p), TPACKET_ALIGNMENT));

		*v = (struct view){.ts = p->tp_sec * 1000000000ull + p->tp_nsec,
				   .data = {data},
				   .size = {p->tp_snaplen},
				   .len = p->tp_len,
				   .queue = -1,
				   .inbound = (from->sll_pkttype == PACKET_OUTGOING) != c->mirrored,
				   .hdr_len = SOCKET_HDR};
		memcpy(v->hdr, data - SOCKET_HDR, SOCKET_HDR);
		if (p->tp_status & TP_STATUS_VLAN_VALID && v->size[0] >= ADDRESSES)
			socket_tag(v, p);
		if (socket_wanted(c, v))
			return true;
		socket_next(c);
	}
	return false;
}

/* --- a worker's ring -------------------------------------------------------------------------- */

/* Wake the reader if it sleeps, or if the ring has become half full. */
static void wake(struct pv_capture *c, uint64_t tail)
{
	bool sleeps = false;

	/* Either the reader sees the head after it has asked, or asked is seen here. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(&c->asked, __ATOMIC_RELAXED) &&
	    __atomic_exchange_n(&c->asked, 0, __ATOMIC_RELAXED))
		sleeps = true;
	else if (c->head - tail < PV_CAPTURE_RING / 2 || c->told == tail)
		return;
	if (!sleeps)
		c->told = tail;
	pv_event_signal(c->wake_fd);
}

/**
 * pv_capture_only() - Have a ring take the packets of one virtqueue only
 * @c:		From pv_capture_ring(), which no worker has yet
 * @queue:	The virtqueue's index
 */
void pv_capture_only(struct pv_capture *c, uint32_t queue)
{
	c->only = queue + 1;
}

/**
 * pv_capture_put() - Copy a packet into a ring
 * @c:		From pv_capture_ring()
 * @p:		Facts about the packet
 * @iov:	Segments with the packet
 * @len:	Its bytes, header included
 *
 * One thread at a time. Never waits; a packet for which there is no room is counted.
 */
void pv_capture_put(struct pv_capture *c, const struct pv_capture_packet *p,
		    const struct iovec *iov, size_t len)
{
	uint64_t head = c->head, tail = __atomic_load_n(&c->tail, __ATOMIC_ACQUIRE);
	uint64_t at = head % PV_CAPTURE_RING, skip = 0, need;
	uint32_t keep = c->snaplen, got;
	struct record *r;

	if (c->only && c->only != p->queue + 1u)
		return;
	len -= p->hdr_len;
	add(&c->count.seen, 1);
	if (c->filter) {
		got = pv_filter_run(c->filter, iov, p->hdr_len, len);
		if (!got)
			return;
		keep = got < keep ? got : keep;
	}
	if (keep > len)
		keep = (uint32_t)len;
	add(&c->count.accepted, 1);
	need = align(sizeof(*r) + keep, 8);
	if (PV_CAPTURE_RING - at < need)
		skip = PV_CAPTURE_RING - at;
	if (skip + need > PV_CAPTURE_RING - (head - tail)) {
		add(&c->count.lost, 1);
		c->lost_here++;
		wake(c, tail);
		return;
	}
	if (skip) {
		memcpy(c->ring + at, &(uint64_t){SKIP}, sizeof(uint64_t));
		at = 0;
	}
	r = (struct record *)(void *)(c->ring + at);
	*r = (struct record){.ts = p->ts,
			     .size = (uint32_t)need,
			     .caplen = keep,
			     .len = (uint32_t)len,
			     .lost = c->lost_here,
			     .queue = p->queue,
			     .hdr_len = p->hdr_len};
	pv_segments_load(iov, 0, r->hdr, p->hdr_len < HDR_MAX ? p->hdr_len : HDR_MAX);
	pv_segments_load(iov, p->hdr_len, (uint8_t *)(r + 1), keep);
	c->lost_here = 0;
	/* Release: the reader that sees the head sees the record. */
	__atomic_store_n(&c->head, head + skip + need, __ATOMIC_RELEASE);
	wake(c, tail);
}

/* Where the reader is in the ring; NULL if it has read all of it. */
static const struct record *ring_record(struct pv_capture *c)
{
	uint64_t head = __atomic_load_n(&c->head, __ATOMIC_ACQUIRE);
	uint64_t at = c->tail % PV_CAPTURE_RING;
	const struct record *r = (const void *)(c->ring + at);

	if (c->tail == head)
		return NULL;
	if (r->ts == SKIP) { /* the worker writes it together with the record behind it */
		__atomic_store_n(&c->tail, c->tail + PV_CAPTURE_RING - at, __ATOMIC_RELEASE);
		r = (const void *)c->ring;
	}
	return r;
}

static bool ring_peek(struct pv_capture *c)
{
	const struct record *r = ring_record(c);
	struct view *v = &c->view;

	if (!r)
		return false;
	*v = (struct view){.ts = r->ts,
			   .data = {(const uint8_t *)(r + 1)},
			   .size = {r->caplen},
			   .len = r->len,
			   .lost = r->lost,
			   .queue = r->queue,
			   .inbound = !(r->queue & 1),
			   .hdr_len = r->hdr_len};
	memcpy(v->hdr, r->hdr, HDR_MAX);
	return true;
}

static void ring_next(struct pv_capture *c)
{
	const struct record *r = (const void *)(c->ring + c->tail % PV_CAPTURE_RING);

	__atomic_store_n(&c->tail, c->tail + r->size, __ATOMIC_RELEASE);
}

/* --- the reader ------------------------------------------------------------------------------- */

static const struct {
	uint8_t bit;
	const char *name;
} flags[] = {{VIRTIO_NET_HDR_F_NEEDS_CSUM, "NEEDS_CSUM"},
	     {VIRTIO_NET_HDR_F_DATA_VALID, "DATA_VALID"},
	     {4, "RSC_INFO"},
	     {F_UDP_TUNNEL_CSUM, "UDP_TUNNEL_CSUM"}};

static const struct {
	uint8_t value;
	const char *name;
} types[] = {{VIRTIO_NET_HDR_GSO_NONE, "NONE"},
	     {VIRTIO_NET_HDR_GSO_TCPV4, "TCPV4"},
	     {VIRTIO_NET_HDR_GSO_UDP, "UDP"},
	     {VIRTIO_NET_HDR_GSO_TCPV6, "TCPV6"},
	     {GSO_UDP_L4, "UDP_L4"}};

/* Add text to a buffer, as far as there is room; returns the new length. */
static __attribute__((format(printf, 4, 5))) size_t say(char *out, size_t size, size_t at,
							const char *format, ...)
{
	va_list args;
	int n;

	va_start(args, format);
	n = vsnprintf(out + at, size - at, format, args);
	va_end(args);
	return n > 0 && at + (size_t)n < size ? at + (size_t)n : size - 1;
}

static size_t say_flags(char *out, size_t size, size_t at, uint8_t value)
{
	const char *between = " flags=";

	for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++) {
		if (!(value & flags[i].bit))
			continue;
		at = say(out, size, at, "%s%s", between, flags[i].name);
		value = (uint8_t)(value & ~flags[i].bit);
		between = "+";
	}
	if (value || between[0] == ' ')
		at = say(out, size, at, "%s%#x", between, value);
	return at;
}

static size_t say_type(char *out, size_t size, size_t at, uint8_t value)
{
	const uint8_t more = VIRTIO_NET_HDR_GSO_ECN | GSO_TUNNEL_IPV4 | GSO_TUNNEL_IPV6;
	const char *name = NULL;

	for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++)
		if ((value & ~more) == types[i].value)
			name = types[i].name;
	if (!name)
		return say(out, size, at, " gso_type=%#x", value);
	at = say(out, size, at, " gso_type=%s", name);
	if (value & GSO_TUNNEL_IPV4)
		at = say(out, size, at, "+UDP_TUNNEL_IPV4");
	if (value & GSO_TUNNEL_IPV6)
		at = say(out, size, at, "+UDP_TUNNEL_IPV6");
	if (value & VIRTIO_NET_HDR_GSO_ECN)
		at = say(out, size, at, "+ECN");
	return at;
}

/* Describe the header, in the specification's order; nothing if it only says num_buffers=1. */
static size_t say_header(char *out, size_t size, size_t at, const struct view *v)
{
	static const char *const names[] = {"hdr_len", "gso_size", "csum_start", "csum_offset",
					    "num_buffers"};
	uint16_t field[(HDR_MAX - 2) / 2];
	bool plain = true;

	memcpy(field, v->hdr + 2, sizeof(field));
	for (uint32_t i = 0; i < v->hdr_len && i < SOCKET_HDR; i++)
		plain = plain && !v->hdr[i];
	for (uint32_t i = 5; 2 * i + 2 < v->hdr_len && i < sizeof(field) / 2; i++)
		plain = plain && !field[i];
	if (plain && (v->hdr_len <= SOCKET_HDR || field[4] <= 1))
		return at;
	at = say(out, size, at, "%svirtio_net_hdr", at ? "; " : "");
	at = say_flags(out, size, at, v->hdr[0]);
	at = say_type(out, size, at, v->hdr[1]);
	for (uint32_t i = 0; i < 5 && 2 * i + 4 <= v->hdr_len; i++)
		at = say(out, size, at, " %s=%u", names[i], field[i]);
	if (v->hdr_len >= 20)
		at = say(out, size, at, " hash_value=%#x hash_report=%u",
			 field[5] | (uint32_t)field[6] << 16, field[7]);
	if (v->hdr_len >= 24)
		at = say(out, size, at, " outer_th_offset=%u inner_nh_offset=%u", field[9],
			 field[10]);
	return at;
}

static uint8_t *put32(uint8_t *out, uint32_t value)
{
	memcpy(out, &value, sizeof(value));
	return out + sizeof(value);
}

static uint8_t *put_option(uint8_t *out, uint16_t code, const void *value, uint32_t len)
{
	uint16_t head[2] = {code, (uint16_t)len};

	memcpy(out, head, sizeof(head));
	memset(out + sizeof(head), 0, align(len, 4));
	memcpy(out + sizeof(head), value, len);
	return out + sizeof(head) + align(len, 4);
}

/* Take the notes for this packet of the source's interface; returns the length of the text. */
static size_t take_notes(struct pv_capture **from, uint32_t count, const struct pv_capture *c,
			 char *out, size_t size)
{
	size_t n = 0;

	for (uint32_t i = 0; i < count; i++) {
		struct pv_capture *has = from[i];

		while (has->notes && has->interface == c->interface &&
		       has->note[0].ts <= c->view.ts) {
			n = say(out, size, n, "%s%s", n ? "; " : "", has->note[0].text);
			has->notes--;
			memmove(&has->note[0], &has->note[1], has->notes * sizeof(has->note[0]));
		}
	}
	return n;
}

/* Write the packet, and text of n bytes, as a block; there is room. Returns the block's end. */
static uint8_t *put_block(const struct pv_capture *c, const char *text, size_t n, uint8_t *out)
{
	const struct view *v = &c->view;
	uint32_t caplen = v->size[0] + v->size[1] + v->size[2];
	uint8_t *start = out;

	out = put32(out, EPB);
	out = put32(out, 0);
	out = put32(out, c->interface);
	out = put32(out, (uint32_t)(v->ts >> 32));
	out = put32(out, (uint32_t)v->ts);
	out = put32(out, caplen);
	out = put32(out, v->len);
	for (int i = 0; i < 3; i++) {
		if (v->size[i])
			memcpy(out, v->data[i], v->size[i]);
		out += v->size[i];
	}
	memset(out, 0, 4);
	out = start + 28 + align(caplen, 4);
	out = put_option(out, EPB_FLAGS, &(uint32_t){v->inbound ? INBOUND : OUTBOUND}, 4);
	if (v->lost)
		out = put_option(out, EPB_DROPCOUNT, &(uint64_t){v->lost}, 8);
	if (v->queue >= 0)
		out = put_option(out, EPB_QUEUE, &(uint32_t){(uint32_t)v->queue}, 4);
	if (n)
		out = put_option(out, OPT_COMMENT, text, (uint32_t)n);
	out = put32(out, 0); /* opt_endofopt */
	put32(start + 4, (uint32_t)(out + 4 - start));
	return put32(out, (uint32_t)(out + 4 - start));
}

/* The source whose next packet is the oldest; NULL if there is no packet. */
static struct pv_capture *oldest(struct pv_capture **from, uint32_t count)
{
	struct pv_capture *first = NULL;

	for (uint32_t i = 0; i < count; i++) {
		struct pv_capture *c = from[i];

		if (!c->peeked)
			c->peeked = c->ring ? ring_peek(c) : socket_peek(c);
		if (c->peeked && (!first || c->view.ts < first->view.ts))
			first = c;
	}
	return first;
}

static void next(struct pv_capture *c)
{
	c->peeked = false;
	if (c->ring)
		ring_next(c);
	else
		socket_next(c);
}

/**
 * pv_capture_drain() - Take packets from sources, in the order of time
 * @from:	Sources of one capture
 * @count:	How many
 * @now:	CLOCK_REALTIME, nanoseconds
 * @hold:	Packets that are younger than so many nanoseconds stay: older ones of other sources
 *		may be under way
 * @out:	Gets blocks of pcapng, whole ones
 * @size:	Its bytes; there must be room for the longest block: PV_CAPTURE_ROOM
 *
 * What comes late, because its worker was interrupted between the look at the clock and the copy,
 * is in the next batch.
 *
 * Return: bytes written; 0: there is nothing
 */
size_t pv_capture_drain(struct pv_capture **from, uint32_t count, uint64_t now, uint64_t hold,
			uint8_t *out, size_t size)
{
	char text[TEXT];
	uint8_t *at = out;
	size_t n;

	for (;;) {
		struct pv_capture *first = oldest(from, count);

		/* After a step of the clock, the time may be one to come: then wait no more. */
		if (!first || (first->view.ts <= now && now - first->view.ts < hold) ||
		    (size_t)(out + size - at) < BLOCK_EXTRA + (size_t)first->view.size[0] +
							first->view.size[1] + first->view.size[2])
			return (size_t)(at - out);
		n = take_notes(from, count, first, text, sizeof(text));
		n = say_header(text, sizeof(text), n, &first->view);
		at = put_block(first, text, n, at);
		next(first);
	}
}

/**
 * pv_capture_discard() - Take packets from sources, and count them as lost
 * @from:	Sources of one capture
 * @count:	How many
 * @max:	At most so many packets
 *
 * Return: how many there were
 */
uint32_t pv_capture_discard(struct pv_capture **from, uint32_t count, uint32_t max)
{
	struct pv_capture *first;
	uint32_t n = 0;

	while (n < max && (first = oldest(from, count))) {
		first->discarded++;
		next(first);
		n++;
	}
	return n;
}

/**
 * pv_capture_ask() - Have the reader woken by the next packet
 * @c:		A source; the reader is about to sleep. A socket is readable then.
 *
 * Return: whether there is a packet already
 */
bool pv_capture_ask(struct pv_capture *c)
{
	socklen_t size = sizeof(int);
	int error;

	/* An interface that is gone leaves an error, which poll(2) would report for ever. */
	if (!c->ring)
		(void)!getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
	if (c->peeked || !c->ring)
		return c->peeked;
	__atomic_store_n(&c->asked, 1, __ATOMIC_SEQ_CST);
	return __atomic_load_n(&c->head, __ATOMIC_SEQ_CST) != c->tail;
}

/**
 * pv_capture_note() - Put a comment at the next packet of an interface
 * @c:		A source of the interface; by its reader
 * @ts:		Packets from before this time do not count: CLOCK_REALTIME, nanoseconds
 * @text:	Cut after PV_CAPTURE_COMMENT - 1 bytes; beyond eight that wait, all are lost
 */
void pv_capture_note(struct pv_capture *c, uint64_t ts, const char *text)
{
	if (c->notes == NOTES)
		return;
	c->note[c->notes].ts = ts;
	(void)snprintf(c->note[c->notes].text, PV_CAPTURE_COMMENT, "%s", text);
	c->notes++;
}

/**
 * pv_capture_noted() - A comment that waits for its packet
 * @c:		A source; by its reader
 * @number:	0 for the oldest
 *
 * Return: the text, lent; NULL if there are no more
 */
const char *pv_capture_noted(const struct pv_capture *c, uint32_t number)
{
	return number < c->notes ? c->note[number].text : NULL;
}

/**
 * pv_capture_count() - Read the counts
 * @c:		A source; by its reader
 * @out:	Filled in
 */
void pv_capture_count(struct pv_capture *c, struct pv_capture_counts *out)
{
	struct tpacket_stats_v3 stats;
	socklen_t size = sizeof(stats);

	/* The kernel begins anew each time. */
	if (c->fd >= 0 && !getsockopt(c->fd, SOL_PACKET, PACKET_STATISTICS, &stats, &size)) {
		c->count.seen += stats.tp_packets;
		c->count.accepted += stats.tp_packets;
		c->count.lost += stats.tp_drops;
	}
	*out = (struct pv_capture_counts){
		.seen = __atomic_load_n(&c->count.seen, __ATOMIC_RELAXED),
		.accepted = __atomic_load_n(&c->count.accepted, __ATOMIC_RELAXED),
		.lost = __atomic_load_n(&c->count.lost, __ATOMIC_RELAXED) + c->discarded};
}
