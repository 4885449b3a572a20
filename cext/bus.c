/* SPDX-License-Identifier: MIT */
#include "bus.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "event.h"

struct pv_bus {
	pthread_rwlock_t lock;
	uint32_t count[PV_SPACES];
	struct pv_bus_region region[PV_SPACES][PV_BUS_REGIONS]; /* sorted by base, disjoint */
};

/**
 * pv_bus_new() - Make both I/O spaces, without regions
 *
 * Return: the bus, to be freed by pv_bus_free(), or NULL
 */
struct pv_bus *pv_bus_new(void)
{
	struct pv_bus *bus = calloc(1, sizeof(*bus));
	pthread_rwlockattr_t attr;

	if (!bus)
		return NULL;
	/* vCPUs that access devices all the time must not keep out who moves a region. */
	pthread_rwlockattr_init(&attr);
	pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&bus->lock, &attr);
	pthread_rwlockattr_destroy(&attr);
	return bus;
}

/**
 * pv_bus_free() - Free a bus
 * @bus:	From pv_bus_new(), or NULL; no vCPU uses it any more
 */
void pv_bus_free(struct pv_bus *bus)
{
	if (!bus)
		return;
	pthread_rwlock_destroy(&bus->lock);
	free(bus);
}

/**
 * pv_bus_add() - Map a region
 * @bus:	The bus; vCPUs may use it meanwhile
 * @space:	PV_PIO or PV_MMIO
 * @base:	First port or guest-physical address
 * @len:	Bytes
 * @id:		Identifies the region in the ledger; chosen by the caller, not 0
 * @kind:	Who answers accesses
 * @opaque:	The object that @kind needs; lent until pv_bus_remove()
 *
 * Return: 0; -EEXIST if another region is there; -ENOSPC if the space has too many regions; -EINVAL
 * if the range is empty or overflows
 */
int pv_bus_add(struct pv_bus *bus, enum pv_space space, uint64_t base, uint64_t len, uint32_t id,
	       enum pv_region_kind kind, void *opaque)
{
	struct pv_bus_region *r = bus->region[space];
	uint32_t i, n;
	int ret = 0;

	if (!len || base + len - 1 < base)
		return -EINVAL;
	pthread_rwlock_wrlock(&bus->lock);
	n = bus->count[space];
	for (i = 0; i < n && r[i].base < base; i++)
		;
	if ((i > 0 && r[i - 1].base + (r[i - 1].len - 1) >= base) ||
	    (i < n && base + (len - 1) >= r[i].base)) {
		ret = -EEXIST;
	} else if (n == PV_BUS_REGIONS) {
		ret = -ENOSPC;
	} else {
		memmove(&r[i + 1], &r[i], (n - i) * sizeof(*r));
		r[i] = (struct pv_bus_region){base, len, id, kind, opaque};
		bus->count[space]++;
	}
	pthread_rwlock_unlock(&bus->lock);
	return ret;
}

/**
 * pv_bus_remove() - Unmap a region
 * @bus:	The bus; vCPUs may use it meanwhile
 * @space:	PV_PIO or PV_MMIO
 * @base:	The region's base
 * @id:		The region's id
 *
 * When this returns, no vCPU uses the region's object any more, if the region is of a kind that
 * pv_bus_find() pins.
 *
 * Return: 0, or -ENOENT if there is no such region
 */
int pv_bus_remove(struct pv_bus *bus, enum pv_space space, uint64_t base, uint32_t id)
{
	struct pv_bus_region *r = bus->region[space];
	int ret = -ENOENT;

	pthread_rwlock_wrlock(&bus->lock);
	for (uint32_t i = 0; i < bus->count[space]; i++) {
		if (r[i].base != base || r[i].id != id)
			continue;
		bus->count[space]--;
		memmove(&r[i], &r[i + 1], (bus->count[space] - i) * sizeof(*r));
		ret = 0;
		break;
	}
	pthread_rwlock_unlock(&bus->lock);
	return ret;
}

/* Whether the region's object belongs to a card, which may be unplugged, and no access waits. */
static bool pinned(const struct pv_bus_region *r)
{
	return r->kind == PV_REGION_NOTIFY || r->kind == PV_REGION_NOTIFY_VALUE ||
	       r->kind == PV_REGION_ISR || r->kind == PV_REGION_ISR_ACK;
}

/**
 * pv_bus_find() - Look up the region of an access
 * @bus:	The bus
 * @space:	PV_PIO or PV_MMIO
 * @addr:	First port or guest-physical address of the access
 * @size:	Bytes
 * @out:	Gets a copy of the region, which pv_bus_put() takes back
 *
 * Return: true if a region contains the whole access
 */
