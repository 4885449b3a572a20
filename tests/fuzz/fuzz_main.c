/* SPDX-License-Identifier: MIT */
/*
 * Drives a fuzz program without libFuzzer: fuzz_X SECONDS [SEED] runs inputs made from SEED
 * (default 1), the same each time; fuzz_X FILE... replays. A crash leaves the input in crash.bin;
 * sanitizers print the rest.
 */
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "fuzz.h"

static uint64_t state;
static uint8_t input[FUZZ_INPUT];

/* xorshift64*: fast, and the same everywhere. */
static uint32_t rnd(uint32_t below)
{
	state ^= state >> 12;
	state ^= state << 25;
	state ^= state >> 27;
	return (uint32_t)((state * 0x2545F4914F6CDD1Dull) >> 33) % below;
}

static bool one_in(uint32_t n)
{
	return !rnd(n);
}

static void put(uint32_t at, uint64_t value, uint32_t size)
{
	memcpy(&input[FUZZ_HEADER + at], &value, size);
}

static uint64_t any_address(void)
{
	static const uint64_t odd[] = {0,
				       FUZZ_REGION - 1,
				       FUZZ_REGION,
				       FUZZ_HIGH - 1,
				       FUZZ_HIGH,
				       FUZZ_HIGH + FUZZ_REGION - 1,
				       FUZZ_HIGH + FUZZ_REGION,
				       ~0ull,
				       ~0ull - 15,
				       1ull << 63};

	if (one_in(24))
		return odd[rnd(sizeof(odd) / sizeof(odd[0]))];
	return (one_in(4) ? FUZZ_HIGH : FUZZ_BUFFERS) + rnd(FUZZ_REGION - FUZZ_BUFFERS - 2048);
}

static uint32_t any_length(void)
{
	static const uint32_t odd[] = {0,  1,	       10,	   11,	       12,
				       13, 0x7fffffff, 0x80000000, 0xffffffff, FUZZ_REGION};

	return one_in(16) ? odd[rnd(sizeof(odd) / sizeof(odd[0]))] : 1 + rnd(one_in(4) ? 2048 : 64);
}

/* A table of descriptors, mostly chained to their successors and mostly sane. */
static void make_table(uint32_t at, uint32_t entries, uint32_t limit, bool write, bool indirect)
{
	for (uint32_t i = 0; i < entries; i++) {
		uint16_t flags = one_in(3) ? 1 : 0, next = (uint16_t)(i + 1);
		uint64_t addr = any_address();
		uint32_t len = any_length();

		if (write != one_in(32))
			flags |= 2;
		if (one_in(24))
			next = (uint16_t)rnd(one_in(3) ? 65536 : limit + 1);
		if (indirect && one_in(3)) {
			flags = 4;
			addr = FUZZ_TABLE + 16 * rnd(64);
			len = 16 * (1 + rnd(24));
			if (one_in(16))
				len = any_length();
			if (one_in(16))
				flags |= (uint16_t)rnd(8);
		} else if (one_in(64)) {
			flags = (uint16_t)rnd(65536);
		}
		put(at + 16 * i, addr, 8);
		put(at + 16 * i + 8, len, 4);
		put(at + 16 * i + 12, flags, 2);
		put(at + 16 * i + 14, next, 2);
	}
}

/* Make a packed table of one made above: id and flags change places. */
static void pack_table(uint32_t at, uint32_t entries)
{
	for (uint32_t i = 0; i < entries; i++) {
		uint8_t *d = &input[FUZZ_HEADER + at + 16 * i + 12];
		uint8_t id[2] = {d[2], d[3]};

		memmove(d + 2, d, 2);
		memcpy(d, id, 2);
	}
}

/* A packed ring with n available descriptors from where the device is. */
static void pack_ring(uint32_t q, uint16_t base, uint32_t n)
{
	pack_table(FUZZ_DESC(q), FUZZ_SIZE);
	for (uint32_t k = 0; k < FUZZ_SIZE; k++) {
		uint32_t at = base % FUZZ_SIZE + k;
		bool wrap = !(base & 0x8000) == (at >= FUZZ_SIZE), avail = k < n;
		uint8_t *flags = &input[FUZZ_HEADER + FUZZ_DESC(q) + 16 * (at % FUZZ_SIZE) + 14];

		/* The others were used in the lap before. */
		flags[0] = (uint8_t)((flags[0] & 7) | (wrap == avail ? 0x80 : 0));
		flags[1] = (uint8_t)(wrap ? 0 : 0x80);
		if (one_in(64))
			flags[rnd(2)] = (uint8_t)rnd(256);
	}
	put(FUZZ_AVAIL(q), one_in(2) ? rnd(65536) : FUZZ_PLACE(base + rnd(8)), 2);
	put(FUZZ_AVAIL(q) + 2, rnd(4), 2);
}

