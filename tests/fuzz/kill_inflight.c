/* SPDX-License-Identifier: MIT */
/*
 * Kills a back-end after each of its instructions (by ptrace, one step at a time) and lets an heir
 * go on from the rings and the notes as they are then (cext/inflight.c). In both ring formats and
 * both directions every chain must be used once, in order, with the buffers that the driver gave,
 * and every frame that the driver sent must be in the file once. The same if the heir is killed,
 * too, with a packet in its hands; and, but for the order, if each other chain is to be used after
 * the one that comes behind it, as with a fault on demand.
 */
#include <linux/virtio_ring.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "inflight.h"
#include "vring_packed.h"

#define CHECK(cond)                                                                                \
	do {                                                                                       \
		if (!(cond)) {                                                                     \
			fprintf(stderr, "%s:%d: %s (%s, %s%s, step %lu)\n", __FILE__, __LINE__,    \
				#cond, packed ? "packed" : "split", tx ? "transmit" : "receive",   \
				swap ? ", swapped" : "", step);                                    \
			abort();                                                                   \
		}                                                                                  \
	} while (0)

enum { SIZE = 8, CHAINS = 5, BATCH = 3, DESC = 0, AVAIL = 0x100, USED = 0x200, BUFFER = 0x400 };

/* All that outlives a back-end. */
struct shared {
	uint8_t ram[4096] __attribute__((aligned(4096)));
	uint8_t notes[PV_INFLIGHT_SIZE(SIZE)] __attribute__((aligned(8)));
	/* The file: who is killed between the two stores has not sent. */
	uint8_t sent[4 * CHAINS];
	uint64_t taken;
	uint32_t wrong; /* chains with buffers that the driver did not give */
};

static bool packed, tx, swap;
static unsigned long step;

/* Chain i has slots of 100 + 10 * i bytes; a packed ring starts two short of its end. */
static uint16_t slots_of(uint32_t i)
{
	return (uint16_t)(i == 1 ? 2 : 1);
}

static uint16_t id_of(uint32_t i)
{
	return (uint16_t)(packed ? 40 + i : i < 2 ? i : i + 1);
}

static void drive(struct shared *s)
{
	memset(s, 0, sizeof(*s));
	for (uint32_t i = 0, at = packed ? SIZE - 2 : 0; i < CHAINS; i++) {
		if (!packed)
			((uint16_t *)(void *)(s->ram + AVAIL))[2 + i] = id_of(i);
		for (uint32_t k = 0; k < slots_of(i); k++, at++) {
			uint64_t addr = BUFFER + 0x100 * i + 0x80 * k;
			uint32_t len = 100 + 10 * i;
			uint16_t flags = (uint16_t)((tx ? 0 : VRING_DESC_F_WRITE) |
						    (k + 1 < slots_of(i) ? VRING_DESC_F_NEXT : 0));

			if (packed) {
				flags |= (uint16_t)(at < SIZE ? 1u << VRING_PACKED_DESC_F_AVAIL
							      : 1u << VRING_PACKED_DESC_F_USED);
				((struct vring_packed_desc *)(void *)s->ram)[at % SIZE] =
					(struct vring_packed_desc){addr, len, id_of(i), flags};
			} else {
				((struct vring_desc *)(void *)s->ram)[at] =
					(struct vring_desc){addr, len, flags, (uint16_t)(at + 1)};
			}
		}
	}
	if (!packed)
		((uint16_t *)(void *)(s->ram + AVAIL))[1] = CHAINS;
}

/*
 * A back-end's whole life: what is on the ring, then the end; or a kill, when it has taken and sent
 * so many chains.
 */
static void serve(struct shared *s, uint32_t most)
{
	struct pv_vring_format format = {.packed = packed};
	struct pv_memory mem = {.count = 1, .region = {{0, sizeof(s->ram), s->ram}}};
	uint32_t base = packed ? (SIZE - 2) | PV_PACKED_WRAP : 0, batch = 0;
	struct pv_vring vr;
	struct pv_inflight in = {.region = s->notes, .vr = &vr, .taken = s->taken};
	struct iovec iov[SIZE];
	struct pv_chain c, back = {0};
	uint16_t head[2];
	uint32_t waits = 0;

	if (pv_vring_init(&vr, &mem, SIZE, DESC, AVAIL, USED, base | base << 16, format))
		abort();
	pv_inflight_recover(&in);
	while (pv_vring_pop(&vr, iov, SIZE, &c) == PV_MORE) {
		uint32_t i = (uint32_t)((uint8_t *)iov[0].iov_base - s->ram - BUFFER) / 0x100;
		uint32_t bytes = (100 + 10 * i) * slots_of(i);

		if (c.head != id_of(i) || c.slots != (packed ? slots_of(i) : 1) ||
		    c.out_len != (tx ? bytes : 0) || c.in_len != (tx ? 0 : bytes))
			s->wrong++;
		if (tx && !pv_inflight_begin(&in, &c)) {
			if (s->taken < sizeof(s->sent))
				s->sent[s->taken] = (uint8_t)(i + 1);
			__atomic_store_n(&s->taken, s->taken + 1, __ATOMIC_RELEASE);
			in.taken++;
		}
		if (!most--)
			return;
		if (swap && !waits) {
			back = c;
			waits = 1;
			continue;
		}
		pv_inflight_push(&in, c.head, c.slots, tx ? 0 : 7);
		head[0] = c.head;
		head[1] = back.head;
		if (waits)
			pv_inflight_push(&in, back.head, back.slots, tx ? 0 : 7);
		if (tx)
			pv_inflight_end(&in, head, 1 + waits);
		else if (++batch % BATCH == 0)
			pv_inflight_flush(&in);
		waits = 0;
	}
	if (waits) {
		pv_inflight_push(&in, back.head, back.slots, tx ? 0 : 7);
		if (tx)
			pv_inflight_end(&in, &back.head, 1);
	}
	if (vr.fault)
		s->wrong++;
	pv_inflight_flush(&in);
}

