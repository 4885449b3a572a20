/* SPDX-License-Identifier: MIT */
/*
 * Who answers at a port or address: regions of the two I/O spaces, and the devices simple or hot
 * enough to live in C.
 *
 * Python adds and removes regions while vCPUs run (a guest may move a BAR), so look-ups take a read
 * lock. A region of kind PV_REGION_PYTHON is handed to Python by the vCPU loop; every other kind is
 * answered here. An access that no region contains whole reads as all ones and writes nothing, like
 * a bus without a device.
 */
#ifndef PV_BUS_H
#define PV_BUS_H

#include <pthread.h>
#include "intx.h"
#include "serial.h"
#include "types.h"

/* cffi: begin */
#define PV_BUS_REGIONS 256 /* 31 PCI functions of 6 regions, and the board */

enum pv_space { PV_PIO, PV_MMIO, PV_SPACES };

enum pv_region_kind {
	PV_REGION_PYTHON,
	PV_REGION_SERIAL,   /* opaque: struct pv_serial */
	PV_REGION_NOTIFY,   /* opaque: struct pv_notify */
	PV_REGION_ISR,	    /* opaque: struct pv_intx */
	PV_REGION_STREAM,   /* opaque: struct pv_pipe; bytes written go there */
	PV_REGION_DEBUGCON, /* the same, but reads as its port number, by which it is found */
	PV_REGION_PCI,	    /* opaque: struct pv_pci_latch; 0xCF8..0xCFF */
	PV_REGION_IGNORE    /* reads as zero, swallows writes */
};

/*
 * What pv_bus_register() makes of an access, beside the offset in the region. Of the PCI data
 * window: which configuration register, PV_REG_PCI | bus, device and function << 8 | offset, or
 * that no function is there. Of a serial port: PV_REG_DLAB | offset for the divisor latch.
 */
#define PV_REG_PCI	  0x1000000
#define PV_REG_PCI_NOBODY 0x2000000
#define PV_REG_DLAB	  0x100

struct pv_bus;
struct pv_bus *pv_bus_new(void);
void pv_bus_free(struct pv_bus *bus);
int pv_bus_add(struct pv_bus *bus, enum pv_space space, uint64_t base, uint64_t len, uint32_t id,
	       enum pv_region_kind kind, void *opaque);
int pv_bus_remove(struct pv_bus *bus, enum pv_space space, uint64_t base, uint32_t id);

/*
 * Virtqueue notification without ioeventfd: queue q is at offset q * stride and is kicked by adding
 * 1 to fd[q].
 */
struct pv_notify {
	uint32_t count;
	uint32_t stride;
	int32_t fd[64]; /* -1: Python's */
};

/*
 * PCI configuration address latch (PCI 3.0, 3.2.2.3.2). Accesses to functions that are not present
 * are answered here; the guest looks for them by the hundred.
 */
struct pv_pci_latch {
	uint32_t address;
	uint32_t present; /* bit n: bus 0 device n exists */
	/*
	 * The 256 bytes of each function's configuration space, lent by Python, for reads; NULL:
	 * Python answers. live: bit n, the doubleword at 4 * n is more than the bytes there.
	 */
	const uint8_t *config[32];
	uint64_t live[32];
};
/* cffi: end */

struct pv_bus_region {
	uint64_t base, len;
	uint32_t id;
	enum pv_region_kind kind;
	void *opaque;
};

bool pv_bus_find(struct pv_bus *bus, enum pv_space space, uint64_t addr, uint32_t size,
		 struct pv_bus_region *out);
uint32_t pv_bus_register(const struct pv_bus_region *r, uint64_t addr);
bool pv_bus_access(const struct pv_bus_region *r, uint64_t addr, bool write, uint8_t *data,
		   uint32_t size);

#endif
