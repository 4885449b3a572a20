// SPDX-License-Identifier: MIT
/*
 * Receives UDP frames by an AF_XDP socket whose frames the driver writes without a copy.
 *
 *   xsk IF COUNT    prints "ready", waits for COUNT frames of seqnet, prints what came as JSON
 *
 * The kernel refuses XDP_ZEROCOPY if the driver cannot lend its virtqueue: virtio_net resets the
 * queue alone (VIRTIO_F_RING_RESET) and maps the frames by the DMA API (VIRTIO_F_ACCESS_PLATFORM).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <linux/bpf.h>
#include <linux/if_link.h>
#include <linux/if_xdp.h>
#include <net/if.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FRAMES 256u
#define SIZE   4096u
#define MAGIC  0x7365716e
#define AT     42 /* of seqnet's magic: behind the headers of Ethernet, IPv4 and UDP */

struct ring {
	uint32_t *producer, *consumer;
	void *entries;
};

static _Noreturn void die(const char *what)
{
	perror(what);
	exit(1);
}

static int bpf(enum bpf_cmd cmd, union bpf_attr *attr)
{
	int fd = (int)syscall(SYS_bpf, cmd, attr, sizeof(*attr));

	if (fd < 0)
		die("bpf");
	return fd;
}

/* A program that gives IPv4 UDP frames to the socket of their queue, and passes all others on. */
static int load(int map)
{
	const struct bpf_insn code[] = {
		{.code = BPF_LDX | BPF_MEM | BPF_W, .dst_reg = 2, .src_reg = 1, .off = 0},
		{.code = BPF_LDX | BPF_MEM | BPF_W, .dst_reg = 3, .src_reg = 1, .off = 4},
		{.code = BPF_ALU64 | BPF_MOV | BPF_X, .dst_reg = 4, .src_reg = 2},
		{.code = BPF_ALU64 | BPF_ADD | BPF_K, .dst_reg = 4, .imm = 34},
		{.code = BPF_JMP | BPF_JGT | BPF_X, .dst_reg = 4, .src_reg = 3, .off = 10},
		{.code = BPF_LDX | BPF_MEM | BPF_H, .dst_reg = 4, .src_reg = 2, .off = 12},
		{.code = BPF_JMP | BPF_JNE | BPF_K, .dst_reg = 4, .off = 8, .imm = 0x0008},
		{.code = BPF_LDX | BPF_MEM | BPF_B, .dst_reg = 4, .src_reg = 2, .off = 23},
		{.code = BPF_JMP | BPF_JNE | BPF_K, .dst_reg = 4, .off = 6, .imm = 17},
		{.code = BPF_LDX | BPF_MEM | BPF_W, .dst_reg = 2, .src_reg = 1, .off = 16},
		{.code = BPF_LD | BPF_IMM | BPF_DW,
		 .dst_reg = 1,
		 .src_reg = BPF_PSEUDO_MAP_FD,
		 .imm = map},
		{0},
		{.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 3, .imm = XDP_PASS},
		{.code = BPF_JMP | BPF_CALL, .imm = BPF_FUNC_redirect_map},
		{.code = BPF_JMP | BPF_EXIT},
		{.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = XDP_PASS},
		{.code = BPF_JMP | BPF_EXIT},
	};

	return bpf(BPF_PROG_LOAD, &(union bpf_attr){.prog_type = BPF_PROG_TYPE_XDP,
						    .insn_cnt = sizeof(code) / sizeof(*code),
						    .insns = (uintptr_t)code,
						    .license = (uintptr_t) "GPL"});
}

static struct ring map_ring(int fd, const struct xdp_ring_offset *off, size_t entry, uint64_t at)
{
	size_t size = off->desc + FRAMES * entry;
	uint8_t *base =
		mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)at);

	if (base == MAP_FAILED)
		die("mmap of a ring");
	return (struct ring){(void *)(base + off->producer), (void *)(base + off->consumer),
			     base + off->desc};
}

