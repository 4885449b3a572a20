/* SPDX-License-Identifier: MIT */
/*
 * Sends its initrd to COM1 unchanged, so that a test chooses what "the kernel" says on the console.
 * With init=1 on the command line, it first tells the VMM that init runs. It ends with status=N
 * (0), or as how=... says: hang, reboot, panic (pvpanic, then a reboot) or panic-hang (pvpanic,
 * then it spins).
 */
#include "guest.h"

static bool how_is(const char *what)
{
	char how[16];

	return option("how", how, sizeof(how)) && strlen(how) == strlen(what) &&
	       !memcmp(how, what, strlen(what));
}

static uint64_t load64(uint64_t at)
{
	uint64_t value;

	memcpy(&value, (const void *)at, sizeof(value));
	return value;
}

int main(void)
{
	/*
	 * struct hvm_start_info has nr_modules at offset 12 and modlist_paddr at offset 16. An
	 * entry of the list begins with address and size.
	 */
	uint64_t modules, at = 0, size = 0;

	if (boot_way != BOOT_PVH)
		fail("talk: start me by PVH");
	modules = load64(boot_pointer + 16);
	if (modules) {
		at = load64(modules);
		size = load64(modules + 8);
	}
	if (option_number("init", 0))
		outl(PORT_GUEST_CONTROL, 1u << 24); /* GUEST_INIT */
	for (uint64_t i = 0; i < size; i++)
		outb(PORT_COM1, ((const uint8_t *)at)[i]);
	if (how_is("panic") || how_is("panic-hang"))
		outb(PORT_PVPANIC, 1);
	if (how_is("hang") || how_is("panic-hang"))
		for (;;)
			pause();
	if (how_is("panic") || how_is("reboot")) {
		outb(PORT_ACPI_RESET, ACPI_RESET_VALUE);
		for (;;)
			pause();
	}
	return (int)option_number("status", 0);
}
