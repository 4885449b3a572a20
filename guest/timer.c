/* SPDX-License-Identifier: MIT */
/*
 * Takes TICKS interrupts from the local APIC's timer and TICKS from the PIT through the IO-APIC.
 * The CPU halts in between. None of this exits to userspace: KVM answers PIT, APICs and hlt.
 */
#include "guest.h"

#define TICKS	     10
#define VECTOR_LAPIC 0x40
#define VECTOR_PIT   0x41
#define PIT_COMMAND  0x43
#define PIT_COUNTER0 0x40

static volatile unsigned int ticks[256];

static void on_tick(unsigned int vector)
{
	ticks[vector]++;
	lapic_eoi();
}

int main(void)
{
	irq_init();
	irq_set(VECTOR_LAPIC, on_tick);
	irq_set(VECTOR_PIT, on_tick);
	lapic_enable();
	lapic_write(LAPIC_TIMER_DIVIDE, 0xb); /* by 1 */
	lapic_write(LAPIC_TIMER, VECTOR_LAPIC | 1 << 17);
	lapic_write(LAPIC_TIMER_INITIAL, 1000000); /* KVM's APIC bus runs at 1 GHz: 1 ms */
	while (ticks[VECTOR_LAPIC] < TICKS)
		irq_wait();
	lapic_write(LAPIC_TIMER_INITIAL, 0);
	ioapic_route(IOAPIC_PIN_TIMER, VECTOR_PIT);
	outb(PIT_COMMAND, 0x34); /* channel 0, low and high byte, rate generator */
	outb(PIT_COUNTER0, 1193 & 0xff);
	outb(PIT_COUNTER0, 1193 >> 8); /* 1 ms */
	while (ticks[VECTOR_PIT] < TICKS)
		irq_wait();
	say("timer: %u lapic, %u pit\n", ticks[VECTOR_LAPIC], ticks[VECTOR_PIT]);
	return 0;
}
