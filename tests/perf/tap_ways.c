/* SPDX-License-Identifier: MIT */
/*
 * What the kernel offers to move frames through a tap, side by side: nanoseconds per frame.
 *
 * tap_ways TAP SIZE ROUNDS BURSTS: frames of SIZE bytes, each with a header of virtio-net. The
 * interface gives back what it gets (act_mirred), so that a burst that was sent can be received.
 * In each round each way moves BURSTS bursts. A line per round, way and direction: the way's
 * number in the order of `ways`, tx or rx, and the time. All of this takes one thread, and no time
 * is spent on waiting: the frames of a burst are there before the first is received.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/io_uring.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define BURST	   32
#define HEADER	   12 /* struct virtio_net_hdr_v1 */
#define ROOM	   2048
#define EXPERIMENT 0x88b5 /* an EtherType that nobody takes */

static int tap;
static size_t size; /* of a frame with its header */
static uint8_t *memory;
static struct iovec pieces[BURST][2]; /* header and frame, as the worker has them */

static struct {
	int fd;
	unsigned *sq_tail, *sq_array, *cq_head, *cq_tail, sq_mask, cq_mask;
	struct io_uring_sqe *sqes;
	struct io_uring_cqe *cqes;
} ring;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void check(ssize_t n, const char *what)
{
	if (n == (ssize_t)size)
		return;
	if (n >= 0)
		errno = EMSGSIZE;
	die(what);
}

static uint8_t *frame(unsigned i)
{
	return memory + (size_t)i * ROOM;
}

/* --- a call per frame --------------------------------------------------------------------------*/

static void vector_send(void)
{
	for (unsigned i = 0; i < BURST; i++)
		check(writev(tap, pieces[i], 2), "writev");
}

static void vector_receive(void)
{
	for (unsigned i = 0; i < BURST; i++)
		check(readv(tap, pieces[i], 2), "readv");
}

static void plain_send(void)
{
	for (unsigned i = 0; i < BURST; i++)
		check(write(tap, frame(i), size), "write");
}

static void plain_receive(void)
{
	for (unsigned i = 0; i < BURST; i++)
		check(read(tap, frame(i), size), "read");
}

/* --- a call per burst --------------------------------------------------------------------------*/

static void *map(int fd, size_t length, off_t offset)
{
	void *at =
		mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);

	if (at == MAP_FAILED)
		die("mmap of io_uring");
	return at;
}

static void enroll(unsigned what, void *of, unsigned count)
{
	if (syscall(SYS_io_uring_register, ring.fd, what, of, count) < 0)
		die("io_uring_register");
}

/* A ring for one thread that asks for its completions, with the tap and the memory registered. */
static void make_ring(void)
{
	struct io_uring_params p = {.flags = IORING_SETUP_SINGLE_ISSUER |
					     IORING_SETUP_DEFER_TASKRUN};
	struct iovec whole = {memory, (size_t)BURST * ROOM};
	uint8_t *sq, *cq;

	ring.fd = (int)syscall(SYS_io_uring_setup, BURST, &p);
	if (ring.fd < 0) {
		fprintf(stderr, "tap_ways: no io_uring: %s\n", strerror(errno));
		return;
	}
	sq = map(ring.fd, p.sq_off.array + p.sq_entries * sizeof(unsigned), IORING_OFF_SQ_RING);
	cq = map(ring.fd, p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe),
		 IORING_OFF_CQ_RING);
	ring.sqes = map(ring.fd, p.sq_entries * sizeof(struct io_uring_sqe), IORING_OFF_SQES);
	ring.sq_tail = (unsigned *)(sq + p.sq_off.tail);
	ring.sq_array = (unsigned *)(sq + p.sq_off.array);
	ring.sq_mask = *(unsigned *)(sq + p.sq_off.ring_mask);
	ring.cq_head = (unsigned *)(cq + p.cq_off.head);
	ring.cq_tail = (unsigned *)(cq + p.cq_off.tail);
	ring.cq_mask = *(unsigned *)(cq + p.cq_off.ring_mask);
	ring.cqes = (struct io_uring_cqe *)(cq + p.cq_off.cqes);
	enroll(IORING_REGISTER_FILES, &tap, 1);
	enroll(IORING_REGISTER_BUFFERS, &whole, 1);
}

