/* SPDX-License-Identifier: MIT */
/*
 * A known number of exits of each kind, at addresses where nothing is. README.md has the table; tests/host
 * holds the ledger to it. Reads where nothing is must give all ones.
 */
#include "guest.h"

#define PORT	0x1230
#define ADDRESS (PCI_MMIO_BASE + 0x10000000ull)

#define REPEAT(n, statement)                                                                                 \
	do                                                                                                   \
		for (int i_ = 0; i_ < (n); i_++)                                                             \
			statement;                                                                           \
	while (0)

static int wrong;

static void expect_ones(uint64_t value, unsigned int bits)
{
	if (value != (bits == 64 ? ~0ull : (1ull << bits) - 1))
		wrong++;
}

int main(void)
{
	static uint8_t buffer[64] = {0};
	void *at = buffer;
	unsigned long count = sizeof(buffer);

	REPEAT(10, outb(PORT, 1));
	REPEAT(20, outw(PORT, 2));
	REPEAT(30, outl(PORT, 3));
	REPEAT(11, expect_ones(inb(PORT), 8));
	REPEAT(21, expect_ones(inw(PORT), 16));
	REPEAT(31, expect_ones(inl(PORT), 32));
	/* Strings, to a port of their own. */
	pyvmm_write(PORT + 4, buffer, sizeof(buffer));
	__asm__ volatile("rep insb" : "+D"(at), "+c"(count) : "d"(PORT + 4) : "memory");
	for (unsigned int i = 0; i < sizeof(buffer); i++)
		expect_ones(buffer[i], 8);
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
