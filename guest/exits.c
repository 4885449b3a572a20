/* SPDX-License-Identifier: MIT */
/*
 * Makes a known number of exits of each kind, at addresses without a device. README.md has the
 * table; tests/host and tests/boot compare the ledger with it. Reads without a device must give all
 * ones. All these exits belong to the command phase.
 */
#include "guest.h"

#define PORT	0x1230
#define ADDRESS (PCI_MMIO_BASE + 0x10000000ull)

#define REPEAT(n, statement)                                                                       \
	do                                                                                         \
		for (int i_ = 0; i_ < (n); i_++)                                                   \
			statement;                                                                 \
	while (0)

/* Move n elements of a string to or from a port or memory by one instruction. */
#define STRING(instruction, n, ...)                                                                \
	do {                                                                                       \
		void *from_ = buffer, *to_ = buffer;                                               \
		unsigned long count_ = (n), at_ = ADDRESS + 0x1000;                                \
		__asm__ volatile(instruction                                                       \
				 : "+S"(from_), "+D"(to_), "+c"(count_), "+r"(at_)                 \
				 : __VA_ARGS__                                                     \
				 : "memory");                                                      \
	} while (0)

static int wrong;
static uint8_t buffer[64];

static void expect_ones(uint64_t value, unsigned int bits)
{
	if (value != (bits == 64 ? ~0ull : (1ull << bits) - 1))
		wrong++;
}

int main(void)
{
	void *at = buffer;
	unsigned long count = sizeof(buffer);

	pyvmm_control(GUEST_COMMAND, 0);
	REPEAT(10, outb(PORT, 1));
	REPEAT(20, outw(PORT, 2));
	REPEAT(30, outl(PORT, 3));
	REPEAT(11, expect_ones(inb(PORT), 8));
	REPEAT(21, expect_ones(inw(PORT), 16));
	REPEAT(31, expect_ones(inl(PORT), 32));
	/* The strings have a port of their own. */
	pyvmm_write(PORT + 4, buffer, sizeof(buffer));
	__asm__ volatile("rep insb" : "+D"(at), "+c"(count) : "d"(PORT + 4) : "memory");
	for (unsigned int i = 0; i < sizeof(buffer); i++)
		expect_ones(buffer[i], 8);
	STRING("rep outsw", 32, "d"(PORT + 8));
	STRING("rep outsl", 16, "d"(PORT + 12));
	STRING("rep insw", 32, "d"(PORT + 8));
	STRING("rep insl", 16, "d"(PORT + 12));
	REPEAT(3, STRING("outsb", 0, "d"(PORT + 16)));
	REPEAT(4, STRING("insb", 0, "d"(PORT + 16)));
	STRING("mov %3, %1; rep stosb", 13, "a"(0));
	STRING("mov %3, %1; rep stosl", 14, "a"(0));
	STRING("mov %3, %0; rep movsw", 15, "a"(0));
	REPEAT(5, mmio_write8(ADDRESS, 1));
	REPEAT(6, mmio_write16(ADDRESS, 2));
	REPEAT(7, mmio_write32(ADDRESS, 3));
	REPEAT(8, mmio_write64(ADDRESS, 4));
	REPEAT(9, expect_ones(mmio_read8(ADDRESS), 8));
	REPEAT(10, expect_ones(mmio_read16(ADDRESS), 16));
	REPEAT(11, expect_ones(mmio_read32(ADDRESS), 32));
	REPEAT(12, expect_ones(mmio_read64(ADDRESS), 64));
	return wrong ? 1 : 0;
}
