/* SPDX-License-Identifier: MIT */
/*
 * Finds the processors in the MADT, starts each by INIT and SIPI, and lets each add COUNT to a sum
 * under a lock. The exit status is 0 if all processors ran and the sum is right. With cpus=N on the
 * command line, it also fails if there are not N processors.
 */
#include "guest.h"

#define COUNT	 100
#define MAX_CPUS 255
#define STACK	 2048

static uint8_t stacks[MAX_CPUS][STACK] __attribute__((aligned(16)));
static volatile uint32_t lock, sum, finished;
static volatile uint8_t seen[256];

static void take(void)
{
	while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE))
		pause();
}

static void give(void)
{
	__atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
}

static void work(void)
{
	for (int i = 0; i < COUNT; i++) {
		take();
		sum++;
		give();
	}
	take();
	seen[lapic_read(LAPIC_ID) >> 24]++;
	finished++;
	give();
}

static void work_and_halt(void)
{
	lapic_enable();
	work();
	for (;;)
		__asm__ volatile("cli; hlt");
}

int main(void)
{
	const uint8_t *madt = acpi_table("APIC");
	uint32_t cpus = 0, started = 0, length;

	if (!madt)
		fail("smp: no MADT");
	irq_init();
	lapic_enable();
	memcpy(&length, madt + 4, sizeof(length));
	for (uint32_t at = 44; at + 2 <= length && madt[at + 1]; at += madt[at + 1]) {
		if (madt[at] != 0 || !(madt[at + 4] & 1)) /* local APIC, enabled */
			continue;
		if (cpus == MAX_CPUS)
			fail("smp: too many processors");
		if (madt[at + 3] != lapic_read(LAPIC_ID) >> 24) {
			ap_start(madt[at + 3], stacks[cpus] + STACK, work_and_halt);
			started++;
		}
		cpus++;
	}
	work();
	while (finished < cpus)
		pause();
	say("smp: %u cpus, %u started, sum %u\n", cpus, started, sum);
	for (uint32_t id = 0; id < cpus; id++)
		if (seen[id] != 1)
			fail("smp: cpu %u reported %u times", id, seen[id]);
	if (option_number("cpus", cpus) != cpus)
		fail("smp: wanted %lu cpus", option_number("cpus", cpus));
	return sum == cpus * COUNT ? 0 : 1;
}
