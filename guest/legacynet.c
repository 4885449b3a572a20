/* SPDX-License-Identifier: MIT */
/*
 * A driver from before virtio 1.0 (virtio 1.2, 4.1.4.10): it knows I/O BAR 0 and nothing else. It
 * asks by ARP who has target=A.B.C.D (default 192.168.100.1), count=N times (default 1), and waits
 * for each answer. Then it kicks the empty transmit queue kicks=N times (default 0) in the command
 * phase. irq=poll (default), intx or msix chooses how it learns that a frame has come. mrg=1
 * accepts MRG_RXBUF, with which the header has 12 bytes, not 10. early=1 sets up the queues before
 * status and features and leaves out ACKNOWLEDGE, as iPXE does. mac=1 gives the card another
 * address. hostile=1 breaks rules first; after each case the card must work again.
 */
#include "arp.h"
#include "pci.h"

#define BAR 0xc800 /* where the driver puts the registers */

#define DEVICE_FEATURES 0
#define DRIVER_FEATURES 4
#define QUEUE_ADDRESS	8
#define QUEUE_SIZE	12
#define QUEUE_SELECT	14
#define QUEUE_NOTIFY	16
#define STATUS		18
#define ISR		19
#define CONFIG_VECTOR	20 /* while MSI-X is enabled */
#define QUEUE_VECTOR	22
#define NO_VECTOR	0xffff

#define ACKNOWLEDGE 1
#define DRIVER	    2
#define DRIVER_OK   4

#define F_MAC	     (1u << 5)
#define F_MRG_RXBUF  (1u << 15)
#define F_ANY_LAYOUT (1u << 27)

#define PAGE	     4096
#define LARGEST	     256
#define BUFFERS	     16
#define BUFFER	     2048
#define DESC_WRITE   2
#define AVAIL_NO_IRQ 1
#define VECTOR	     0x50

enum irq { POLL, INTX, MSIX };

struct descriptor {
	uint64_t address;
	uint32_t length;
	uint16_t flags, next;
};

/* A queue: its areas lie behind one another, and the device dictates its size (2.7.2). */
struct queue {
	uint8_t ring[3 * PAGE] __attribute__((aligned(PAGE)));
	uint8_t buffer[BUFFERS][BUFFER];
	uint16_t number, size, seen;
	struct descriptor *desc;
	volatile uint16_t *avail, *used;
};

static struct queue receive, transmit;
static unsigned int slot, config, header, kicks;
static enum irq irq;
static bool early;
static uint8_t mac[6], own[4], target[4];
static volatile unsigned int interrupts;

static void on_interrupt(unsigned int vector)
{
	(void)vector;
	interrupts += irq == MSIX || inb(BAR + ISR) & 1;
	lapic_eoi();
}