bool pv_bus_find(struct pv_bus *bus, enum pv_space space, uint64_t addr, uint32_t size,
		 struct pv_bus_region *out)
{
	const struct pv_bus_region *r = bus->region[space];
	uint32_t lo = 0, hi;
	bool found = false;

	pthread_rwlock_rdlock(&bus->lock);
	hi = bus->count[space];
	while (lo < hi) { /* the last region that starts at or below addr */
		uint32_t mid = (lo + hi) / 2;

		if (r[mid].base <= addr)
			lo = mid + 1;
		else
			hi = mid;
	}
	if (lo) {
		r += lo - 1;
		if (addr - r->base < r->len && size <= r->len - (addr - r->base)) {
			*out = *r;
			found = true;
		}
	}
	if (!found || !pinned(out))
		pthread_rwlock_unlock(&bus->lock);
	return found;
}

/**
 * pv_bus_put() - The access is over
 * @bus:	The bus
 * @r:		From pv_bus_find(), which has found a region
 *
 * Until then the object of a pinned region is not released: the read lock is held. Objects of other
 * kinds live as long as the bus.
 */
void pv_bus_put(struct pv_bus *bus, const struct pv_bus_region *r)
{
	if (pinned(r))
		pthread_rwlock_unlock(&bus->lock);
}

/**
 * pv_notify_take() - Have kicks of a virtqueue taken in the vCPU's thread, or by the eventfd again
 * @bus:	The bus that the registers are on; vCPUs may use it meanwhile
 * @n:		The kick registers
 * @queue:	Number of the virtqueue, less than PV_QUEUES
 * @t:		Takes its kicks, lent until this is called again; NULL: none
 *
 * When this returns, no vCPU is in the taker of before: the bus is locked during an access.
 */
void pv_notify_take(struct pv_bus *bus, struct pv_notify *n, uint32_t queue, struct pv_taker *t)
{
	pthread_rwlock_wrlock(&bus->lock);
	n->taker[queue] = t;
	pthread_rwlock_unlock(&bus->lock);
}

/* --- accesses --------------------------------------------------------------------------------- */

static bool serial_access(struct pv_serial *s, uint64_t offset, bool write, uint8_t *data,
			  uint32_t size)
{
	/* A wide access is the same as byte accesses to consecutive ports. */
	for (uint32_t i = 0; i < size; i++) {
		if (write)
			pv_serial_out(s, (uint32_t)offset + i, data[i]);
		else
			data[i] = pv_serial_in(s, (uint32_t)offset + i);
	}
	return true;
}

/* The queue that a write kicks, or PV_REG_NO_QUEUE. */
static uint32_t kicked_queue(const struct pv_bus_region *r, uint64_t offset, const uint8_t *data,
			     uint32_t size)
{
	const struct pv_notify *n = r->opaque;
	uint64_t queue = 0;

	if (r->kind == PV_REGION_NOTIFY) {
		if (offset % n->stride)
			return PV_REG_NO_QUEUE;
		queue = offset / n->stride;
	} else {
		memcpy(&queue, data, size);
	}
	return queue < n->count ? (uint32_t)queue : PV_REG_NO_QUEUE;
}

static bool notify_access(const struct pv_bus_region *r, uint64_t offset, bool write, uint8_t *data,
			  uint32_t size)
{
	const struct pv_notify *n = r->opaque;
	uint32_t queue;

	if (!write) {
		memset(data, 0, size);
		return true;
	}
	queue = kicked_queue(r, offset, data, size);
	if (queue == PV_REG_NO_QUEUE)
		return true;
	if (n->taker[queue]) {
		n->taker[queue]->take(n->taker[queue]);
		return true;
	}
	if (n->fd[queue] < 0)
		return false;
	pv_event_nudge(n->fd[queue]); /* a peer may have spoilt it, and the bus is locked */
	return true;
}

/* InterruptStatus, which a driver only reads, and InterruptACK, which it only writes (4.2.2). */
static void isr_ack_access(struct pv_intx *x, uint64_t offset, bool write, uint8_t *data,
			   uint32_t size)
{
	if (!write) {
		memset(data, 0, size);
		if (offset == 0)
			data[0] = pv_intx_peek(x);
	} else if (offset == 4 && size == 4) {
		pv_intx_ack(x, data[0]);
	}
}

