/* SPDX-License-Identifier: MIT */
/*
 * The runtime of the bare-metal guests: everything that a test kernel of a page or two needs. The
 * comments here state every access to a port or device that a function makes, so that a guest can
 * promise its exact number of exits.
 *
 * Some hosts emulate ring 0 (kvm_pvm), so guests must not use SSE, x87, cmpxchg16b, popcnt or int3.
 */
#ifndef PYVMM_GUEST_H
#define PYVMM_GUEST_H

#define GUEST_CS32    0x08
#define GUEST_CS      0x10 /* the 64-bit boot protocol demands this selector */
#define GUEST_DS      0x18
#define AP_TRAMPOLINE 0x8000

/*
 * The machine's ports and addresses. They repeat pyvmm/spec/platform.py; tests/unit/test_guest.py
 * compares the two.
 */
#define PORT_ACPI_SLEEP_CONTROL 0x600
#define PORT_ACPI_RESET		0x602
#define ACPI_RESET_VALUE	0x01
#define ACPI_S5_TYPE		5
#define PORT_PIC_MASTER		0x20
#define PORT_PIC_SLAVE		0xa0
#define PORT_I8042		0x60
#define PORT_COM1		0x3f8
#define PORT_PVPANIC		0x505
#define PORT_PCI_ADDRESS	0xcf8
#define PORT_PCI_RESET		0xcf9
#define PORT_PCI_DATA		0xcfc
#define PCI_MMIO_BASE		0xc0000000
#define IOAPIC_BASE		0xfec00000
#define LAPIC_BASE		0xfee00000
#define IOAPIC_PIN_TIMER	2
/* Only a machine with test devices has these. */
#define PORT_TESTDEV_ECHO  0xe0
#define PORT_TESTDEV_FLUSH 0xe4
#define PORT_DEBUGCON	   0xe9
#define PORT_DEBUG_EXIT	   0xf4
#define PORT_FW_CFG	   0x510
#define PORT_FW_CFG_DMA	   0x514
#define PORT_TESTDEV_IRQ   0x2000
#define TESTDEV_MMIO	   0xff000000

/* The values of boot_way: how the loader has entered the guest, and where boot_pointer points. */
#define BOOT_PVH       0 /* struct hvm_start_info */
#define BOOT_ZERO_PAGE 1 /* struct boot_params */
#define BOOT_MULTIBOOT 2 /* multiboot_info */

#define MULTIBOOT_MAGIC		   0x1badb002
#define MULTIBOOT_BOOTLOADER_MAGIC 0x2badb002

#ifndef __ASSEMBLER__
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "pyvmm_port.h"

/* --- what a guest provides -------------------------------------------------------------------- */

/* The return value becomes the guest's exit status; 0 means success. */
int main(void);

/* --- ports and memory ------------------------------------------------------------------------- */

