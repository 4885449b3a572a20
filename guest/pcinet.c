/* SPDX-License-Identifier: MIT */
/*
 * Asks by ARP over virtio-net who has target=A.B.C.D (default 192.168.100.1), count=N times
 * (default 1), and waits for each answer. irq=msix (default), intx or poll chooses how it learns
 * that a frame has come. steps=book (default), joined, bare or queues-first chooses how the driver
 * sets up the card. With burst=N (default 1, at most 16), N requests share a kick. After the
 * requests, bus mastering goes off and on masters=N times (default 0): meanwhile a request has to
 * wait.
 */
#include "virtnet.h"

/* Off means: from some moment on, the card leaves memory alone (PCI 3.0, 6.2.2). */
static void master_off_and_on(const uint8_t *own, const uint8_t *target)
{
	bool used = true;
	uint32_t length;
	uint16_t i;

	net_master(false);
	for (int tries = 0; used; tries++) {
		if (tries == 1000)
			fail("net: goes on without bus mastering");
		arp_send(own, target);
		used = false;
		for (int spins = 0; spins < 1000 && !used; spins++) {
			used = queue_used(&transmit, &i, &length);
			pause();
		}
	}
	net_master(true);
	arp_wait(target);
	while (!queue_used(&transmit, &i, &length))
		pause();
}

/* Make requests available, kick once, and wait for all answers and for the buffers. */
static void ask(const uint8_t *own, const uint8_t *target, unsigned long count)
{
	uint16_t i;
	uint32_t length;

	for (unsigned long n = 0; n < count; n++)
		arp_offer(own, target);
	queue_kick(&transmit);
	for (unsigned long n = 0; n < count; n++)
		arp_wait(target);
	for (unsigned long n = 0; n < count; n++)
		while (!queue_used(&transmit, &i, &length))
			pause();
}

int main(void)
{
	char text[24];
	uint8_t target[4], own[4];
	unsigned long count = option_number("count", 1), burst = option_number("burst", 1);
	enum net_irq irq = IRQ_MSIX;

	if (option("irq", text, sizeof(text)))
		irq = text[0] == 'p' ? IRQ_POLL : text[0] == 'i' ? IRQ_INTX : IRQ_MSIX;
	if (option("steps", text, sizeof(text)))
		net.steps = text[0] == 'j'   ? STEPS_JOINED
			    : text[1] == 'a' ? STEPS_BARE
			    : text[0] == 'q' ? STEPS_QUEUES_FIRST
					     : STEPS_BOOK;
	parse_ip(option("target", text, sizeof(text)) ? text : "192.168.100.1", target);
	memcpy(own, target, 4);
	own[3]++;
	irq_init();
	lapic_enable();
	net_probe(irq);
	net_negotiate(F_VERSION_1 | F_NET_MAC);
	net_queues();
	net_go();
	if (!burst || burst > QUEUE_SIZE)
		fail("pcinet: burst=%lu", burst);
	for (unsigned long n = 0; n < count; n += burst)
		ask(own, target, count - n < burst ? count - n : burst);
	for (unsigned long n = option_number("masters", 0); n; n--)
		master_off_and_on(own, target);
	/*
	 * Every answer may have been there before the driver looked, so that it never waited for an
	 * interrupt. The interrupt may still be on its way.
	 */
	if (irq != IRQ_POLL)
		irq_await(&net.queue_interrupts, 0);
	if (net.window)
		say("pcinet: window %lx, ", net.window);
	else
		say("pcinet: slot %u, ", net.slot);
	say("%lu asked and answered, %s, %u kicks\n", count,
	    irq == IRQ_POLL	   ? "polling"
	    : net.queue_interrupts ? "by interrupts"
				   : "without interrupts",
	    net.kicks);
	net_reset();
	return irq == IRQ_POLL || net.queue_interrupts ? 0 : 1;
}
