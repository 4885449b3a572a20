/* SPDX-License-Identifier: MIT */
/*
 * Drives the 16550 by interrupts, as a real driver does. With flood=N on the command line, it sends
 * N bytes, 16 per transmitter interrupt: lines "0000000 abc...xyz" of 64 bytes, which begin with
 * their offset in decimal. With echo=1, it then sends back all input up to a 'q'.
 */
#include "guest.h"

#define VECTOR 0x44
#define IRQ    4

#define RBR 0 /* a read gives the received byte; a write sends a byte */
#define IER 1
#define IIR 2 /* for reading; a write goes to the FIFO control register */
#define MCR 4
#define LSR 5

#define IER_RX	 0x01
#define IER_THRE 0x02
#define MCR_OUT2 0x08 /* on a PC, interrupts pass only while this is set */
#define LSR_DATA 0x01
#define LSR_THRE 0x20

#define LINE 64

static unsigned long total, sent;
static volatile unsigned int interrupts;
static volatile bool quit;
static char input[4096]; /* one interrupt may find all that the host has typed so far */
static volatile unsigned int head, tail;

static char flood_byte(unsigned long offset)
{
	unsigned long line = offset / LINE * LINE, column = offset % LINE;

	if (column < 7) {
		while (column++ < 6)
			line /= 10;
		return (char)('0' + line % 10);
	}
	return column == 7 ? ' ' : column == LINE - 1 ? '\n' : (char)('a' + (column - 8) % 26);
}

static void on_serial(unsigned int vector)
{
	(void)vector;
	interrupts++;
	for (;;) {
		uint8_t cause = inb(PORT_COM1 + IIR);

		if (cause & 1)
			break;
		if ((cause & 0xe) == 2) {
			for (int i = 0; i < 16 && sent < total; i++)
				outb(PORT_COM1 + RBR, (uint8_t)flood_byte(sent++));
			if (sent == total)
				outb(PORT_COM1 + IER, IER_RX);
		} else {
			while (inb(PORT_COM1 + LSR) & LSR_DATA)
				input[head++ % sizeof(input)] = (char)inb(PORT_COM1 + RBR);
		}
	}
	lapic_eoi();
}

static void echo(void)
{
	while (!quit) {
		__asm__ volatile("cli");
		if (head == tail) {
			irq_wait();
			continue;
		}
		while (head != tail) {
			char c = input[tail++ % sizeof(input)];

			while (!(inb(PORT_COM1 + LSR) & LSR_THRE))
				pause();
			outb(PORT_COM1 + RBR, (uint8_t)c);
			quit = quit || c == 'q';
		}
	}
}

int main(void)
{
	total = option_number("flood", 0);
	irq_init();
	irq_set(VECTOR, on_serial);
	lapic_enable();
	ioapic_route(IRQ, VECTOR);
	outb(PORT_COM1 + IIR, 0x07); /* turn the FIFOs on and clear them */
	outb(PORT_COM1 + MCR, MCR_OUT2 | 3);
	outb(PORT_COM1 + IER, total ? IER_RX | IER_THRE : IER_RX);
	say("serial: ready\n"); /* input that came earlier was cleared with the FIFOs */
	while (sent < total)
		irq_wait();
	if (option_number("echo", 0))
		echo();
	/* Do not power off before the last byte has been sent. */
	while (!(inb(PORT_COM1 + LSR) & LSR_THRE))
		pause();
	say("serial: %lu sent, %u received, %s\n", sent, head,
	    interrupts ? "by interrupts" : "no interrupts");
	return 0;
}
