/* SPDX-License-Identifier: MIT */
/*
 * What the fuzz programs share. Each has a libFuzzer entry, LLVMFuzzerTestOneInput; where the
 * compiler has no libFuzzer, fuzz_main.c feeds it from a deterministic generator that knows what
 * rings look like.
 */
#ifndef PV_FUZZ_H
#define PV_FUZZ_H

#include <stddef.h>
#include <stdint.h>

/*
 * The ring that a fuzz program sets up: all in the first 64 KiB, so that the input can be an image
 * of memory.
 */
#define FUZZ_REGION   0x8000u	     /* bytes of each of the two memory regions */
#define FUZZ_HIGH     0x100000000ull /* where the second region starts */
#define FUZZ_SIZE     16u	     /* entries of a ring */
#define FUZZ_DESC(q)  (0x0000u + 0x400u * (q))
#define FUZZ_AVAIL(q) (0x0100u + 0x400u * (q))
#define FUZZ_USED(q)  (0x0200u + 0x400u * (q))
#define FUZZ_TABLE    0x1000u /* a good place for indirect tables */
#define FUZZ_BUFFERS  0x2000u /* and for buffers */
#define FUZZ_IMAGE    0x1800u /* bytes of memory that the input gives */
#define FUZZ_HEADER   16u     /* bytes of input before the image: see the programs */
#define FUZZ_INPUT    (FUZZ_HEADER + FUZZ_IMAGE)
/* Whether an input is of packed rings, and the position of both then: its first two bytes. */
#define FUZZ_PACKED(data)   ((data)[15] & 1)
#define FUZZ_PLACE(base)    (((base)&0x8000u) | (base) % FUZZ_SIZE)
#define FUZZ_POSITION(base) (FUZZ_PLACE(base) | FUZZ_PLACE(base) << 16)

/* A guest makes descriptors of a packed ring available again, or takes that back. */
static inline void fuzz_toggle(uint8_t *ring, uint8_t which)
{
	for (uint32_t i = which & 3; i < FUZZ_SIZE; i += 1 + (which >> 5)) {
		ring[16 * i + 14] ^= 0x80;
		ring[16 * i + 15] ^= 0x80;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