static void probe(void)
{
	unsigned int at, table;

	slot = pci_find(PCI_ID_NET_LEGACY);
	if (slot == PCI_SLOTS)
		fail("legacynet: no transitional card");
	if (pci_read(slot, 8) & 0xff)
		fail("legacynet: revision %u, which legacy drivers do not take",
		     pci_read(slot, 8) & 0xff);
	if (pci_read(slot, 0x2c) >> 16 != 1)
		fail("legacynet: subsystem %x", pci_read(slot, 0x2c) >> 16);
	if (!(pci_read(slot, PCI_BAR0) & PCI_BAR_IO))
		fail("legacynet: BAR 0 is no I/O BAR");
	pci_write(slot, PCI_BAR0, BAR);
	pci_write(slot, PCI_COMMAND, PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
	config = 20;
	irq_set(VECTOR, on_interrupt);
	if (irq == INTX)
		ioapic_route_level_low(GSI_PCI_BASE + slot % GSI_PCI_COUNT, VECTOR);
	if (irq != MSIX)
		return;
	at = pci_read8(slot, PCI_CAPABILITIES);
	while (at && pci_read8(slot, at) != PCI_CAP_ID_MSIX)
		at = pci_read8(slot, at + 1);
	if (!at)
		fail("legacynet: no MSI-X");
	table = pci_read(slot, at + 4);
	msix_entry((pci_read(slot, PCI_BAR0 + 4 * (table & 7)) & ~0xfu) + (table & ~7u), 0, VECTOR);
	pci_write(slot, at, pci_read(slot, at) | 1u << 31);
	config = 24;
}

static void reset(void)
{
	outb(BAR + STATUS, 0);
	/* Legacy drivers read the status once, to have the write done; they do not wait. */
	if (inb(BAR + STATUS))
		fail("legacynet: status %x after a reset", inb(BAR + STATUS));
}

static void setup_queue(struct queue *q, uint16_t number)
{
	unsigned int used;

	memset(q, 0, sizeof(*q));
	outw(BAR + QUEUE_SELECT, number);
	q->number = number;
	q->size = inw(BAR + QUEUE_SIZE);
	if (q->size < BUFFERS || q->size > LARGEST || inl(BAR + QUEUE_ADDRESS))
		fail("legacynet: queue %u has %u entries", number, q->size);
	q->desc = (struct descriptor *)q->ring;
	q->avail = (uint16_t *)(q->ring + 16 * q->size);
	used = (16u * q->size + 6 + 2 * q->size + PAGE - 1) & ~(PAGE - 1u);
	q->used = (uint16_t *)(q->ring + used);
	q->avail[0] = irq == POLL || number ? AVAIL_NO_IRQ : 0;
	outl(BAR + QUEUE_ADDRESS, (uint32_t)((uint64_t)q->ring / PAGE));
	if (irq == MSIX)
		outw(BAR + QUEUE_VECTOR, number ? NO_VECTOR : 0);
}

static void offer(struct queue *q, uint16_t i, uint32_t length, uint16_t flags)
{
	q->desc[i] = (struct descriptor){(uint64_t)q->buffer[i], length, flags, 0};
	q->avail[2 + q->avail[1] % q->size] = i;
	barrier();
	q->avail[1]++;
}

static void kick(struct queue *q)
{
	kicks++;
	outw(BAR + QUEUE_NOTIFY, q->number);
}

static bool take(struct queue *q, uint16_t *i, uint32_t *length)
{
	volatile uint32_t *element = (volatile uint32_t *)(q->used + 2) + 2 * (q->seen % q->size);

	if (q->used[1] == q->seen)
		return false;
	barrier();
	*i = (uint16_t)element[0];
	*length = element[1];
	q->seen++;
	return true;
}

static void features(uint32_t wanted)
{
	uint32_t offered = inl(BAR + DEVICE_FEATURES);

	if (~offered & wanted)
		fail("legacynet: offered %x", offered);
	outl(BAR + DRIVER_FEATURES, wanted);
	if (inl(BAR + DRIVER_FEATURES) != wanted)
		fail("legacynet: features read back as %x", inl(BAR + DRIVER_FEATURES));
}

/* From reset to DRIVER_OK, with all receive buffers offered. */
static void bring_up(bool mrg, const uint8_t *address)
{
	uint32_t wanted = F_MAC | F_ANY_LAYOUT | (mrg ? F_MRG_RXBUF : 0);

	header = mrg ? 12 : 10;
	reset();
	if (!early) {
		outb(BAR + STATUS, ACKNOWLEDGE);
		outb(BAR + STATUS, ACKNOWLEDGE | DRIVER);
		features(wanted);
	}
	for (unsigned int i = 0; i < 6 && address; i++)
		outb((uint16_t)(BAR + config + i), address[i]);
	for (unsigned int i = 0; i < 6; i++)
		mac[i] = inb((uint16_t)(BAR + config + i));
	if (address && memcmp(mac, address, 6))
		fail("legacynet: the address reads back as %x:...:%x", mac[0], mac[5]);
	setup_queue(&receive, 0);
	setup_queue(&transmit, 1);
	if (early)
		features(wanted);
	outb(BAR + STATUS, (early ? 0 : ACKNOWLEDGE) | DRIVER | DRIVER_OK);
	for (uint16_t i = 0; i < BUFFERS; i++)
		offer(&receive, i, BUFFER, DESC_WRITE);
	kick(&receive);
}

static void ask(void)
{
	uint16_t i = transmit.avail[1] % BUFFERS;
	uint32_t length;
	bool answered = false;

	memset(transmit.buffer[i], 0, header);
	arp_request(transmit.buffer[i] + header, mac, own, target);
	offer(&transmit, i, header + ARP_FRAME, 0);
	kick(&transmit);
	while (!answered) {
		if (take(&receive, &i, &length)) {
			answered = length > header && arp_answers(receive.buffer[i] + header,
								  length - header, mac, target);
			offer(&receive, i, BUFFER, DESC_WRITE);
			kick(&receive);
		} else if (irq != POLL) {
			irq_wait();
		} else {
			pause();
		}
	}
	while (!take(&transmit, &i, &length))
		pause();
}

/* --- a driver that breaks rules --------------------------------------------------------------- */

static void queues_at(uint32_t page)
{
	outb(BAR + STATUS, ACKNOWLEDGE | DRIVER);
	for (uint16_t number = 0; number < 4; number++) {
		outw(BAR + QUEUE_SELECT, number);
		outl(BAR + QUEUE_ADDRESS, page);
	}
	outb(BAR + STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
	for (uint16_t number = 0; number < 4; number++)
		outw(BAR + QUEUE_NOTIFY, number);
}

static void beyond_memory(void)
{
	queues_at(~0u);
}

static void over_devices(void)
{
	queues_at(PCI_MMIO_BASE / PAGE);
}

static void over_the_end_of_memory(void)
{
	queues_at((4u << 20) / PAGE - 1); /* the machine has 4 MiB */
}

static void moved_while_it_runs(void)
{
	bring_up(false, NULL);
	queues_at(~0u);
}

static void let_go_while_it_runs(void)
{
	uint16_t i;
	uint32_t length;

	bring_up(false, NULL);
	for (uint16_t number = 0; number < 2; number++) {
		outw(BAR + QUEUE_SELECT, number);
		outl(BAR + QUEUE_ADDRESS, 0);
		if (inl(BAR + QUEUE_ADDRESS))
			fail("legacynet: the card keeps queue %u", number);
	}
	/* The memory is the driver's again: the card must not touch what lies there now. */
	memset(receive.ring, 0, sizeof(receive.ring));
	outw(BAR + QUEUE_NOTIFY, 0);
	if (take(&receive, &i, &length))
		fail("legacynet: the card uses a queue that it has let go of");
}

static void no_such_queue(void)
{
	bring_up(false, NULL);
	for (unsigned int number = 2; number < 0x10000; number = 2 * number + 1) {
		outw(BAR + QUEUE_SELECT, (uint16_t)number);
		outl(BAR + QUEUE_ADDRESS, 1);
		outw(BAR + QUEUE_NOTIFY, (uint16_t)number);
	}
}

static void other_widths(void)
{
	for (uint16_t at = 0; at < 64; at++) {
		(void)inb((uint16_t)(BAR + at));
		(void)inw((uint16_t)(BAR + at));
		(void)inl((uint16_t)(BAR + at));
		outb((uint16_t)(BAR + at), 0xff);
		outw((uint16_t)(BAR + at), 0xffff);
		outl((uint16_t)(BAR + at), ~0u);
	}
}

static void every_feature(void)
{
	outb(BAR + STATUS, ACKNOWLEDGE | DRIVER);
	outl(BAR + DRIVER_FEATURES, ~0u);
	outb(BAR + STATUS, 0xff);
}

/* The common configuration begins at BAR 1: selectors, features, status, queue 0. */
static void both_interfaces(void)
{
	uint64_t common = pci_read(slot, PCI_BAR0 + 4) & ~0xfu;

	bring_up(false, NULL);
	for (unsigned int round = 0; round < 2; round++) {
		mmio_write8(common + 20, ACKNOWLEDGE);
		mmio_write8(common + 20, ACKNOWLEDGE | DRIVER);
		mmio_write32(common + 12, ~0u);
		mmio_write8(common + 20, ACKNOWLEDGE | DRIVER | 8);
		mmio_write16(common + 24, 2);
		mmio_write32(common + 32, 0xfffff000);
		mmio_write16(common + 28, 1);
		mmio_write8(common + 20, ACKNOWLEDGE | DRIVER | 8 | DRIVER_OK);
		if (round)
			break;
		ask(); /* the card goes on with the interface that was first */
		mmio_write8(common + 20, 0);
		while (mmio_read8(common + 20))
			pause();
	}
	queues_at(1); /* now the modern interface was first */
}

static void hostile(void)
{
	static void (*const cases[])(void) = {
		beyond_memory,	     over_devices,  over_the_end_of_memory,
		moved_while_it_runs, no_such_queue, let_go_while_it_runs,
		other_widths,	     every_feature, both_interfaces,
	};

	for (unsigned int i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		reset();
		cases[i]();
		bring_up(false, NULL);
		ask();
	}
}

int main(void)
{
	static const uint8_t other[6] = {0x52, 0x54, 0, 0xab, 0xcd, 0xef};
	char text[24];
	unsigned long count = option_number("count", 1), extra = option_number("kicks", 0), begin;

	if (option("irq", text, sizeof(text)))
		irq = text[0] == 'm' ? MSIX : text[0] == 'i' ? INTX : POLL;
	parse_ip(option("target", text, sizeof(text)) ? text : "192.168.100.1", target);
	memcpy(own, target, 4);
	own[3]++;
	irq_init();
	lapic_enable();
	probe();
	if (option_number("hostile", 0))
		hostile();
	early = option_number("early", 0);
	bring_up(option_number("mrg", 0), option_number("mac", 0) ? other : NULL);
	for (unsigned long n = 0; n < count; n++)
		ask();
	if (irq != POLL)
		irq_await(&interrupts, 0);
	pyvmm_control(GUEST_COMMAND, 0);
	begin = rdtsc();
	for (unsigned long n = 0; n < extra; n++)
		outw(BAR + QUEUE_NOTIFY, transmit.number);
	begin = rdtsc() - begin;
	pyvmm_control(GUEST_STATUS, 0);
	reset();
	say("legacynet: %lu asked and answered, %s, %u kicks\n", count,
	    irq == POLL	 ? "polling"
	    : interrupts ? "by interrupts"
			 : "without interrupts",
	    kicks);
	if (extra)
		say("legacynet: %lu cycles per kick\n", begin / extra);
	return irq == POLL || interrupts ? 0 : 1;
}
