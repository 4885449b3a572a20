/* SPDX-License-Identifier: MIT */
/*
 * The two I/O spaces: which region answers at a port or address, and the devices that are simple or
 * busy enough to be in C.
 *
 * Python adds and removes regions while vCPUs run (a guest may move a BAR, or a card is unplugged),
 * so a look-up takes a read lock. The vCPU loop hands accesses to a region of kind PV_REGION_PYTHON to Python; accesses
 * to all other kinds are answered here. If no region contains an access entirely, a read gives all
 * ones and a write is lost, as on a bus without a device.
 */
#ifndef PV_BUS_H
#define PV_BUS_H

#include <pthread.h>
#include "intx.h"
#include "pmtimer.h"
#include "rtc.h"
#include "serial.h"
#include "types.h"

/* cffi: begin */
#define PV_BUS_REGIONS 256 /* per space: enough for 31 PCI functions of 6 regions and the board */
#define PV_QUEUES      129 /* of one card: 64 pairs and the control queue */

enum pv_space { PV_PIO, PV_MMIO, PV_SPACES };

enum pv_region_kind {
	PV_REGION_PYTHON,
	PV_REGION_SERIAL,	/* opaque: struct pv_serial */
	PV_REGION_NOTIFY,	/* opaque: struct pv_notify; the address is the queue's */
	PV_REGION_NOTIFY_VALUE, /* the same, but the value written is the queue's number */
	PV_REGION_ISR,		/* opaque: struct pv_intx */
	PV_REGION_ISR_ACK,	/* the same for virtio over MMIO: InterruptStatus, InterruptACK */
	PV_REGION_STREAM,	/* opaque: struct pv_pipe, which gets the bytes that are written */
	PV_REGION_DEBUGCON,	/* the same, but a read gives the port number: guests look for it */
	PV_REGION_PCI,		/* opaque: struct pv_pci_latch; ports 0xCF8..0xCFF */
	PV_REGION_RTC,		/* opaque: struct pv_rtc; ports 0x70 and 0x71 */
	PV_REGION_PMTIMER,	/* no opaque: the ACPI timer */
	PV_REGION_IGNORE	/* reads give zero, writes are lost */
};

/*
 * The number of a register, which pv_bus_register() makes of an access, is the offset in the region
 * with these exceptions. In the PCI data window it is PV_REG_PCI | bus, device and function << 8 |
 * offset in configuration space, or PV_REG_PCI_NOBODY if no function is there. In a serial port it
 * is PV_REG_DLAB | offset for the divisor latch. In a region of kind PV_REGION_NOTIFY_VALUE it is the
 * number of the queue that a write kicks, or PV_REG_NO_QUEUE.
 */
#define PV_REG_PCI	  0x1000000
#define PV_REG_PCI_NOBODY 0x2000000
#define PV_REG_DLAB	  0x100
#define PV_REG_NO_QUEUE	  0x10000

struct pv_bus;
struct pv_bus *pv_bus_new(void);
void pv_bus_free(struct pv_bus *bus);
int pv_bus_add(struct pv_bus *bus, enum pv_space space, uint64_t base, uint64_t len, uint32_t id,
	       enum pv_region_kind kind, void *opaque);
int pv_bus_remove(struct pv_bus *bus, enum pv_space space, uint64_t base, uint32_t id);

/*
 * The kick registers of virtqueues whose kicks come without ioeventfd. A write at offset q * stride,
 * or of the value q, kicks queue q by adding 1 to the eventfd fd[q].
 */
struct pv_notify {
	uint32_t count;
	uint32_t stride;
	int32_t fd[PV_QUEUES];		   /* lent; -1: Python answers */
	struct pv_taker *taker[PV_QUEUES]; /* lent; in place of the eventfd; NULL: none */
};

void pv_notify_take(struct pv_bus *bus, struct pv_notify *n, uint32_t queue, struct pv_taker *t);

/*
 * The PCI configuration address latch (PCI 3.0, 3.2.2.3.2). C answers accesses to functions that do
 * not exist, because guests look for functions by the hundred.
 */
struct pv_pci_latch {
	uint32_t address;
	uint32_t present; /* bit n: device n of bus 0 exists */
	/*
	 * The 256 bytes of each function's configuration space, which Python lends for reads; NULL:
	 * Python answers.
	 */
	const uint8_t *config[32];
	/* Bit n: Python answers reads of the doubleword at 4 * n, whose value is not in config. */
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
void pv_bus_put(struct pv_bus *bus, const struct pv_bus_region *r);
uint32_t pv_bus_register(const struct pv_bus_region *r, uint64_t addr, bool write,
			 const uint8_t *data, uint32_t size);
bool pv_bus_access(const struct pv_bus_region *r, uint64_t addr, bool write, uint8_t *data,
		   uint32_t size);

#endif
