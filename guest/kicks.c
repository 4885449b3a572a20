/* SPDX-License-Identifier: MIT */
/*
 * Kicks the empty transmit queue of a virtio-net card count=N times (100) and its control queue
 * control=N times (10). Then it halts halts=N times (20) until the local APIC's timer interrupts.
 * This is the command phase; its cost depends only on how kicks are answered. Probing and set-up
 * come before this phase.
 */
#include "virtnet.h"

#define F_NET_CTRL_VQ (1ull << 17)
#define VECTOR_TIMER  0x40

static struct queue commands;
static volatile unsigned long ticks;

static void on_tick(unsigned int vector)
{
	(void)vector;
	ticks++;
	lapic_eoi();
}

int main(void)
{
	unsigned long count = option_number("count", 100), control = option_number("control", 10);
	unsigned long halts = option_number("halts", 20);

	irq_init();
	irq_set(VECTOR_TIMER, on_tick);
	lapic_enable();
	lapic_write(LAPIC_TIMER_DIVIDE, 0xb); /* by 1 */
	lapic_write(LAPIC_TIMER, VECTOR_TIMER);
	net_probe(IRQ_POLL);
	net_negotiate(F_VERSION_1 | F_NET_MAC | F_NET_CTRL_VQ);
	net_queues();
	net_queue_at(&commands, 2, (uint64_t)commands.desc, (uint64_t)&commands.avail,
		     (uint64_t)&commands.used);
	net_go();
	pyvmm_control(GUEST_COMMAND, 0);
	for (unsigned long i = 0; i < count; i++)
		queue_notify(&transmit);
	for (unsigned long i = 0; i < control; i++)
		queue_notify(&commands);
	/*
	 * The timer is one-shot and is not set again before its interrupt has come. So there is one
	 * halt per interrupt, however slow the host is.
	 */
	for (unsigned long i = 0; i < halts; i++) {
		lapic_write(LAPIC_TIMER_INITIAL, 100000); /* KVM's APIC bus runs at 1 GHz: 0.1 ms */
		irq_wait();
	}
	pyvmm_control(GUEST_STATUS, ticks != halts);
	net_reset();
	finish(ticks != halts);
}
