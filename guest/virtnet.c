/* SPDX-License-Identifier: MIT */
#include "virtnet.h"

#include "pci.h"

struct virtnet net;
struct queue receive, transmit;

/* --- registers -------------------------------------------------------------------------------- */

/* Offset and width in bytes in the common configuration (4.1.4.3), offset in the window (4.2.2). */
static const struct {
	uint8_t pci, width;
	uint16_t mmio;
} places[] = {
	[NET_DEVICE_FEATURE_SELECT] = {0, 4, 0x014},
	[NET_DEVICE_FEATURE] = {4, 4, 0x010},
	[NET_DRIVER_FEATURE_SELECT] = {8, 4, 0x024},
	[NET_DRIVER_FEATURE] = {12, 4, 0x020},
	[NET_STATUS] = {20, 1, 0x070},
	[NET_QUEUE_SELECT] = {22, 2, 0x030},
	[NET_QUEUE_SIZE_MAX] = {24, 2, 0x034},
	[NET_QUEUE_SIZE] = {24, 2, 0x038},
	[NET_QUEUE_ENABLE] = {28, 2, 0x044},
	[NET_QUEUE_DESC] = {32, 4, 0x080},
	[NET_QUEUE_DESC_HIGH] = {36, 4, 0x084},
	[NET_QUEUE_DRIVER] = {40, 4, 0x090},
	[NET_QUEUE_DRIVER_HIGH] = {44, 4, 0x094},
	[NET_QUEUE_DEVICE] = {48, 4, 0x0a0},
	[NET_QUEUE_DEVICE_HIGH] = {52, 4, 0x0a4},
};

uint32_t net_read(enum net_register reg)
{
	uint64_t at = net.caps[CAP_COMMON] + places[reg].pci;

	if (net.window)
		return mmio_read32(net.window + places[reg].mmio);
	return places[reg].width == 1	? mmio_read8(at)
	       : places[reg].width == 2 ? mmio_read16(at)
					: mmio_read32(at);
}

void net_write(enum net_register reg, uint32_t value)
{
	uint64_t at = net.caps[CAP_COMMON] + places[reg].pci;

	if (net.window)
		mmio_write32(net.window + places[reg].mmio, value);
	else if (places[reg].width == 1)
		mmio_write8(at, (uint8_t)value);
	else if (places[reg].width == 2)
		mmio_write16(at, (uint16_t)value);
	else
		mmio_write32(at, value);
}

/* --- MMIO ------------------------------------------------------------------------------------- */

static uint64_t number(const char **at, unsigned int base)
{
	uint64_t value = 0;

	for (;; (*at)++) {
		char c = **at;
		unsigned int digit = c >= '0' && c <= '9'   ? (unsigned int)(c - '0')
				     : c >= 'a' && c <= 'f' ? (unsigned int)(c - 'a' + 10)
							    : base;

		if (digit >= base)
			return value;
		value = value * base + digit;
	}
}

/* "4K@0xfeb00000:17": where the window is; returns the interrupt line. */
static unsigned int place_window(const char *text)
{
	const char *at = text;

	while (*at && *at++ != '@')
		;
	at += memcmp(at, "0x", 2) ? 0 : 2;
	net.window = number(&at, 16);
	if (!net.window || *at++ != ':')
		fail("net: virtio_mmio.device=%s", text);
	net.caps[CAP_DEVICE] = net.window + MMIO_CONFIG;
	return (unsigned int)number(&at, 10);
}

/* --- PCI -------------------------------------------------------------------------------------- */

/* Find each memory BAR's size and give it a naturally aligned address from PCI_MMIO_BASE up. */
static void place_bars(void)
{
	uint32_t next = PCI_MMIO_BASE;

	for (unsigned int i = 0; i < 6; i++) {
		unsigned int reg = PCI_BAR0 + 4 * i;
		uint32_t mask, size;

		pci_write(net.slot, reg, ~0u);
		mask = pci_read(net.slot, reg);
		size = ~(mask & ~0xfu) + 1;
		if (mask & 1 || !size)
			continue;
		next = (next + size - 1) & ~(size - 1);
		net.bars[i] = next;
		pci_write(net.slot, reg, next);
		next += size;
		if ((mask & 6) == 4) /* a 64-bit BAR: the next register is its upper half */
			pci_write(net.slot, PCI_BAR0 + 4 * ++i, 0);
	}
	net_master(true);
}

