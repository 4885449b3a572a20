/* SPDX-License-Identifier: MIT */
/*
 * A hostile virtio-net driver. Each case sets the device up anew and breaks one rule. The device
 * must answer with NEEDS_RESET and a configuration interrupt in bounded time, or, after writes to
 * locked registers, with nothing at all. After each case the card must work again: reset, set-up,
 * one ARP exchange. fault=NAME on the command line runs this case only; packed=1 adds the cases of
 * packed virtqueues, which the card must offer.
 */
#include "virtnet.h"

#define FEATURES (F_VERSION_1 | F_NET_MAC)
#define TX_FRAME (NET_HEADER + 60)

static const uint8_t target[4] = {192, 168, 100, 1}, own[4] = {192, 168, 100, 2};

static struct descriptor indirect[4] __attribute__((aligned(16)));

static uint64_t at(const void *p)
{
	return (uint64_t)p;
}

static struct descriptor *tx(unsigned int i)
{
	transmit.desc[i] = (struct descriptor){at(transmit.buffer[i]), TX_FRAME, 0, 0};
	return &transmit.desc[i];
}

/* --- addresses that the device must refuse at DRIVER_OK, or earlier --------------------------- */

static void desc_overflows(void)
{
	net_queue_at(&transmit, 1, ~0xfull, at(&transmit.avail), at(&transmit.used));
}

static void desc_nowhere(void)
{
	net_queue_at(&transmit, 1, PCI_MMIO_BASE, at(&transmit.avail), at(&transmit.used));
}

static void desc_unaligned(void)
{
	net_queue_at(&transmit, 1, at(transmit.desc) + 8, at(&transmit.avail), at(&transmit.used));
}

static void driver_unaligned(void)
{
	net_queue_at(&transmit, 1, at(transmit.desc), at(&transmit.avail) + 1, at(&transmit.used));
}

static void driver_nowhere(void)
{
	net_queue_at(&transmit, 1, at(transmit.desc), 1ull << 62, at(&transmit.used));
}

static void device_unaligned(void)
{
	net_queue_at(&transmit, 1, at(transmit.desc), at(&transmit.avail), at(&transmit.used) + 2);
}

static void device_nowhere(void)
{
	net_queue_at(&transmit, 1, at(transmit.desc), at(&transmit.avail), PCI_MMIO_BASE - 16);
}

/* --- rings ------------------------------------------------------------------------------------ */

static void index_jumps(void)
{
	transmit.avail.index = (uint16_t)(transmit.avail.index + QUEUE_SIZE + 1);
}

static void head_out_of_range(void)
{
	queue_publish(&transmit, QUEUE_SIZE);
}

static void next_out_of_range(void)
{
	*tx(0) = (struct descriptor){at(transmit.buffer), TX_FRAME, DESC_NEXT, QUEUE_SIZE};
	queue_publish(&transmit, 0);
}

static void chain_loops(void)
{
	tx(0)->flags = tx(1)->flags = DESC_NEXT;
	transmit.desc[0].next = 1;
	queue_publish(&transmit, 0);
}

static void length_zero(void)
{
	tx(0)->length = 0;
	queue_publish(&transmit, 0);
}

static void length_huge(void)
{
	tx(0)->length = ~0u;
	queue_publish(&transmit, 0);
}

static void address_nowhere(void)
{
	tx(0)->address = PCI_MMIO_BASE;
	queue_publish(&transmit, 0);
}

static void address_overflows(void)
{
	tx(0)->address = ~0ull - 8;
	queue_publish(&transmit, 0);
}

static void shorter_than_header(void)
{
	tx(0)->length = NET_HEADER - 1;
	queue_publish(&transmit, 0);
}

static void writable_in_transmit(void)
{
	tx(0)->flags = DESC_WRITE;
	queue_publish(&transmit, 0);
}

static void writable_before_readable(void)
{
	*tx(0) = (struct descriptor){at(transmit.buffer), TX_FRAME, DESC_NEXT | DESC_WRITE, 1};
	tx(1);
	queue_publish(&transmit, 0);
}

static void indirect_not_negotiated(void)
{
	indirect[0] = *tx(0);
	transmit.desc[0] = (struct descriptor){at(indirect), sizeof(indirect[0]), DESC_INDIRECT, 0};
	queue_publish(&transmit, 0);
}

