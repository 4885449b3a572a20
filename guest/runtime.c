/* SPDX-License-Identifier: MIT */
/* The runtime of the bare-metal guests; see guest.h. */
#include "guest.h"

#include <stdarg.h>

extern const char trap_stubs[], ap_trampoline[], ap_trampoline_end[];

/* --- memory: the compiler calls these as well ------------------------------------------------- */

void *memcpy(void *to, const void *from, size_t size)
{
	void *at = to;

	__asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(size) : : "memory");
	return to;
}

void *memset(void *to, int byte, size_t size)
{
	void *at = to;

	__asm__ volatile("rep stosb" : "+D"(at), "+c"(size) : "a"(byte) : "memory");
	return to;
}

int memcmp(const void *a, const void *b, size_t size)
{
	const uint8_t *p = a, *q = b;

	for (; size; size--, p++, q++)
		if (*p != *q)
			return *p < *q ? -1 : 1;
	return 0;
}

size_t strlen(const char *text)
{
	size_t n = 0;

	while (text[n])
		n++;
	return n;
}

/* --- saying things ---------------------------------------------------------------------------- */

struct line {
	char text[256];
	unsigned long used;
};

static void put(struct line *l, char c)
{
	if (l->used < sizeof(l->text))
		l->text[l->used++] = c;
}

static void put_number(struct line *l, uint64_t value, unsigned int base)
{
	char digits[20];
	int n = 0;

	do
		digits[n++] = "0123456789abcdef"[value % base];
	while (value /= base);
	while (n)
		put(l, digits[--n]);
}

static void format_into(struct line *l, const char *format, va_list args)
{
	for (; *format; format++) {
		if (*format != '%') {
			put(l, *format);
			continue;
		}
		switch (*++format) {
		case 's':
			for (const char *s = va_arg(args, const char *); *s; s++)
				put(l, *s);
			break;
		case 'c':
			put(l, (char)va_arg(args, int));
			break;
		case 'd': {
			int value = va_arg(args, int);

			if (value < 0)
				put(l, '-');
			put_number(l, value < 0 ? (uint64_t) - (int64_t)value : (uint64_t)value,
				   10);
			break;
		}
		case 'u':
			put_number(l, va_arg(args, unsigned int), 10);
			break;
		case 'x':
			put_number(l, va_arg(args, unsigned int), 16);
			break;
		case 'l':
			put_number(l, va_arg(args, unsigned long), *++format == 'x' ? 16 : 10);
			break;
		default:
			put(l, '%');
		}
	}
}

static void vsay(const char *format, va_list args)
{
	struct line l = {.used = 0};

	format_into(&l, format, args);
	pyvmm_write(PORT_GUEST_STDOUT, l.text, l.used);
}

void say(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsay(format, args);
	va_end(args);
}

void serial(const char *text)
{
	for (; *text; text++) {
		if (*text == '\n')
			outb(PORT_COM1, '\r');
		outb(PORT_COM1, (uint8_t)*text);
	}
}

void finish(int status)
{
	pyvmm_control(GUEST_STATUS, (unsigned int)status & 0xff);
	outb(PORT_ACPI_SLEEP_CONTROL, ACPI_S5_TYPE << 2 | 1 << 5);
	for (;;)
		__asm__ volatile("cli; hlt");
}

void debug_exit(uint32_t value)
{
	outl(PORT_DEBUG_EXIT, value);
	for (;;)
		__asm__ volatile("cli; hlt");
}

void fail(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsay(format, args);
	va_end(args);
	say("\n");
	finish(1);
}

/* --- what the loader handed over -------------------------------------------------------------- */

static const uint8_t *boot_data(void)
{
	return (const uint8_t *)(uintptr_t)boot_pointer;
}

static uint64_t load64(const uint8_t *at)
{
	uint64_t value;

	memcpy(&value, at, sizeof(value));
	return value;
}

static uint32_t load32(const uint8_t *at)
{
	uint32_t value;

	memcpy(&value, at, sizeof(value));
	return value;
}

const char *command_line(void)
{
	/*
	 * The field is hdr.cmd_line_ptr in struct boot_params, cmdline in multiboot_info, and
	 * cmdline_paddr in struct hvm_start_info.
	 */
	uint64_t address = boot_way == BOOT_ZERO_PAGE	? load32(boot_data() + 0x228)
			   : boot_way == BOOT_MULTIBOOT ? load32(boot_data() + 16)
							: load64(boot_data() + 24);

	return address ? (const char *)(uintptr_t)address : "";
}

uint64_t acpi_rsdp(void)
{
	if (boot_way != BOOT_MULTIBOOT)
		return load64(boot_data() + (boot_way == BOOT_ZERO_PAGE ? 0x70 : 32));
	/* A multiboot loader does not pass the RSDP on, so search for it (ACPI 6.4, 5.2.5.1). */
	for (uintptr_t at = 0xe0000; at < 0x100000; at += 16)
		if (!memcmp((const void *)at, "RSD PTR ", 8))
			return at;
	return 0;
}

const char *option(const char *key, char *out, size_t size)
{
	size_t length = strlen(key);

	for (const char *at = command_line(); *at;) {
		const char *end = at;

		while (*end && *end != ' ')
			end++;
		if ((size_t)(end - at) > length && !memcmp(at, key, length) && at[length] == '=') {
			size_t n = (size_t)(end - at) - length - 1;

			if (n >= size)
				n = size - 1;
			memcpy(out, at + length + 1, n);
			out[n] = 0;
			return out;
		}
		at = *end ? end + 1 : end;
	}
	return NULL;
}