void net_master(bool on)
{
	pci_write(net.slot, PCI_COMMAND, PCI_COMMAND_MEMORY | (on ? PCI_COMMAND_MASTER : 0));
}

/* Read the MSI-X capability and virtio's own (virtio 1.2, 4.1.4). */
static void read_capabilities(void)
{
	if (!(pci_read(net.slot, PCI_COMMAND) >> 16 & PCI_STATUS_CAP_LIST))
		fail("net: no capability list");
	for (unsigned int at = pci_read8(net.slot, PCI_CAPABILITIES), left = 48; at && left;
	     at = pci_read8(net.slot, at + 1), left--) {
		uint8_t id = pci_read8(net.slot, at), type = pci_read8(net.slot, at + 3),
			bar = pci_read8(net.slot, at + 4);

		if (id == PCI_CAP_ID_MSIX) {
			uint32_t table = pci_read(net.slot, at + 4);

			net.msix = at;
			net.msix_table = net.bars[table & 7] + (table & ~7u);
		}
		if (id != PCI_CAP_ID_VNDR || !type || type >= CAP_COUNT || net.caps[type] ||
		    bar > 5)
			continue;
		net.caps[type] = net.bars[bar] + pci_read(net.slot, at + 8);
		if (type == CAP_NOTIFY)
			net.notify_multiplier = pci_read(net.slot, at + 16);
	}
	for (int type = CAP_COMMON; type < CAP_COUNT; type++)
		if (!net.caps[type])
			fail("net: no capability of type %d", type);
}

/* --- interrupts ------------------------------------------------------------------------------- */

static void on_msix(unsigned int vector)
{
	if (vector == VECTOR_CONFIG)
		net.config_interrupts++;
	else
		net.queue_interrupts++;
	lapic_eoi();
}

static void on_intx(unsigned int vector)
{
	uint8_t isr = mmio_read8(net.caps[CAP_ISR]); /* reading lowers the line */

	(void)vector;
	net.queue_interrupts += isr & 1;
	net.config_interrupts += isr >> 1 & 1;
	lapic_eoi();
}

static void on_line(unsigned int vector)
{
	uint32_t isr = mmio_read32(net.window + MMIO_INTERRUPT_STATUS);

	(void)vector;
	mmio_write32(net.window + MMIO_INTERRUPT_ACK, isr); /* lowers the line */
	net.queue_interrupts += isr & 1;
	net.config_interrupts += isr >> 1 & 1;
	lapic_eoi();
}

static void probe_window(const char *text)
{
	unsigned int gsi = place_window(text);

	if (mmio_read32(net.window + MMIO_MAGIC_VALUE) != 0x74726976 ||
	    mmio_read32(net.window + MMIO_VERSION) != 2 ||
	    mmio_read32(net.window + MMIO_DEVICE_ID) != 1)
		fail("net: no virtio-net card at %lx", net.window);
	irq_set(VECTOR_QUEUE, on_line);
	if (net.irq != IRQ_POLL)
		ioapic_route_level_low(gsi, VECTOR_QUEUE);
}

void net_probe(enum net_irq irq)
{
	char text[40];

	net.irq = irq;
	if (option("virtio_mmio.device", text, sizeof(text)))
		return probe_window(text);
	net.slot = pci_find(PCI_ID_NET);
	if (net.slot == PCI_SLOTS)
		net.slot = pci_find(PCI_ID_NET_LEGACY);
	if (net.slot == PCI_SLOTS)
		fail("net: no virtio-net card");
	place_bars();
	read_capabilities();
	irq_set(VECTOR_QUEUE, irq == IRQ_INTX ? on_intx : on_msix);
	irq_set(VECTOR_CONFIG, on_msix);
	if (irq == IRQ_INTX)
		ioapic_route_level_low(GSI_PCI_BASE + net.slot % GSI_PCI_COUNT, VECTOR_QUEUE);
	if (irq != IRQ_MSIX)
		return;
	if (!net.msix)
		fail("net: no MSI-X");
	msix_entry(net.msix_table, 0, VECTOR_QUEUE);
	msix_entry(net.msix_table, 1, VECTOR_CONFIG);
	pci_write(net.slot, net.msix, pci_read(net.slot, net.msix) | 1u << 31);
}

/* --- the device (4.1.4.3, 3.1.1) -------------------------------------------------------------- */

uint8_t net_status(void)
{
	return (uint8_t)net_read(NET_STATUS);
}