static void indirect_nested(void)
{
	indirect[0] = (struct descriptor){at(indirect), sizeof(indirect), DESC_INDIRECT, 0};
	transmit.desc[0] = (struct descriptor){at(indirect), sizeof(indirect[0]), DESC_INDIRECT, 0};
	queue_publish(&transmit, 0);
}

static void indirect_odd_size(void)
{
	indirect[0] = *tx(0);
	transmit.desc[0] =
		(struct descriptor){at(indirect), sizeof(indirect[0]) + 1, DESC_INDIRECT, 0};
	queue_publish(&transmit, 0);
}

static void indirect_loops(void)
{
	indirect[0] = (struct descriptor){at(transmit.buffer), TX_FRAME, DESC_NEXT, 0};
	transmit.desc[0] = (struct descriptor){at(indirect), sizeof(indirect[0]), DESC_INDIRECT, 0};
	queue_publish(&transmit, 0);
}

/* --- packed virtqueues (2.8), of which only the misuse is played here ------------------------- */

/* Make a descriptor, whose last two fields are id and flags: its flags are stored last. */
static void packed(unsigned int i, uint64_t address, uint32_t length, uint16_t flags)
{
	transmit.desc[i] = (struct descriptor){address, length, 1, 0};
	__atomic_store_n(&transmit.desc[i].next, flags, __ATOMIC_RELEASE);
}

static void packed_driver_unaligned(void)
{
	net_queue_at(&transmit, 1, at(transmit.desc), at(&transmit.avail) + 2, at(&transmit.used));
}

static void packed_device_nowhere(void)
{
	net_queue_at(&transmit, 1, at(transmit.desc), at(&transmit.avail), PCI_MMIO_BASE - 4);
}

static void packed_chain_has_no_end(void)
{
	for (unsigned int i = QUEUE_SIZE; i--;)
		packed(i, at(transmit.buffer), TX_FRAME, DESC_AVAIL | DESC_NEXT);
}

static void packed_length_zero(void)
{
	packed(0, at(transmit.buffer), 0, DESC_AVAIL);
}

static void packed_address_nowhere(void)
{
	packed(0, ~0ull - 8, TX_FRAME, DESC_AVAIL);
}

static void packed_shorter_than_header(void)
{
	packed(0, at(transmit.buffer), NET_HEADER - 1, DESC_AVAIL);
}

static void packed_writable_before_readable(void)
{
	packed(1, at(transmit.buffer), TX_FRAME, DESC_AVAIL);
	packed(0, at(transmit.buffer), TX_FRAME, DESC_AVAIL | DESC_NEXT | DESC_WRITE);
}

static void packed_indirect_not_negotiated(void)
{
	packed(0, at(indirect), sizeof(indirect), DESC_AVAIL | DESC_INDIRECT);
}

static void packed_indirect_odd_size(void)
{
	packed(0, at(indirect), sizeof(indirect) + 1, DESC_AVAIL | DESC_INDIRECT);
}

static void packed_indirect_nested(void)
{
	indirect[0] = (struct descriptor){at(indirect), sizeof(indirect), 0, DESC_INDIRECT};
	packed(0, at(indirect), sizeof(indirect[0]), DESC_AVAIL | DESC_INDIRECT);
}

/* --- writes that must be ignored -------------------------------------------------------------- */

static void registers_after_driver_ok(void)
{
	for (uint16_t q = 0; q < 2; q++) {
		net_write(NET_QUEUE_SELECT, q);
		net_write(NET_QUEUE_SIZE, 2);
		net_write(NET_QUEUE_DESC, 0x1000);
		net_write(NET_QUEUE_DRIVER_HIGH, 0x1000);
		net_write(NET_QUEUE_DEVICE, 0x3000);
		if (!net.window) /* over MMIO, this takes the queue back */
			net_write(NET_QUEUE_ENABLE, 0);
	}
	net_write(NET_QUEUE_SELECT, 0xffff);
	net_write(NET_QUEUE_SIZE, 1);
	net_write(NET_DRIVER_FEATURE, 0);
}

/* --- running them ----------------------------------------------------------------------------- */

enum when { ADDRESSES, RING, IGNORED };