unsigned long option_number(const char *key, unsigned long otherwise)
{
	char text[24];
	unsigned long value = 0;

	if (!option(key, text, sizeof(text)))
		return otherwise;
	for (const char *at = text; *at >= '0' && *at <= '9'; at++)
		value = value * 10 + (unsigned long)(*at - '0');
	return value;
}

static bool sums_to_zero(const uint8_t *data, size_t size)
{
	uint8_t sum = 0;

	while (size--)
		sum = (uint8_t)(sum + *data++);
	return !sum;
}

const uint8_t *acpi_table(const char *signature)
{
	const uint8_t *rsdp = (const uint8_t *)(uintptr_t)acpi_rsdp();
	const uint8_t *xsdt;

	if (!rsdp || memcmp(rsdp, "RSD PTR ", 8) || !sums_to_zero(rsdp, 20) ||
	    !sums_to_zero(rsdp, 36))
		return NULL;
	xsdt = (const uint8_t *)(uintptr_t)load64(rsdp + 24);
	if (memcmp(xsdt, "XSDT", 4) || !sums_to_zero(xsdt, load32(xsdt + 4)))
		return NULL;
	for (uint32_t at = 36; at < load32(xsdt + 4); at += 8) {
		const uint8_t *table = (const uint8_t *)(uintptr_t)load64(xsdt + at);

		if (!memcmp(table, signature, 4) && sums_to_zero(table, load32(table + 4)))
			return table;
	}
	return NULL;
}

/* --- interrupts ------------------------------------------------------------------------------- */

struct gate {
	uint16_t offset_low, selector;
	uint8_t ist, type;
	uint16_t offset_middle;
	uint32_t offset_high, zero;
};

struct trap_frame {
	uint64_t r11, r10, r9, r8, rdi, rsi, rdx, rcx, rax;
	uint64_t vector, error;
	uint64_t rip, cs, rflags, rsp, ss;
};

static struct gate idt[256] __attribute__((aligned(16)));
static irq_handler handlers[256];

void trap(struct trap_frame *f);

void trap(struct trap_frame *f)
{
	irq_handler handler = handlers[f->vector & 0xff];

	if (!handler)
		fail("unexpected trap %lu error %lx at %lx", f->vector, f->error, f->rip);
	handler((unsigned int)f->vector);
}

static void load_idt(void)
{
	struct {
		uint16_t limit;
		uint64_t base;
	} __attribute__((packed)) pointer = {sizeof(idt) - 1, (uint64_t)idt};

	__asm__ volatile("lidt %0" : : "m"(pointer));
}

void irq_init(void)
{
	for (unsigned int vector = 0; vector < 256; vector++) {
		uint64_t address = (uint64_t)trap_stubs + vector * 16;

		idt[vector] = (struct gate){.offset_low = (uint16_t)address,
					    .selector = GUEST_CS,
					    .type = 0x8e,
					    .offset_middle = (uint16_t)(address >> 16)};
	}
	load_idt();
	/* The 8259s start with all lines unmasked, on vectors from 0 up. */
	outb(PORT_PIC_MASTER + 1, 0xff);
	outb(PORT_PIC_SLAVE + 1, 0xff);
}

void irq_set(unsigned int vector, irq_handler handler)
{
	handlers[vector & 0xff] = handler;
}

static void ignore(unsigned int vector)
{
	(void)vector;
}

void lapic_enable(void)
{
	irq_set(255, ignore);
	lapic_write(LAPIC_SVR, 0x1ff);
}

void lapic_send(uint32_t apic_id, uint32_t command)
{
	lapic_write(LAPIC_ICR_HI, apic_id << 24);
	lapic_write(LAPIC_ICR, command);
	while (lapic_read(LAPIC_ICR) & 1 << 12)
		pause();
}

static void ioapic_write(uint32_t reg, uint32_t value)
{
	mmio_write32(IOAPIC_BASE, reg);
	mmio_write32(IOAPIC_BASE + 0x10, value);
}

void ioapic_route(unsigned int pin, uint8_t vector)
{
	ioapic_write(0x11 + 2 * pin, 0);
	ioapic_write(0x10 + 2 * pin, vector);
}

void ioapic_route_level_low(unsigned int pin, uint8_t vector)
{
	ioapic_write(0x11 + 2 * pin, 0);
	ioapic_write(0x10 + 2 * pin, vector | 1u << 13 | 1u << 15);
}

/* --- application processors ------------------------------------------------------------------- */

uint32_t ap_stack;
void (*ap_main)(void);
static volatile uint32_t ap_entered;

void ap_entry(void);

void ap_entry(void)
{
	void (*entry)(void) = ap_main;

	load_idt();
	ap_entered = 1;
	entry();
}

void ap_start(uint32_t apic_id, void *stack_top, void (*entry)(void))
{
	memcpy((void *)(uintptr_t)AP_TRAMPOLINE, ap_trampoline,
	       (size_t)(ap_trampoline_end - ap_trampoline));
	ap_stack = (uint32_t)(uintptr_t)stack_top;
	ap_main = entry;
	ap_entered = 0;
	barrier();
	lapic_send(apic_id, 0x4500); /* INIT, assert */
	/* One SIPI is enough for KVM, without a delay before it. */
	lapic_send(apic_id, 0x4600 | AP_TRAMPOLINE >> 12);
	while (!ap_entered)
		pause();
}

/* --- entry ------------------------------------------------------------------------------------ */

void guest_main(void);

void guest_main(void)
{
	finish(main());
}