void net_reset(void)
{
	net_write(NET_STATUS, 0);
	/* Each read is an exit, and the device needs the processor, too. */
	while (net_status())
		for (int i = 0; i < 100; i++)
			pause();
}

/* Take one step: write its bit, and those of the steps before it unless the driver forgets them. */
static void take_step(uint8_t before, uint8_t step)
{
	net_write(NET_STATUS, net.steps == STEPS_BARE ? step : before | step);
}

void net_negotiate(uint64_t features)
{
	uint64_t offered = 0;

	net_reset();
	if (net.steps != STEPS_JOINED)
		take_step(0, STATUS_ACKNOWLEDGE);
	take_step(STATUS_ACKNOWLEDGE, STATUS_DRIVER);
	for (uint32_t i = 0; i < 2; i++) {
		net_write(NET_DEVICE_FEATURE_SELECT, i);
		offered |= (uint64_t)net_read(NET_DEVICE_FEATURE) << 32 * i;
		net_write(NET_DRIVER_FEATURE_SELECT, i);
		net_write(NET_DRIVER_FEATURE, (uint32_t)(features >> 32 * i));
	}
	if (features & ~offered)
		fail("net: offered %lx, want %lx", offered, features);
	if (net.steps == STEPS_QUEUES_FIRST)
		net_queues();
	take_step(STATUS_ACKNOWLEDGE | STATUS_DRIVER, STATUS_FEATURES_OK);
	if (!(net_status() & STATUS_FEATURES_OK))
		fail("net: features %lx refused", features);
	for (unsigned int i = 0; i < 6; i++)
		net.mac[i] = mmio_read8(net.caps[CAP_DEVICE] + i);
	if (!net.window)
		mmio_write16(net.caps[CAP_COMMON] + COMMON_MSIX_CONFIG,
			     net.irq == IRQ_MSIX ? 1 : NO_VECTOR);
}

static void write_address(enum net_register low, uint64_t address)
{
	/* The driver writes 64-bit registers in two halves (4.1.3.1). */
	net_write(low, (uint32_t)address);
	net_write(low + 1, (uint32_t)(address >> 32));
}

/* The vector of the selected queue, and the address of its kick register. */
static void pci_queue(struct queue *q, uint16_t vector)
{
	uint64_t common = net.caps[CAP_COMMON];

	mmio_write16(common + COMMON_QUEUE_MSIX_VECTOR, vector);
	if (mmio_read16(common + COMMON_QUEUE_MSIX_VECTOR) != vector)
		fail("net: queue %u gets no vector %u", q->number, vector);
	q->notify = net.caps[CAP_NOTIFY] +
		    (uint64_t)mmio_read16(common + COMMON_QUEUE_NOTIFY_OFF) * net.notify_multiplier;
}

void net_queue_at(struct queue *q, uint16_t number, uint64_t desc, uint64_t driver, uint64_t device)
{
	/* Only the receive queue interrupts. */
	bool interrupts = net.irq != IRQ_POLL && number == 0;
	uint16_t vector = net.irq == IRQ_MSIX && interrupts ? 0 : NO_VECTOR;

	memset(q, 0, offsetof(struct queue, buffer));
	q->number = number;
	q->avail.flags = interrupts ? 0 : AVAIL_NO_IRQ;
	net_write(NET_QUEUE_SELECT, number);
	if (net_read(NET_QUEUE_SIZE_MAX) < QUEUE_SIZE)
		fail("net: queue %u is too small", number);
	net_write(NET_QUEUE_SIZE, QUEUE_SIZE);
	write_address(NET_QUEUE_DESC, desc);
	write_address(NET_QUEUE_DRIVER, driver);
	write_address(NET_QUEUE_DEVICE, device);
	q->notify = net.window + MMIO_QUEUE_NOTIFY;
	if (!net.window)
		pci_queue(q, vector);
	net_write(NET_QUEUE_ENABLE, 1);
}

void net_queues(void)
{
	struct queue *queues[2] = {&receive, &transmit};

	for (uint16_t i = 0; i < 2; i++) {
		struct queue *q = queues[i];

		net_queue_at(q, i, (uint64_t)q->desc, (uint64_t)&q->avail, (uint64_t)&q->used);
	}
}

void net_go(void)
{
	take_step(STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK, STATUS_DRIVER_OK);
	for (uint16_t i = 0; i < QUEUE_SIZE; i++)
		queue_offer(&receive, i, BUFFER, DESC_WRITE);
	queue_kick(&receive);
}