static bool pci_access(struct pv_pci_latch *l, uint64_t offset, bool write, uint8_t *data,
		       uint32_t size)
{
	uint32_t address = __atomic_load_n(&l->address, __ATOMIC_RELAXED);
	uint32_t device = (address >> 11) & 31;

	if (offset < 4) {
		if (offset || size != 4)
			return false; /* port 0xCF9 is the reset control register */
		if (write) {
			memcpy(&address, data, 4);
			__atomic_store_n(&l->address, address & 0x80fffffc, __ATOMIC_RELAXED);
		} else {
			memcpy(data, &address, 4);
		}
		return true;
	}
	/*
	 * The latch is enabled and selects function 0 of a device on bus 0 that exists. Answer
	 * reads of plain bytes here, and leave all else to Python.
	 */
	if ((address & 0x80ff0700) == 0x80000000 && (l->present >> device) & 1) {
		uint32_t at = (address & 0xfc) + (uint32_t)(offset & 3);

		if (write || !l->config[device] || (offset & 3) + size > 4 ||
		    (l->live[device] >> (at / 4)) & 1)
			return false;
		memcpy(data, l->config[device] + at, size);
		return true;
	}
	if (!write)
		memset(data, 0xff, size);
	return true;
}

static uint32_t pci_register(const struct pv_pci_latch *l, uint32_t offset)
{
	uint32_t address = __atomic_load_n(&l->address, __ATOMIC_RELAXED);

	if (offset < 4)
		return offset;
	if ((address & 0x80ff0700) != 0x80000000 || !((l->present >> ((address >> 11) & 31)) & 1))
		return PV_REG_PCI_NOBODY;
	return PV_REG_PCI | (address & 0xfffc) | (offset & 3);
}

/**
 * pv_bus_register() - The number of a register, for the ledger
 * @r:		The region
 * @addr:	Address of the access
 * @write:	Whether the guest writes
 * @data:	The bytes that the guest writes
 * @size:	1, 2, 4 or 8 bytes
 *
 * Call this before the access, which may change the number.
 *
 * Return: the number, see PV_REG_PCI
 */
uint32_t pv_bus_register(const struct pv_bus_region *r, uint64_t addr, bool write,
			 const uint8_t *data, uint32_t size)
{
	uint32_t offset = (uint32_t)(addr - r->base);

	switch (r->kind) {
	case PV_REGION_PCI:
		return pci_register(r->opaque, offset);
	case PV_REGION_SERIAL:
		return offset < 2 && pv_serial_dlab(r->opaque) ? PV_REG_DLAB | offset : offset;
	case PV_REGION_NOTIFY_VALUE:
		return write ? kicked_queue(r, offset, data, size) : PV_REG_NO_QUEUE;
	default:
		return offset;
	}
}

/**
 * pv_bus_access() - Answer one access in C
 * @r:		The region
 * @addr:	Address of the access
 * @write:	Whether the guest writes
 * @data:	The bytes, little-endian; filled in for a read
 * @size:	1, 2, 4 or 8 bytes
 *
 * Return: false if Python must answer
 */
bool pv_bus_access(const struct pv_bus_region *r, uint64_t addr, bool write, uint8_t *data,
		   uint32_t size)
{
	uint64_t offset = addr - r->base;

	switch (r->kind) {
	case PV_REGION_PYTHON:
		return false;
	case PV_REGION_SERIAL:
		return serial_access(r->opaque, offset, write, data, size);
	case PV_REGION_NOTIFY:
	case PV_REGION_NOTIFY_VALUE:
		return notify_access(r, offset, write, data, size);
	case PV_REGION_ISR:
		memset(data, 0, write ? 0 : size);
		if (!write && offset == 0)
			data[0] = pv_intx_read(r->opaque);
		return true;
	case PV_REGION_ISR_ACK:
		isr_ack_access(r->opaque, offset, write, data, size);
		return true;
	case PV_REGION_STREAM:
	case PV_REGION_DEBUGCON:
		if (write)
			pv_pipe_write(r->opaque, data, size, -1);
		else
			memset(data, r->kind == PV_REGION_STREAM ? 0 : (int)(r->base & 0xff), size);
		return true;
	case PV_REGION_PCI:
		return pci_access(r->opaque, offset, write, data, size);
	case PV_REGION_RTC: /* one byte, at the port addressed, whatever the width */
		memset(data, 0, write ? 0 : size);
		if (write)
			return pv_rtc_write(r->opaque, offset, data[0]);
		data[0] = pv_rtc_read(r->opaque, offset);
		return true;
	case PV_REGION_PMTIMER:
		if (!write) {
			uint64_t ticks = pv_pmtimer_read() >> 8 * offset;

			memcpy(data, &ticks, size);
		}
		return true;
	case PV_REGION_IGNORE:
		memset(data, 0, write ? 0 : size);
		return true;
	}
	return false;
}