static void submit(uint8_t op)
{
	unsigned tail = *ring.sq_tail, head;
	bool fixed = op == IORING_OP_READ_FIXED || op == IORING_OP_WRITE_FIXED;

	for (unsigned i = 0; i < BURST; i++) {
		unsigned at = (tail + i) & ring.sq_mask;

		ring.sqes[at] = (struct io_uring_sqe){
			.opcode = op,
			.flags = IOSQE_FIXED_FILE,
			.addr = fixed ? (uint64_t)frame(i) : (uint64_t)pieces[i],
			.len = fixed ? (uint32_t)size : 2,
		};
		ring.sq_array[at] = at;
	}
	__atomic_store_n(ring.sq_tail, tail + BURST, __ATOMIC_RELEASE);
	if (syscall(SYS_io_uring_enter, ring.fd, BURST, BURST, IORING_ENTER_GETEVENTS, NULL, 0) !=
	    BURST)
		die("io_uring_enter");
	head = *ring.cq_head;
	if (__atomic_load_n(ring.cq_tail, __ATOMIC_ACQUIRE) - head != BURST) {
		errno = EAGAIN;
		die("completions");
	}
	for (unsigned i = 0; i < BURST; i++) {
		int result = ring.cqes[(head + i) & ring.cq_mask].res;

		if (result < 0) {
			errno = -result;
			die("a completion");
		}
		check(result, "a completion");
	}
	__atomic_store_n(ring.cq_head, head + BURST, __ATOMIC_RELEASE);
}

static void ring_vector_send(void)
{
	submit(IORING_OP_WRITEV);
}

static void ring_vector_receive(void)
{
	submit(IORING_OP_READV);
}

static void ring_fixed_send(void)
{
	submit(IORING_OP_WRITE_FIXED);
}

static void ring_fixed_receive(void)
{
	submit(IORING_OP_READ_FIXED);
}

static const struct {
	void (*send)(void), (*receive)(void);
	bool ring;
} ways[] = {
	{vector_send, vector_receive, false},
	{plain_send, plain_receive, false},
	{ring_vector_send, ring_vector_receive, true},
	{ring_fixed_send, ring_fixed_receive, true},
};

/* --- measuring ---------------------------------------------------------------------------------*/

static double now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec * 1e9 + (double)ts.tv_nsec;
}

static void open_tap(const char *name)
{
	struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
	int header = HEADER;

	tap = open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK);
	if (tap < 0)
		die("/dev/net/tun");
	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	if (ioctl(tap, TUNSETIFF, &request) < 0 || ioctl(tap, TUNSETVNETHDRSZ, &header) < 0)
		die(name);
}

static void fill(void)
{
	memory = mmap(NULL, (size_t)BURST * ROOM, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (memory == MAP_FAILED)
		die("mmap");
	for (unsigned i = 0; i < BURST; i++) {
		uint8_t *ethernet = frame(i) + HEADER;

		memset(ethernet, 0xff, 6);
		ethernet[6] = 2;
		ethernet[12] = EXPERIMENT >> 8;
		ethernet[13] = EXPERIMENT & 0xff;
		pieces[i][0] = (struct iovec){frame(i), HEADER};
		pieces[i][1] = (struct iovec){ethernet, size - HEADER};
	}
}

static void measure(unsigned way, unsigned bursts)
{
	double sent = 0, received = 0;

	for (unsigned i = 0; i < bursts; i++) {
		double start = now_ns(), middle;

		ways[way].send();
		middle = now_ns();
		ways[way].receive();
		received += now_ns() - middle;
		sent += middle - start;
	}
	printf("%u tx %.1f\n%u rx %.1f\n", way, sent / bursts / BURST, way,
	       received / bursts / BURST);
}

int main(int argc, char **argv)
{
	unsigned rounds, bursts;

	if (argc != 5) {
		fprintf(stderr, "usage: tap_ways TAP SIZE ROUNDS BURSTS\n");
		return 2;
	}
	size = (size_t)atoi(argv[2]) + HEADER;
	rounds = (unsigned)atoi(argv[3]);
	bursts = (unsigned)atoi(argv[4]);
	if (size < HEADER + 60 || size > ROOM) {
		fprintf(stderr, "tap_ways: SIZE is 60 to %d\n", ROOM - HEADER);
		return 2;
	}
	open_tap(argv[1]);
	fill();
	make_ring();
	for (unsigned round = 0; round < rounds; round++)
		for (unsigned way = 0; way < sizeof(ways) / sizeof(*ways); way++)
			if (!ways[way].ring || ring.fd >= 0)
				measure(way, bursts);
	return 0;
}