/* --- split virtqueues (2.7) ------------------------------------------------------------------- */

void queue_publish(struct queue *q, uint16_t head)
{
	q->avail.ring[q->avail.index % QUEUE_SIZE] = head;
	__atomic_store_n(&q->avail.index, (uint16_t)(q->avail.index + 1), __ATOMIC_RELEASE);
}

void queue_offer(struct queue *q, uint16_t i, uint32_t length, uint16_t flags)
{
	q->desc[i] = (struct descriptor){(uint64_t)q->buffer[i], length, flags, 0};
	queue_publish(q, i);
}

void queue_kick(struct queue *q)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST); /* write the index before reading the flags */
	if (__atomic_load_n(&q->used.flags, __ATOMIC_ACQUIRE) & USED_NO_KICK)
		return;
	net.kicks++;
	queue_notify(q);
}

void queue_notify(struct queue *q)
{
	if (net.window)
		mmio_write32(q->notify, q->number);
	else
		mmio_write16(q->notify, q->number);
}

#ifdef BUGS
/*
 * Bugs on purpose, for scenarios of faults to find: bug=stale (default) or bug=turn on the command
 * line.
 */
static bool bug(char letter)
{
	static char text[8];

	if (!text[0] && !option("bug", text, sizeof(text)))
		text[0] = 's';
	return text[0] == letter;
}
#endif

bool queue_used(struct queue *q, uint16_t *i, uint32_t *length)
{
	if (__atomic_load_n(&q->used.index, __ATOMIC_ACQUIRE) == q->seen)
		return false;
	*i = (uint16_t)q->used.ring[q->seen % QUEUE_SIZE].id;
	*length = q->used.ring[q->seen % QUEUE_SIZE].length;
#ifdef BUGS
	/* The driver waits for the buffer whose turn it is: the one that was available first. */
	if (bug('t') && *i != q->avail.ring[q->seen % QUEUE_SIZE])
		return false;
#endif
	if (*i >= QUEUE_SIZE)
		fail("net: used id %u", *i);
	q->seen++;
	return true;
}

/* --- ARP -------------------------------------------------------------------------------------- */

#ifdef BUGS
/*
 * Before a request, the driver clears away what has come meanwhile, and forgets the buffers of
 * answers. With one answer per request, there are none.
 */
static void clear_away(const uint8_t *target)
{
	uint16_t i;
	uint32_t length;

	while (queue_used(&receive, &i, &length)) {
		if (length > NET_HEADER && arp_answers(receive.buffer[i] + NET_HEADER,
						       length - NET_HEADER, net.mac, target))
			continue;
		queue_offer(&receive, i, BUFFER, DESC_WRITE);
		queue_kick(&receive);
	}
}
#endif

void arp_offer(const uint8_t *own, const uint8_t *target)
{
	static uint16_t sent;
	uint16_t i = sent++ % QUEUE_SIZE;

#ifdef BUGS
	if (bug('s'))
		clear_away(target);
#endif

	memset(transmit.buffer[i], 0, NET_HEADER);
	arp_request(transmit.buffer[i] + NET_HEADER, net.mac, own, target);
	queue_offer(&transmit, i, NET_HEADER + ARP_FRAME, 0);
}

void arp_send(const uint8_t *own, const uint8_t *target)
{
	arp_offer(own, target);
	queue_kick(&transmit);
}

void arp_wait(const uint8_t *target)
{
	uint16_t i;
	uint32_t length;
	bool answered = false;

	while (!answered) {
		/*
		 * Interrupts are off here. irq_wait() turns them on and halts without a gap, so no
		 * interrupt is missed.
		 */
		if (queue_used(&receive, &i, &length)) {
			answered = length > NET_HEADER &&
				   arp_answers(receive.buffer[i] + NET_HEADER, length - NET_HEADER,
					       net.mac, target);
			queue_offer(&receive, i, BUFFER, DESC_WRITE);
			queue_kick(&receive);
		} else if (net.irq != IRQ_POLL) {
			irq_wait();
		} else {
			pause();
		}
	}
}

void arp_ask(const uint8_t *own, const uint8_t *target)
{
	uint16_t i;
	uint32_t length;

	arp_send(own, target);
	arp_wait(target);
	while (!queue_used(&transmit, &i, &length))
		pause();
}