static void make_input(void)
{
	uint16_t base = one_in(2) ? 0 : (uint16_t)rnd(65536);

	for (uint32_t i = 0; i < FUZZ_HEADER; i++)
		input[i] = (uint8_t)rnd(256);
	memcpy(input, &base, 2);
	memset(input + FUZZ_HEADER, 0, FUZZ_IMAGE);
	for (uint32_t q = 0; q < 2; q++) {
		uint32_t n = rnd(FUZZ_SIZE + 1);

		make_table(FUZZ_DESC(q), FUZZ_SIZE, FUZZ_SIZE, q == 0, true);
		put(FUZZ_AVAIL(q), one_in(2), 2);
		put(FUZZ_AVAIL(q) + 2, (uint16_t)(base + (one_in(32) ? rnd(65536) : n)), 2);
		for (uint32_t i = 0; i < FUZZ_SIZE; i++)
			put(FUZZ_AVAIL(q) + 4 + 2 * i, one_in(64) ? rnd(65536) : rnd(FUZZ_SIZE), 2);
		put(FUZZ_AVAIL(q) + 4 + 2 * FUZZ_SIZE, rnd(65536), 2);
		put(FUZZ_USED(q) + 2, base, 2);
		if (FUZZ_PACKED(input))
			pack_ring(q, base, n);
	}
	make_table(FUZZ_TABLE, 64, 24, one_in(2), one_in(8));
	if (FUZZ_PACKED(input))
		pack_table(FUZZ_TABLE, 64);
	for (uint32_t n = one_in(4) ? rnd(16) : 0; n; n--)
		input[rnd(FUZZ_INPUT)] = (uint8_t)rnd(256);
}

static void save_input(void)
{
	int fd = open("crash.bin", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

	if (fd >= 0)
		(void)!write(fd, input, sizeof(input));
}

static void crashed(int sig)
{
	save_input();
	signal(sig, SIG_DFL);
	raise(sig);
}

/* ASan ends the process here rather than by a signal. */
void __asan_on_error(void);
void __asan_on_error(void)
{
	save_input();
}

static int replay(const char *path)
{
	/* An allocation of the input's size: ASan sees a byte too far. */
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat st;
	uint8_t *data;
	int ret;

	if (fd < 0 || fstat(fd, &st)) {
		perror(path);
		return 1;
	}
	data = malloc((size_t)st.st_size);
	if (st.st_size && (!data || read(fd, data, (size_t)st.st_size) != st.st_size)) {
		perror(path);
		return 1;
	}
	close(fd);
	ret = LLVMFuzzerTestOneInput(data, (size_t)st.st_size);
	free(data);
	return ret;
}

int main(int argc, char **argv)
{
	char *end = argv[0];
	double seconds = argc > 1 ? strtod(argv[1], &end) : 20;
	struct timespec start, now;
	uint64_t runs = 0;

	signal(SIGABRT, crashed);
	signal(SIGALRM, crashed);
	signal(SIGPIPE, SIG_IGN);
	if (argc > 1 && *end) {
		for (int i = 1; i < argc; i++)
			if (replay(argv[i]))
				return 1;
		return 0;
	}
	state = argc > 2 ? strtoull(argv[2], NULL, 0) | 1 : 1;
	clock_gettime(CLOCK_MONOTONIC, &start);
	do {
		/* No single input may take long: a loop is a fault, too. */
		if (runs % 256 == 0)
			alarm(10);
		make_input();
		LLVMFuzzerTestOneInput(input, sizeof(input));
		runs++;
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while ((double)(now.tv_sec - start.tv_sec) +
			 1e-9 * (double)(now.tv_nsec - start.tv_nsec) <
		 seconds);
	printf("%s: %llu inputs, no crash\n", argv[0], (unsigned long long)runs);
	return 0;
}
