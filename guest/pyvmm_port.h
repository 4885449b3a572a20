/* SPDX-License-Identifier: MIT */
/*
 * The guest port, by which a program in the guest talks to pyvmm without a driver.
 *
 * These are the machine's I/O ports (pyvmm/spec/platform.py has the same numbers; a test compares
 * the two):
 *
 *   PORT_GUEST_CONTROL  A 32-bit write sends opcode << 24 | value. The opcodes are GUEST_* below;
 *                       value has 24 bits. A 32-bit read gives GUEST_MAGIC, by which a program
 *                       knows that this is pyvmm and not another VMM.
 *   PORT_GUEST_STDOUT   8-bit writes, also by rep outsb, send bytes of the command's standard
 *                       output.
 *   PORT_GUEST_STDERR   8-bit writes send bytes of the command's standard error.
 *   PORT_GUEST_REQUEST  A 32-bit read makes the VMM copy the next bytes of its requests (see
 *                       below), at most 4096, to the page of GUEST_PAGE. The read gives the number
 *                       of bytes.
 *   PORT_GUEST_INPUT    A 32-bit read makes the VMM copy the next bytes of the command's standard
 *                       input, at most 4096, to the page of GUEST_PAGE. The read gives the number
 *                       of bytes; 0 if there are none yet, and a byte of any value on the second
 *                       serial port then tells that there are; or INPUT_ENDS.
 *
 * KVM exits once per byte, also with rep outsb (em_out in arch/x86/kvm/emulate.c). This is good
 * enough for the few words of a test program. For longer output, GUEST_PAGE names a page of guest
 * memory once, and each GUEST_WRITE then sends up to 4096 bytes from that page by one exit. Each of
 * the two streams keeps its order. A VMM that answers says so at GUEST_PAGE: it puts GUEST_ANSWERS
 * into the page's first four bytes. From then on, each GUEST_WRITE leaves a word of GONE_* there,
 * which says whose reader has gone, so that init can end the command by SIGPIPE.
 *
 * A program must call ioperm(PORT_GUEST_CONTROL, PORT_GUEST_COUNT, 1) first, which needs
 * CAP_SYS_RAWIO.
 *
 * Our init sends in this order: GUEST_INIT, GUEST_NET_UP (if the command line names interfaces),
 * GUEST_COMMAND, the output, GUEST_STATUS, GUEST_POWEROFF.
 *
 * With pyvmm.agent on the kernel command line, init does not run one command but takes requests of
 * the VMM: it sends GUEST_PAGE and GUEST_AGENT first. A byte of any value on the second serial port
 * tells init that there is a request. The requests are a stream: each is a struct pyvmm_request,
 * the argv (a NUL ends each argument) and the command's standard input. One command runs at a time.
 * Its output comes by GUEST_WRITE, and GUEST_RESULT reports its end.
 */
#ifndef PYVMM_PORT_H
#define PYVMM_PORT_H

#define PORT_GUEST_CONTROL 0x620
#define PORT_GUEST_STDOUT  0x624
#define PORT_GUEST_STDERR  0x625
#define PORT_GUEST_REQUEST 0x628
#define PORT_GUEST_INPUT   0x62c
#define PORT_GUEST_COUNT   16

/* Kernels without ACPI power off by writing SLP_EN and the S5 type to this register. */
#define PORT_ACPI_SLEEP_CONTROL 0x600
#define ACPI_POWER_OFF		0x34

#define GUEST_MAGIC 0x4d4d5650 /* "PVMM" */

#define GUEST_INIT     1 /* init runs */
#define GUEST_COMMAND  2 /* the command is about to start */
#define GUEST_STATUS   3 /* the command has ended; value is its exit status, 0..255 */
#define GUEST_POWEROFF 4 /* init is about to power off */
#define GUEST_NET_UP   5 /* the network interfaces are configured; value is their number */
#define GUEST_PAGE     6 /* value is the page frame number of the page for output and requests */
#define GUEST_WRITE    7 /* output: bits 0..15 of value are the length, at most 4096; 16: stderr */
#define GUEST_AGENT    8 /* init takes requests from now on */
#define GUEST_RESULT   9 /* a command has ended: bits 0..7 of value are its status, 8..23 its id */

#define GUEST_ANSWERS 0x534e4150 /* "PANS" */
#define GONE_STDOUT   1
#define GONE_STDERR   2

#define INPUT_ENDS 0xffffffff

#define REQUEST_RUN   1 /* run argv */
#define REQUEST_KILL  2 /* kill the command with this id */
#define REQUEST_LEAVE 3 /* power off */
/* The largest argv and the longest standard input of a request, in bytes. */
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
