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
 *   PORT_GUEST_CHANNEL  A 32-bit read makes the VMM put frames (see below) into the pages of
 *                       GUEST_CHANNEL; a 32-bit write hands over the frames that the guest has put
 *                       there. The value is the number of bytes.
 *   PORT_GUEST_INPUT    A 32-bit read makes the VMM copy the next bytes of the command's standard
 *                       input, at most 4096, to the page of GUEST_PAGE. The read gives the number
 *                       of bytes; 0 if there are none yet, and the byte BELL_INPUT on the second
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
 * The channel carries further commands, which the VMM starts at any time: sessions. Its data are
 * frames, each a struct pyvmm_frame and its payload, in both directions. GUEST_CHANNEL names a page
 * with a list: the number of pages, at most CHANNEL_PAGES, and the page frame number of each, all
 * of 32 bits; the first is that page itself. A VMM with a channel puts GUEST_ANSWERS there. From
 * then on each transfer carries whole frames, and the byte BELL_CHANNEL on the second serial port
 * says that the VMM has some. Nobody who waits for a stream delays another:
 *
 *   FRAME_OPEN    VMM     a piece of the command's description, see below
 *   FRAME_START   VMM     the description is complete: start the command
 *   FRAME_INPUT   VMM     bytes of its standard input; none at the end of the input
 *   FRAME_OUTPUT  guest   bytes of its standard output or of its terminal; none at the end
 *                 VMM     nobody reads that stream any more; without a payload
 *   FRAME_ERROR   both    the same for its standard error
 *   FRAME_CREDIT  both    two words: one of the three types above, and by how many bytes the sender
 *                         of such frames may send more. It begins with CHANNEL_WINDOW each
 *   FRAME_SIGNAL  VMM     a word: send this signal to the command's process group
 *   FRAME_SIZE    VMM     two words: columns and rows of the command's terminal
 *   FRAME_EXIT    guest   a word: the command's status, as a shell says it. The session is over
 *   FRAME_CLOSE   VMM     nobody waits for the command any more. It is ended; no frame follows
 *   FRAME_LEAVE   VMM     power off; of no session
 *   FRAME_FAILED  VMM     only on the control socket (docs/exec.md): the session is over; a word is
 *                         the exit code, and the rest is the reason
 *
 * The description has strings that a NUL ends. The first character of each says what follows: 'a'
 * an argument, 'e' NAME=VALUE for the environment, 'u' USER[:GROUP], 'd' the working directory, 't'
 * COLUMNSxROWS of a terminal, without which its streams are pipes; 'i' alone says that input will
 * come. Without an argument, it is the user's shell.
 *
 * With pyvmm.agent on the kernel command line, init runs no command of its own. It sends
 * GUEST_AGENT and waits for sessions.
 */
#ifndef PYVMM_PORT_H
#define PYVMM_PORT_H

#define PORT_GUEST_CONTROL 0x620
#define PORT_GUEST_STDOUT  0x624
#define PORT_GUEST_STDERR  0x625
#define PORT_GUEST_CHANNEL 0x628
#define PORT_GUEST_INPUT   0x62c
#define PORT_GUEST_COUNT   16

/* Kernels without ACPI power off by writing SLP_EN and the S5 type to this register. */
#define PORT_ACPI_SLEEP_CONTROL 0x600
#define ACPI_POWER_OFF		0x34

#define GUEST_MAGIC 0x4d4d5650 /* "PVMM" */

#define GUEST_INIT     1  /* init runs */
#define GUEST_COMMAND  2  /* the command is about to start */
#define GUEST_STATUS   3  /* the command has ended; value is its exit status, 0..255 */
#define GUEST_POWEROFF 4  /* init is about to power off */
#define GUEST_NET_UP   5  /* the network interfaces are configured; value is their number */
#define GUEST_PAGE     6  /* value is the page frame number of the page for output and input */
#define GUEST_WRITE    7  /* output: bits 0..15 of value are the length, at most 4096; 16: stderr */
#define GUEST_AGENT    8  /* init runs no command of its own, but waits for sessions */
#define GUEST_CHANNEL  9  /* value is the page frame number of the page with the channel's list */
#define GUEST_SHARES   10 /* the shares of SHARES_FILE are mounted; value is their number */
/* A share is not mounted: bits 0..15 of value are the error, 16..23 the share's number in the file,
 * or SHARE_OVERLAY for the overlay of the root. */
#define GUEST_NO_SHARE 11
#define SHARE_OVERLAY  255

#define GUEST_ANSWERS 0x534e4150 /* "PANS" */
#define GONE_STDOUT   1
#define GONE_STDERR   2

#define INPUT_ENDS 0xffffffff

#define BELL_INPUT   0x3c
#define BELL_CHANNEL 0x21

#define CHANNEL_PAGES  16
#define CHANNEL_WINDOW 262144

#define FRAME_OPEN   1
#define FRAME_START  2
#define FRAME_INPUT  3
#define FRAME_OUTPUT 4
#define FRAME_ERROR  5
#define FRAME_CREDIT 6
#define FRAME_SIGNAL 7
#define FRAME_SIZE   8
#define FRAME_EXIT   9
#define FRAME_CLOSE  10
#define FRAME_LEAVE  11
#define FRAME_FAILED 12

/* @size is that of the payload, in bytes. The VMM chooses @session and never uses it again. */
struct pyvmm_frame {
	unsigned int type, session, size;
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
