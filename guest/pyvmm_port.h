/* SPDX-License-Identifier: MIT */
/*
 * The guest port: how a program in the guest talks to pyvmm without a driver.
 *
 * I/O ports of the machine (pyvmm/spec/platform.py has the same numbers; a test holds the two
 * together):
 *
 *   PORT_GUEST_CONTROL  32-bit write: opcode << 24 | value, the opcodes are GUEST_* below; value
 *                       is 24 bits. A 32-bit read gives GUEST_MAGIC; another VMM may have
 *                       something else at these ports.
 *   PORT_GUEST_STDOUT   8-bit writes, also by rep outsb: bytes of the command's standard output.
 *   PORT_GUEST_STDERR   likewise, of its standard error.
 *   PORT_GUEST_REQUEST  32-bit read: the VMM puts the next bytes of its requests, 4096 at most,
 *                       into the page of GUEST_PAGE; the value is how many. Below is what they mean.
 *
 * KVM leaves the guest once for each byte, also with rep outsb (em_out in arch/x86/kvm/emulate.c),
 * which is well for a test program's few words. For more there is GUEST_PAGE, which names a page of
 * guest memory once, and then GUEST_WRITE, which sends up to 4096 bytes from that page for one
 * exit. Both streams keep their order.
 *
 * A program needs ioperm(PORT_GUEST_CONTROL, PORT_GUEST_COUNT, 1), for which it must have
 * CAP_SYS_RAWIO.
 *
 * The order in which our init sends: GUEST_INIT, GUEST_NET_UP (only where interfaces were asked
 * for), GUEST_COMMAND, output, GUEST_STATUS, GUEST_POWEROFF.
 *
 * With pyvmm.agent on the kernel command line init does what the VMM asks for instead of running
 * one command: it sends GUEST_PAGE and GUEST_AGENT, and from then on takes requests. A byte on the
 * second serial port (of whatever value) says that there is one. The requests are a stream of
 * struct pyvmm_request, each followed by its argv (each argument ended by a NUL) and the command's
 * standard input. One command runs at a time: its output comes by GUEST_WRITE, and GUEST_RESULT
 * ends it.
 */
#ifndef PYVMM_PORT_H
#define PYVMM_PORT_H

#define PORT_GUEST_CONTROL 0x620
#define PORT_GUEST_STDOUT  0x624
#define PORT_GUEST_STDERR  0x625
#define PORT_GUEST_REQUEST 0x628
#define PORT_GUEST_COUNT   12

/* For kernels without ACPI: SLP_EN and the S5 type in the sleep control register. */
#define PORT_ACPI_SLEEP_CONTROL 0x600
#define ACPI_POWER_OFF		0x34

#define GUEST_MAGIC 0x4d4d5650 /* "PVMM" */

#define GUEST_INIT     1 /* init runs */
#define GUEST_COMMAND  2 /* the command is about to start */
#define GUEST_STATUS   3 /* the command has ended; value is its exit status, 0..255 */
#define GUEST_POWEROFF 4 /* init is about to power off */
#define GUEST_NET_UP   5 /* the network interfaces are configured; value is how many */
#define GUEST_PAGE     6 /* value is the page frame number of the page that GUEST_WRITE sends from */
#define GUEST_WRITE    7 /* output: bits 0..15 of value are the length, at most 4096; 16: stderr */
#define GUEST_AGENT    8 /* requests are taken from now on */
#define GUEST_RESULT   9 /* a command has ended: bits 0..7 of value are its status, 8..23 its id */

#define REQUEST_RUN   1 /* run argv */
#define REQUEST_KILL  2 /* kill what runs as id */
#define REQUEST_LEAVE 3 /* power off */
/* Bytes that a request may have. */
#define REQUEST_ARGV_MAX  65535
#define REQUEST_INPUT_MAX 1048576

struct pyvmm_request {
	unsigned int type, id, argv_size, input_size;
};

static inline int pyvmm_present(void)
{
	unsigned int value;

	__asm__ volatile("inl %w1, %0" : "=a"(value) : "Nd"(PORT_GUEST_CONTROL));
	return value == GUEST_MAGIC;
}

static inline void pyvmm_control(unsigned int opcode, unsigned int value)
{
	__asm__ volatile("outl %0, %w1"
			 :
			 : "a"(opcode << 24 | (value & 0xffffff)), "Nd"(PORT_GUEST_CONTROL)
			 : "memory");
}

static inline void pyvmm_write(unsigned short port, const void *data, unsigned long size)
{
	__asm__ volatile("rep outsb" : "+S"(data), "+c"(size) : "d"(port) : "memory");
}

#endif
