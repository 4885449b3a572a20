/* SPDX-License-Identifier: MIT */
/* Configuration space by ports 0xCF8 and 0xCFC: bus 0, function 0. One access is two exits. */
#ifndef PYVMM_PCI_H
#define PYVMM_PCI_H

#include "guest.h"

#define PCI_COMMAND	    0x04
#define PCI_BAR0	    0x10
#define PCI_CAPABILITIES    0x34
#define PCI_COMMAND_IO	    1
#define PCI_COMMAND_MEMORY  2
#define PCI_COMMAND_MASTER  4
#define PCI_STATUS_CAP_LIST 0x10
#define PCI_CAP_ID_VNDR	    0x09
#define PCI_CAP_ID_MSIX	    0x11
#define PCI_BAR_IO	    1
#define PCI_SLOTS	    32
#define PCI_ID_NET	    0x10411af4
#define PCI_ID_NET_LEGACY   0x10001af4 /* a card for legacy drivers, too */
#define GSI_PCI_BASE	    16
#define GSI_PCI_COUNT	    8

static inline uint32_t pci_read(unsigned int slot, unsigned int reg)
{
	outl(PORT_PCI_ADDRESS, 1u << 31 | slot << 11 | (reg & 0xfc));
	return inl(PORT_PCI_DATA);
}

static inline void pci_write(unsigned int slot, unsigned int reg, uint32_t value)
{
	outl(PORT_PCI_ADDRESS, 1u << 31 | slot << 11 | (reg & 0xfc));
	outl(PORT_PCI_DATA, value);
}

static inline uint8_t pci_read8(unsigned int slot, unsigned int reg)
{
	return (uint8_t)(pci_read(slot, reg) >> 8 * (reg & 3));
}

/* Find the first function with this vendor (lower half) and device id; PCI_SLOTS if there is none. */
static inline unsigned int pci_find(uint32_t id)
{
	unsigned int slot = 0;

	while (slot < PCI_SLOTS && pci_read(slot, 0) != id)
		slot++;
	return slot;
}

/* Write one entry of an MSI-X table: a message to the boot CPU. */
static inline void msix_entry(uint64_t table, unsigned int entry, uint8_t vector)
{
	uint64_t at = table + 16 * entry;

	mmio_write32(at, LAPIC_BASE);
	mmio_write32(at + 4, 0);
	mmio_write32(at + 8, vector);
	mmio_write32(at + 12, 0);
}

#endif
