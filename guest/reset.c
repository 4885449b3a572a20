/* SPDX-License-Identifier: MIT */
/* Ends the machine in the way that how=... on the command line chooses; see README.md. */
#include "guest.h"

static bool is(const char *a, const char *b)
{
	return strlen(a) == strlen(b) && !memcmp(a, b, strlen(a));
}

static const uint8_t jump_to_vector[] = {0xea, 0xf0, 0xff, 0x00, 0xf0}; /* ljmp $0xf000, $0xfff0 */

int main(void)
{
	char how[16];
	uint16_t no_idt[5] = {0};

	if (!option("how", how, sizeof(how)))
		fail("reset: how=? is missing");
	say("reset: by %s\n", how);
	if (is(how, "poweroff"))
		return 0;
	if (is(how, "acpi"))
		outb(PORT_ACPI_RESET, ACPI_RESET_VALUE);
	else if (is(how, "cf9"))
		outb(PORT_PCI_RESET, 6);
	else if (is(how, "i8042"))
		outb(PORT_I8042 + 4, 0xfe);
	else if (is(how, "vector")) {
		/* Linux jumps there if it reboots by the BIOS. This needs a second CPU. */
		memcpy((void *)AP_TRAMPOLINE, jump_to_vector, sizeof(jump_to_vector));
		lapic_enable();
		lapic_send(1, 0x4500);
		lapic_send(1, 0x4600 | AP_TRAMPOLINE >> 12);
	} else if (is(how, "triple"))
		__asm__ volatile("lidt %0; ud2" : : "m"(no_idt));
	else if (is(how, "panic")) { /* Linux does the same with panic=-1 */
		outb(PORT_PVPANIC, 1);
		outb(PORT_ACPI_RESET, ACPI_RESET_VALUE);
	} else if (is(how, "hang"))
		for (;;)
			pause();
	else if (is(how, "halt"))
		for (;;)
			__asm__ volatile("cli; hlt");
	else if (is(how, "idle")) { /* interrupts are on, but none comes for a long time */
		irq_init();
		for (;;)
			irq_wait();
	} else if (is(how, "nowhere")) /* jump to an address without memory */
		__asm__ volatile("jmp *%0" : : "r"(PCI_MMIO_BASE + 0x10000000ull));
	else
		fail("reset: no such way: %s", how);
	/* The chosen way ends this CPU soon. Spin meanwhile, because returning would power off. */
	for (;;)
		pause();
}