#define PORT_ACCESS(suffix, type)                                                                  \
	static inline void out##suffix(uint16_t port, type value)                                  \
	{                                                                                          \
		__asm__ volatile("out" #suffix " %0, %1" : : "a"(value), "Nd"(port) : "memory");   \
	}                                                                                          \
	static inline type in##suffix(uint16_t port)                                               \
	{                                                                                          \
		type value;                                                                        \
                                                                                                   \
		__asm__ volatile("in" #suffix " %1, %0" : "=a"(value) : "Nd"(port) : "memory");    \
		return value;                                                                      \
	}

PORT_ACCESS(b, uint8_t)
PORT_ACCESS(w, uint16_t)
PORT_ACCESS(l, uint32_t)

/* Each access is one mov of exactly this width. */
#define MMIO_ACCESS(bits, suffix, reg)                                                             \
	static inline void mmio_write##bits(uint64_t address, uint##bits##_t value)                \
	{                                                                                          \
		__asm__ volatile("mov" suffix " %" reg "0, (%1)"                                   \
				 :                                                                 \
				 : "r"(value), "r"(address)                                        \
				 : "memory");                                                      \
	}                                                                                          \
	static inline uint##bits##_t mmio_read##bits(uint64_t address)                             \
	{                                                                                          \
		uint##bits##_t value;                                                              \
                                                                                                   \
		__asm__ volatile("mov" suffix " (%1), %" reg "0"                                   \
				 : "=r"(value)                                                     \
				 : "r"(address)                                                    \
				 : "memory");                                                      \
		return value;                                                                      \
	}

MMIO_ACCESS(8, "b", "b")
MMIO_ACCESS(16, "w", "w")
MMIO_ACCESS(32, "l", "k")
MMIO_ACCESS(64, "q", "q")

static inline uint64_t rdmsr(uint32_t msr)
{
	uint32_t low, high;

	__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
	return (uint64_t)high << 32 | low;
}

static inline void wrmsr(uint32_t msr, uint64_t value)
{
	__asm__ volatile("wrmsr"
			 :
			 : "c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32))
			 : "memory");
}

static inline uint64_t rdtsc(void)
{
	uint32_t low, high;

	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
	return (uint64_t)high << 32 | low;
}

static inline void pause(void)
{
	__asm__ volatile("pause" : : : "memory");
}

static inline void barrier(void)
{
	__asm__ volatile("" : : : "memory");
}

void *memcpy(void *to, const void *from, size_t size);
void *memset(void *to, int byte, size_t size);
int memcmp(const void *a, const void *b, size_t size);
size_t strlen(const char *text);

/* --- saying things ---------------------------------------------------------------------------- */

/*
 * Write to standard output by one rep outsb to PORT_GUEST_STDOUT. The format knows %s %c %d %u %x
 * %lu and %lx; the text is cut after 256 bytes.
 */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Write to COM1 by one outb per byte, without polling. A newline becomes two bytes, CR and LF. */
void serial(const char *text);
/*
 * Tell the VMM the exit status and power off: one outl to PORT_GUEST_CONTROL, one outb to
 * PORT_ACPI_SLEEP_CONTROL.
 */
void finish(int status) __attribute__((noreturn));
/* say() what went wrong, then finish(1). */
void fail(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
/*
 * End by the debug-exit port of a machine with test devices: one outl. The exit status is
 * (value << 1) | 1.
 */
void debug_exit(uint32_t value) __attribute__((noreturn));

/* --- what the loader handed over -------------------------------------------------------------- */

extern uint32_t boot_way, boot_pointer;
const char *command_line(void);
/*
 * Copy the value of key=value on the command line to out, cut to size and NUL-terminated. Returns
 * out, or NULL if the command line has no such key.
 */
const char *option(const char *key, char *out, size_t size);
/* The value of key=value as a decimal number, or otherwise if there is no such key. */
unsigned long option_number(const char *key, unsigned long otherwise);
/* Find an ACPI table by its signature and verify its checksum; NULL if there is none. */
const uint8_t *acpi_table(const char *signature);
uint64_t acpi_rsdp(void);

/* --- interrupts ------------------------------------------------------------------------------- */

typedef void (*irq_handler)(unsigned int vector);

/*
 * Load the interrupt table and mask the 8259s (two outb that KVM answers). Before this call, an
 * exception is a triple fault; after it, an exception is reported and ends the guest.
 */
void irq_init(void);
/* Handle a vector from 32 up. The handler acknowledges the interrupt itself by lapic_eoi(). */
void irq_set(unsigned int vector, irq_handler handler);
/* Turn interrupts on, wait for one, and turn them off again. */
static inline void irq_wait(void)
{
	__asm__ volatile("sti; hlt; cli" : : : "memory");
}

/* Take the pending interrupts, if there are any. */
static inline void irq_take(void)
{
	__asm__ volatile("sti; nop; cli" : : : "memory");
}

/*
 * Take interrupts until the handler has counted one more than before; false if none comes. The
 * interrupt is raised by a thread of the VMM, which a busy host may keep from running for seconds:
 * the patience is 2^37 cycles, about 45 s.
 */
static inline bool irq_await(const volatile unsigned int *count, unsigned int before)
{
	uint64_t begin = rdtsc();

	while (*count == before && rdtsc() - begin < 1ull << 37)
		irq_take();
	return *count != before;
}

/* --- local and I/O APIC: KVM answers all accesses in the kernel ------------------------------- */

#define LAPIC_ID	    0x20
#define LAPIC_EOI	    0xb0
#define LAPIC_SVR	    0xf0
#define LAPIC_IRR	    0x200
#define LAPIC_ICR	    0x300
#define LAPIC_ICR_HI	    0x310
#define LAPIC_TIMER	    0x320
#define LAPIC_TIMER_INITIAL 0x380
#define LAPIC_TIMER_DIVIDE  0x3e0

static inline uint32_t lapic_read(uint32_t reg)
{
	return mmio_read32(LAPIC_BASE + reg);
}

static inline void lapic_write(uint32_t reg, uint32_t value)
{
	mmio_write32(LAPIC_BASE + reg, value);
}

static inline void lapic_eoi(void)
{
	lapic_write(LAPIC_EOI, 0);
}

/* Software-enable this CPU's local APIC; the spurious vector is 255. */
void lapic_enable(void);
/* Send an interrupt command and wait until it is accepted. */
void lapic_send(uint32_t apic_id, uint32_t command);
/* Route an edge-triggered, active-high pin of the IO-APIC to the boot CPU. */
void ioapic_route(unsigned int pin, uint8_t vector);
/* Route a level-triggered, active-low pin of the IO-APIC to the boot CPU. */
void ioapic_route_level_low(unsigned int pin, uint8_t vector);

/* --- application processors ------------------------------------------------------------------- */

extern uint32_t ap_stack;     /* the stack pointer of the next processor to start */
extern void (*ap_main)(void); /* the function that it runs */
/*
 * Start the CPU with this APIC id by INIT and SIPI. It runs entry on the given stack. This returns
 * once the CPU runs, just before it calls entry.
 */
void ap_start(uint32_t apic_id, void *stack_top, void (*entry)(void));

#endif
#endif