static const struct fault {
	const char *name;
	void (*inject)(void);
	enum when when;
	uint64_t features;
} faults[] = {
#define FAULT(name, when, features)                                                                \
	{                                                                                          \
#name, name, when, features                                                        \
	}
	FAULT(desc_overflows, ADDRESSES, FEATURES),
	FAULT(desc_nowhere, ADDRESSES, FEATURES),
	FAULT(desc_unaligned, ADDRESSES, FEATURES),
	FAULT(driver_unaligned, ADDRESSES, FEATURES),
	FAULT(driver_nowhere, ADDRESSES, FEATURES),
	FAULT(device_unaligned, ADDRESSES, FEATURES),
	FAULT(device_nowhere, ADDRESSES, FEATURES),
	FAULT(index_jumps, RING, FEATURES),
	FAULT(head_out_of_range, RING, FEATURES),
	FAULT(next_out_of_range, RING, FEATURES),
	FAULT(chain_loops, RING, FEATURES),
	FAULT(length_zero, RING, FEATURES),
	FAULT(length_huge, RING, FEATURES),
	FAULT(address_nowhere, RING, FEATURES),
	FAULT(address_overflows, RING, FEATURES),
	FAULT(shorter_than_header, RING, FEATURES),
	FAULT(writable_in_transmit, RING, FEATURES),
	FAULT(writable_before_readable, RING, FEATURES),
	FAULT(indirect_not_negotiated, RING, FEATURES),
	FAULT(indirect_nested, RING, FEATURES | F_INDIRECT_DESC),
	FAULT(indirect_odd_size, RING, FEATURES | F_INDIRECT_DESC),
	FAULT(indirect_loops, RING, FEATURES | F_INDIRECT_DESC),
	FAULT(registers_after_driver_ok, IGNORED, FEATURES),
	FAULT(packed_driver_unaligned, ADDRESSES, FEATURES | F_RING_PACKED),
	FAULT(packed_device_nowhere, ADDRESSES, FEATURES | F_RING_PACKED),
	FAULT(packed_chain_has_no_end, RING, FEATURES | F_RING_PACKED),
	FAULT(packed_length_zero, RING, FEATURES | F_RING_PACKED),
	FAULT(packed_address_nowhere, RING, FEATURES | F_RING_PACKED),
	FAULT(packed_shorter_than_header, RING, FEATURES | F_RING_PACKED),
	FAULT(packed_writable_before_readable, RING, FEATURES | F_RING_PACKED),
	FAULT(packed_indirect_not_negotiated, RING, FEATURES | F_RING_PACKED),
	FAULT(packed_indirect_odd_size, RING, FEATURES | F_RING_PACKED | F_INDIRECT_DESC),
	FAULT(packed_indirect_nested, RING, FEATURES | F_RING_PACKED | F_INDIRECT_DESC),
};

/* Wait for seconds: on a busy host, the device's worker may have to wait for a processor. */
static bool needs_reset(void)
{
	for (int i = 0; i < 300000; i++) {
		if (net_status() & STATUS_NEEDS_RESET)
			return true;
		pause();
	}
	return false;
}

static const char *try_fault(const struct fault *f)
{
	unsigned int before;

	net_negotiate(f->features);
	before = net.config_interrupts;
	if (f->when == ADDRESSES) {
		net_queue_at(&receive, 0, at(receive.desc), at(&receive.avail), at(&receive.used));
		f->inject();
		net_go();
	} else {
		net_queues();
		net_go();
		f->inject();
	}
	if (f->when == IGNORED) {
		if (net_status() & STATUS_NEEDS_RESET)
			return "NEEDS_RESET";
		arp_ask(own, target);
	} else {
		queue_kick(&transmit);
		if (!needs_reset())
			return "no NEEDS_RESET";
		if (!irq_await(&net.config_interrupts, before))
			return "no config interrupt";
	}
	net_negotiate(FEATURES);
	net_queues();
	net_go();
	arp_ask(own, target);
	return NULL;
}

int main(void)
{
	char wanted[32];
	bool one = option("fault", wanted, sizeof(wanted));
	char yes[2];
	bool all = option("packed", yes, sizeof(yes));
	int bad = 0, tried = 0;

	irq_init();
	lapic_enable();
	net_probe(IRQ_MSIX);
	for (size_t i = 0; i < sizeof(faults) / sizeof(faults[0]); i++) {
		const struct fault *f = &faults[i];
		const char *what;

		if (f->features & F_RING_PACKED && !all)
			continue;
		if (one &&
		    (strlen(wanted) != strlen(f->name) || memcmp(wanted, f->name, strlen(wanted))))
			continue;
		what = try_fault(f);
		tried++;
		bad += what != NULL;
		say("badring: %s %s\n", f->name, what ? what : "ok");
	}
	net_reset();
	say("badring: %d tried, %d bad\n", tried, bad);
	return bad || !tried;
}
