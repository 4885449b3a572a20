/* SPDX-License-Identifier: MIT */
/*
 * Checks all that test kernels expect of a machine with test devices. Each check writes a line
 * "PASS: ..." or "FAIL: ..." to COM1. Then the guest ends by the debug-exit port with exit=N, or
 * with 1 if a check failed. fw_cfg must report cpus=N and memory=BYTES of the command line; each
 * multiboot module must begin with module=TEXT.
 */
#include "guest.h"

#define FW_CFG_SIGNATURE 0x00
#define FW_CFG_RAM_SIZE	 0x03
#define FW_CFG_NB_CPUS	 0x05
#define FW_CFG_MAX_CPUS	 0x0f
#define FW_CFG_FILE_DIR	 0x19

#define IRQ_LINE   10
#define IRQ_VECTOR 0x40

static unsigned int failed;
static volatile unsigned int interrupts;

static void point(bool good, const char *name)
{
	serial(good ? "PASS: " : "FAIL: ");
	serial(name);
	serial("\n");
	failed += !good;
}

static uint64_t fw_cfg(uint16_t key, int bytes)
{
	uint64_t value = 0;

	outw(PORT_FW_CFG, key);
	for (int i = 0; i < bytes; i++)
		value |= (uint64_t)inb(PORT_FW_CFG + 1) << 8 * i;
	return value;
}

static uint32_t load32(const uint8_t *at)
{
	uint32_t value;

	memcpy(&value, at, sizeof(value));
	return value;
}

static void check_multiboot(void)
{
	const uint8_t *info = (const uint8_t *)(uintptr_t)boot_pointer;
	uint32_t flags = load32(info), at = load32(info + 48), end = at + load32(info + 44);
	uint32_t count = load32(info + 20), modules = load32(info + 24);
	uint64_t memory = option_number("memory", 0), found = 0;
	char text[32];
	bool good = true;

	point(flags == 0x24d, "multiboot: flags");
	point(load32(info + 8) == (memory - 0x100000) >> 10, "multiboot: mem_upper");
	while (at < end) {
		const uint8_t *entry = (const uint8_t *)(uintptr_t)at;
		uint64_t base, length;

		memcpy(&base, entry + 4, 8);
		memcpy(&length, entry + 12, 8);
		if (load32(entry + 20) == 1)
			found = base + length > found ? base + length : found;
		at += load32(entry) + 4;
	}
	point(at == end && found == memory, "multiboot: memory map");
	if (!option("module", text, sizeof(text)))
		return;
	for (uint32_t i = 0; i < count; i++) {
		uint32_t start = load32((const uint8_t *)(uintptr_t)(modules + 16 * i));

		good = good && !(start & 0xfff) &&
		       !memcmp((const void *)(uintptr_t)start, text, strlen(text));
	}
	point(count && good, "multiboot: modules");
	for (uint32_t i = 0; i < count; i++) {
		serial((const char *)(uintptr_t)load32(
			(const uint8_t *)(uintptr_t)(modules + 16 * i + 8)));
		serial("\n");
	}
}

static void check_fw_cfg(void)
{
	static struct {
		uint32_t control, length;
		uint64_t address;
	} access __attribute__((aligned(16)));
	static char directory[8];

	point(fw_cfg(FW_CFG_SIGNATURE, 4) == 0x554d4551, "fw_cfg: signature");
	point(fw_cfg(FW_CFG_NB_CPUS, 2) == option_number("cpus", 1), "fw_cfg: processors");
	point(fw_cfg(FW_CFG_MAX_CPUS, 2) == option_number("cpus", 1), "fw_cfg: most processors");
	point(fw_cfg(FW_CFG_RAM_SIZE, 8) == option_number("memory", 0), "fw_cfg: memory");
	/* Select and read the directory's beginning by DMA, whose fields are all big-endian. */
	access.control = __builtin_bswap32(FW_CFG_FILE_DIR << 16 | 8 | 2);
	access.length = __builtin_bswap32(sizeof(directory));
	access.address = __builtin_bswap64((uintptr_t)directory);
	barrier();
	outl(PORT_FW_CFG_DMA + 4, __builtin_bswap32((uint32_t)(uintptr_t)&access));
	barrier();
	point(!access.control && directory[3] == 1, "fw_cfg: directory by DMA");
}

static void on_irq(unsigned int vector)
{
	(void)vector;
	interrupts++;
	outb(PORT_TESTDEV_IRQ + IRQ_LINE, 0);
	lapic_eoi();
}

static void check_testdev(void)
{
	static volatile uint32_t page[2048] __attribute__((aligned(4096)));
	bool found;

	outl(PORT_TESTDEV_ECHO, 0x12345678);
	outb(PORT_TESTDEV_ECHO + 1, 0xaa);
	found = inl(PORT_TESTDEV_ECHO) == 0x1234aa78 && inw(PORT_TESTDEV_ECHO + 2) == 0x1234;
	point(found, "testdev: echo");
	mmio_write32(TESTDEV_MMIO + 0x1000, 0xcafe);
	point(mmio_read16(TESTDEV_MMIO + 0x1000) == 0xcafe, "testdev: memory");
	page[0] = 77;
	outl(PORT_TESTDEV_FLUSH, (uint32_t)(uintptr_t)page);
	point(page[0] == 77, "testdev: flush");
	irq_init();
	lapic_enable();
	irq_set(IRQ_VECTOR, on_irq);
	ioapic_route(IRQ_LINE, IRQ_VECTOR);
	outb(PORT_TESTDEV_IRQ + IRQ_LINE, 1);
	/* Nobody who does not answer will interrupt. */
	if (found)
		irq_await(&interrupts, 0);
	point(interrupts == 1, "testdev: interrupt");
}

int main(void)
{
	static const char words[] = "debugcon speaks\n";

	if (boot_way == BOOT_MULTIBOOT)
		check_multiboot();
	check_fw_cfg();
	check_testdev();
	point(inb(PORT_DEBUGCON) == PORT_DEBUGCON, "debugcon: found");
	for (const char *c = words; *c; c++)
		outb(PORT_DEBUGCON, (uint8_t)*c);
	debug_exit(failed ? 1 : (uint32_t)option_number("exit", 0));
}