/* What the driver finds in the end. */
static void examine(struct shared *s)
{
	const uint32_t *used = (const void *)(s->ram + USED + 4);
	const struct vring_packed_desc *ring = (const void *)s->ram;

	CHECK(!s->wrong);
	CHECK(s->taken == (tx ? CHAINS : 0));
	CHECK(packed || ((const uint16_t *)(const void *)(s->ram + USED))[1] == CHAINS);
	for (uint32_t n = 0, at = SIZE - 2, found = 0; n < CHAINS; n++) {
		const uint16_t both =
			1u << VRING_PACKED_DESC_F_AVAIL | 1u << VRING_PACKED_DESC_F_USED;
		const struct vring_packed_desc *d = &ring[at % SIZE];
		uint32_t i = 0;

		while (i < CHAINS && id_of(i) != (packed ? d->id : used[2 * n]))
			i++;
		CHECK(i < CHAINS && !(found >> i & 1) && (swap || i == n));
		found |= 1u << i;
		CHECK(!tx || s->sent[n] == n + 1);
		CHECK(!packed || (d->flags & both) == (at < SIZE ? both : 0));
		CHECK((tx ? 0 : 7) == (packed ? d->len : used[2 * n + 1]));
		at += slots_of(i);
	}
}

static unsigned long kill_at_each_step(struct shared *s, struct shared *copy)
{
	int status;
	pid_t pid;

	drive(s);
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) || raise(SIGSTOP))
			_exit(1);
		serve(s, UINT32_MAX);
		kill(getpid(), SIGKILL);
	}
	for (step = 0;; step++) {
		CHECK(waitpid(pid, &status, 0) == pid);
		if (!WIFSTOPPED(status))
			break;
		for (uint32_t most = 0; most <= CHAINS; most++) {
			memcpy(copy, s, sizeof(*copy));
			serve(copy, most);
			serve(copy, UINT32_MAX);
			examine(copy);
		}
		CHECK(!ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL));
	}
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	examine(s);
	return step;
}

/*
 * A driver that makes descriptors available again before they were published: the notes have room
 * for as many chains as the ring has slots.
 */
static void flood(void)
{
	enum { GUARD = 4096 };
	struct shared *s = aligned_alloc(4096, sizeof(*s));
	uint8_t *notes = calloc(1, PV_INFLIGHT_SIZE(2) + GUARD);
	struct pv_memory mem = {.count = 1, .region = {{0, sizeof(s->ram), s->ram}}};
	struct vring_packed_desc *ring;
	struct pv_vring vr;
	struct pv_inflight in = {.region = notes, .vr = &vr};
	struct iovec iov[SIZE];
	struct pv_chain c;

	packed = true;
	tx = false;
	CHECK(s && notes);
	memset(s, 0, sizeof(*s));
	ring = (void *)s->ram;
	CHECK(!pv_vring_init(&vr, &mem, 2, DESC, AVAIL, USED, PV_PACKED_WRAP | PV_PACKED_WRAP << 16,
			     (struct pv_vring_format){.packed = true}));
	pv_inflight_recover(&in);
	for (step = 0; step < 100; step++) {
		uint16_t bit = step / 2 % 2 ? VRING_PACKED_DESC_F_USED : VRING_PACKED_DESC_F_AVAIL;
		uint16_t flags = (uint16_t)(1u << bit | VRING_DESC_F_WRITE);

		ring[step % 2] = (struct vring_packed_desc){BUFFER, 100, 7, flags};
		if (pv_vring_pop(&vr, iov, SIZE, &c) != PV_MORE)
			break;
		pv_inflight_push(&in, c.head, c.slots, 7);
	}
	CHECK(step == 2);
	for (size_t i = 0; i < GUARD; i++)
		CHECK(!notes[PV_INFLIGHT_SIZE(2) + i]);
	free(notes);
	free(s);
}

int main(void)
{
	struct shared *s =
		mmap(NULL, sizeof(*s), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct shared *copy = aligned_alloc(4096, (sizeof(*s) + 4095) & ~4095ul);

	CHECK(s != MAP_FAILED && copy);
	for (int i = 0; i < 8; i++) {
		packed = i & 1;
		tx = i & 2;
		swap = i & 4;
		if (packed && tx && swap) /* whose notes have room for one packet that is sent */
			continue;
		printf("%s, %s%s: killed at each of %lu steps\n", packed ? "packed" : "split",
		       tx ? "transmit" : "receive", swap ? ", swapped" : "",
		       kill_at_each_step(s, copy));
	}
	swap = false;
	free(copy);
	flood();
	return 0;
}