int main(int argc, char **argv)
{
	int fd = socket(AF_XDP, SOCK_RAW, 0);
	uint32_t index = argc == 3 ? if_nametoindex(argv[1]) : 0, entries = FRAMES, key = 0;
	uint64_t count = argc == 3 ? strtoull(argv[2], NULL, 10) : 0, got = 0, wrong = 0, next = 0;
	uint8_t *umem = mmap(NULL, (size_t)FRAMES * SIZE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct xdp_umem_reg reg = {
		.addr = (uintptr_t)umem, .len = (uint64_t)FRAMES * SIZE, .chunk_size = SIZE};
	struct sockaddr_xdp at = {
		.sxdp_family = AF_XDP, .sxdp_ifindex = index, .sxdp_flags = XDP_ZEROCOPY};
	struct xdp_mmap_offsets off;
	struct xdp_options options;
	socklen_t size = sizeof(off);
	struct ring fill, rx;
	int map;

	if (!index || !count) {
		fprintf(stderr, "usage: xsk IF COUNT\n");
		return 2;
	}
	if (fd < 0 || umem == MAP_FAILED)
		die("AF_XDP");
	if (setsockopt(fd, SOL_XDP, XDP_UMEM_REG, &reg, sizeof(reg)) ||
	    setsockopt(fd, SOL_XDP, XDP_UMEM_FILL_RING, &entries, sizeof(entries)) ||
	    setsockopt(fd, SOL_XDP, XDP_UMEM_COMPLETION_RING, &entries, sizeof(entries)) ||
	    setsockopt(fd, SOL_XDP, XDP_RX_RING, &entries, sizeof(entries)) ||
	    getsockopt(fd, SOL_XDP, XDP_MMAP_OFFSETS, &off, &size))
		die("the rings of the socket");
	fill = map_ring(fd, &off.fr, sizeof(uint64_t), XDP_UMEM_PGOFF_FILL_RING);
	rx = map_ring(fd, &off.rx, sizeof(struct xdp_desc), XDP_PGOFF_RX_RING);
	for (uint32_t i = 0; i < FRAMES; i++)
		((uint64_t *)fill.entries)[i] = (uint64_t)i * SIZE;
	__atomic_store_n(fill.producer, FRAMES, __ATOMIC_RELEASE);
	if (bind(fd, (struct sockaddr *)&at, sizeof(at)))
		die("bind with XDP_ZEROCOPY");
	size = sizeof(options);
	if (getsockopt(fd, SOL_XDP, XDP_OPTIONS, &options, &size))
		die("XDP_OPTIONS");
	map = bpf(BPF_MAP_CREATE, &(union bpf_attr){.map_type = BPF_MAP_TYPE_XSKMAP,
						    .key_size = 4,
						    .value_size = 4,
						    .max_entries = 1});
	bpf(BPF_MAP_UPDATE_ELEM, &(union bpf_attr){.map_fd = (uint32_t)map,
						   .key = (uintptr_t)&key,
						   .value = (uintptr_t)&fd});
	bpf(BPF_LINK_CREATE, &(union bpf_attr){.link_create = {.prog_fd = (uint32_t)load(map),
							       .target_ifindex = index,
							       .attach_type = BPF_XDP,
							       .flags = XDP_FLAGS_DRV_MODE}});
	printf("ready\n");
	fflush(stdout);
	while (got < count) {
		uint32_t from = *rx.consumer;

		if (__atomic_load_n(rx.producer, __ATOMIC_ACQUIRE) == from) {
			if (poll(&(struct pollfd){.fd = fd, .events = POLLIN}, 1, -1) < 0)
				die("poll");
			continue;
		}
		struct xdp_desc *desc = &((struct xdp_desc *)rx.entries)[from % FRAMES];
		uint32_t magic = 0, put = *fill.producer;
		uint64_t number = 0;

		if (desc->len >= AT + 12) {
			memcpy(&magic, umem + desc->addr + AT, 4);
			memcpy(&number, umem + desc->addr + AT + 4, 8);
		}
		if (magic == MAGIC) {
			got++;
			wrong += number != next;
			next = number + 1;
		}
		((uint64_t *)fill.entries)[put % FRAMES] = desc->addr - desc->addr % SIZE;
		__atomic_store_n(rx.consumer, from + 1, __ATOMIC_RELEASE);
		__atomic_store_n(fill.producer, put + 1, __ATOMIC_RELEASE);
	}
	printf("{\"received\": %" PRIu64 ", \"out_of_order\": %" PRIu64 ", \"zero_copy\": %s}\n",
	       got, wrong, options.flags & XDP_OPTIONS_ZEROCOPY ? "true" : "false");
	return 0;
}
