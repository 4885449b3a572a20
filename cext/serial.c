/* SPDX-License-Identifier: MIT */
#include "serial.h"

#include <stdlib.h>
#include <string.h>
#include <linux/kvm.h>
#include <linux/serial_reg.h>

#include "ioctl.h"

#define RX_SIZE	  1024
#define FIFO_SIZE 16 /* drivers reckon with so many bytes; the queues behind it are larger */
/*
 * The interrupt controller sees an edge of the line only. Linux' handler gives up after 512 rounds
 * ("too much work for irq4"); it can come to that if another CPU writes meanwhile, because our
 * transmitter is rarely busy. The line would then stay high without an edge, and the port would
 * never interrupt again. So there is a new edge after at most EDGE_ROUNDS rounds; the controller
 * remembers it until the handler has returned.
 */
#define EDGE_ROUNDS 128

struct pv_serial {
	pthread_mutex_t lock;
	const int *vm_fd;
	uint32_t gsi;
	struct pv_pipe *tx;
	uint8_t dll, dlm, ier, fcr, lcr, mcr, lsr_sticky, scr;
	bool thre_pending; /* THRE interrupts; reading IIR clears the condition (8.6.3) */
	bool irq_level;
	uint64_t edges;
	uint32_t rounds; /* reads of IIR since the latest edge */
	uint32_t head, tail;
	uint8_t rx[RX_SIZE];
};

static bool tx_ready(struct pv_serial *s)
{
	return (s->mcr & UART_MCR_LOOP) || pv_pipe_writable(s->tx, FIFO_SIZE);
}

/* The highest pending and enabled interrupt, as IIR reports it. */
static uint8_t pending(struct pv_serial *s)
{
	if ((s->ier & UART_IER_RLSI) && s->lsr_sticky)
		return UART_IIR_RLSI;
	if ((s->ier & UART_IER_RDI) && s->head != s->tail)
		return UART_IIR_RDI;
	if ((s->ier & UART_IER_THRI) && s->thre_pending)
		return UART_IIR_THRI;
	return UART_IIR_NO_INT;
}

static void set_line(struct pv_serial *s, bool level)
{
	struct kvm_irq_level line = {.irq = s->gsi, .level = level};

	if (level == s->irq_level)
		return;
	s->irq_level = level;
	s->rounds = 0;
	s->edges += level;
	if (*s->vm_fd >= 0)
		pv_ioctl(*s->vm_fd, KVM_IRQ_LINE, &line);
}

static void update_irq(struct pv_serial *s)
{
	set_line(s, pending(s) != UART_IIR_NO_INT);
}

/* The pipe has room again, so the transmitter is empty. The pipe's reader thread calls this. */
static void on_room(void *arg)
{
	struct pv_serial *s = arg;

	pthread_mutex_lock(&s->lock);
	s->thre_pending = true;
	update_irq(s);
	pthread_mutex_unlock(&s->lock);
}

/**
 * pv_serial_new() - Make a serial port
 * @vm_fd:	Address of the VM's descriptor, which a machine reset replaces; lent
 * @gsi:	Edge-triggered interrupt line
 * @tx:		Pipe for the guest's output; lent, and outlives the port
 *
 * Return: the port, to be freed by pv_serial_free(), or NULL
 */
struct pv_serial *pv_serial_new(const int *vm_fd, uint32_t gsi, struct pv_pipe *tx)
{
	struct pv_serial *s = calloc(1, sizeof(*s));

	if (!s)
		return NULL;
	pthread_mutex_init(&s->lock, NULL);
	s->vm_fd = vm_fd;
	s->gsi = gsi;
	s->tx = tx;
	pv_serial_reset(s);
	pv_pipe_on_room(tx, on_room, s);
	return s;
}

/**
 * pv_serial_free() - Free a port and remove its hook from the pipe
 * @s:		From pv_serial_new(), or NULL; nobody uses it any more
 */
void pv_serial_free(struct pv_serial *s)
{
	if (!s)
		return;
	pv_pipe_on_room(s->tx, NULL, NULL);
	pthread_mutex_destroy(&s->lock);
	free(s);
}

/**
 * pv_serial_reset() - Set the registers to their values after reset
 * @s:		The port
 */
void pv_serial_reset(struct pv_serial *s)
{
	pthread_mutex_lock(&s->lock);
	s->dll = 0x0c; /* 9600 baud; the rate has no effect */
	s->dlm = s->ier = s->fcr = s->lcr = s->scr = s->lsr_sticky = 0;
	s->mcr = UART_MCR_OUT2;
	s->thre_pending = false;
	s->irq_level = false; /* the VM is new, or the reset replaces it: its lines are low */
	s->head = s->tail = 0;
	pthread_mutex_unlock(&s->lock);
}

static uint32_t push_rx(struct pv_serial *s, const uint8_t *buf, uint32_t len, uint32_t limit)
{
	uint32_t n = 0;

	while (n < len && s->head - s->tail < limit)
		s->rx[s->head++ % RX_SIZE] = buf[n++];
	return n;
}

/**
 * pv_serial_edges() - How often the interrupt line has risen
 * @s:		The port
 *
 * Return: the count since pv_serial_new()
 */
uint64_t pv_serial_edges(struct pv_serial *s)
{
	uint64_t n;

	pthread_mutex_lock(&s->lock);
	n = s->edges;
	pthread_mutex_unlock(&s->lock);
	return n;
}

/**
 * pv_serial_input() - Type bytes at the guest
 * @s:		The port
 * @buf:	Bytes to type
 * @len:	Number of bytes
 *
 * Any thread may call this. It never blocks.
 *
 * Return: how many bytes fitted into the receive queue of 1024 bytes
 */
uint32_t pv_serial_input(struct pv_serial *s, const uint8_t *buf, uint32_t len)
{
	uint32_t n;

	pthread_mutex_lock(&s->lock);
	/*
	 * In loop-back mode the receiver is cut off from the line (8.7). Nobody reads then, and the
	 * FIFO would overflow.
	 */
	n = s->mcr & UART_MCR_LOOP ? 0 : push_rx(s, buf, len, RX_SIZE);
	update_irq(s);
	pthread_mutex_unlock(&s->lock);
	return n;
}

static uint8_t read_iir(struct pv_serial *s)
{
	uint8_t iir = pending(s);

	if (iir == UART_IIR_THRI)
		s->thre_pending = false;
	if (++s->rounds >= EDGE_ROUNDS && s->irq_level)
		set_line(s, false); /* update_irq() raises it again if anything is pending */
	if (s->fcr & UART_FCR_ENABLE_FIFO)
		iir |= 0xc0;
	return iir;
}

static uint8_t read_lsr(struct pv_serial *s)
{
	uint8_t lsr = s->lsr_sticky;

	s->lsr_sticky = 0;
	if (s->head != s->tail)
		lsr |= UART_LSR_DR;
	if (tx_ready(s))
		lsr |= UART_LSR_THRE | UART_LSR_TEMT;
	return lsr;
}

static uint8_t read_msr(struct pv_serial *s)
{
	/* In loop-back mode RTS comes back as CTS, DTR as DSR, OUT1 as RI and OUT2 as DCD. */
	if (s->mcr & UART_MCR_LOOP)
		return (uint8_t)((s->mcr & UART_MCR_RTS ? UART_MSR_CTS : 0) |
				 (s->mcr & UART_MCR_DTR ? UART_MSR_DSR : 0) |
				 (s->mcr & UART_MCR_OUT1 ? UART_MSR_RI : 0) |
				 (s->mcr & UART_MCR_OUT2 ? UART_MSR_DCD : 0));
	return UART_MSR_CTS | UART_MSR_DSR | UART_MSR_DCD;
}

/**
 * pv_serial_in() - Answer the guest's read of a register
 * @s:		The port
 * @offset:	Offset of the register, 0 to 7
 *
 * Return: the register's value
 */
uint8_t pv_serial_in(struct pv_serial *s, uint32_t offset)
{
	uint8_t v = 0;

	pthread_mutex_lock(&s->lock);
	switch (offset) {
	case UART_RX:
		if (s->lcr & UART_LCR_DLAB)
			v = s->dll;
		else if (s->head != s->tail)
			v = s->rx[s->tail++ % RX_SIZE];
		break;
	case UART_IER:
		v = s->lcr & UART_LCR_DLAB ? s->dlm : s->ier;
		break;
	case UART_IIR:
		v = read_iir(s);
		break;
	case UART_LCR:
		v = s->lcr;
		break;
	case UART_MCR:
		v = s->mcr;
		break;
	case UART_LSR:
		v = read_lsr(s);
		break;
	case UART_MSR:
		v = read_msr(s);
		break;
	case UART_SCR:
		v = s->scr;
		break;
	}
	update_irq(s);
	pthread_mutex_unlock(&s->lock);
	return v;
}

/* Handle a byte for the transmitter. Returns whether the byte must be sent to the pipe. */
static bool write_thr(struct pv_serial *s, uint8_t value)
{
	if (s->mcr & UART_MCR_LOOP) {
		if (!push_rx(s, &value, 1, FIFO_SIZE))
			s->lsr_sticky |= UART_LSR_OE;
		s->thre_pending = true;
		return false;
	}
	return true;
}

/**
 * pv_serial_out() - Do the guest's write to a register
 * @s:		The port
 * @offset:	Offset of the register, 0 to 7
 * @value:	Value to write
 *
 * This waits while the pipe is full.
 */
void pv_serial_out(struct pv_serial *s, uint32_t offset, uint8_t value)
{
	bool send = false;

	pthread_mutex_lock(&s->lock);
	switch (offset) {
	case UART_TX:
		if (s->lcr & UART_LCR_DLAB)
			s->dll = value;
		else
			send = write_thr(s, value);
		break;
	case UART_IER:
		if (s->lcr & UART_LCR_DLAB) {
			s->dlm = value;
		} else {
			/*
			 * If the transmitter is empty, enabling THRI interrupts at once;
			 * start_tx() of Linux' 8250 driver relies on this.
			 */
			if ((value & UART_IER_THRI) && !(s->ier & UART_IER_THRI) && tx_ready(s))
				s->thre_pending = true;
			s->ier = value & 0x0f;
		}
		break;
	case UART_FCR:
		if ((value ^ s->fcr) & UART_FCR_ENABLE_FIFO || value & UART_FCR_CLEAR_RCVR)
			s->head = s->tail = 0;
		s->fcr = value & (UART_FCR_ENABLE_FIFO | UART_FCR_TRIGGER_MASK);
		break;
	case UART_LCR:
		s->lcr = value;
		break;
	case UART_MCR:
		s->mcr = value & 0x1f;
		break;
	case UART_SCR:
		s->scr = value;
		break;
	}
	update_irq(s);
	pthread_mutex_unlock(&s->lock);
	if (!send)
		return;
	/* The lock is free here: the write may wait for the reader, which calls on_room(). */
	pv_pipe_write(s->tx, &value, 1, -1);
	pthread_mutex_lock(&s->lock);
	/* If the pipe is full now, on_room() raises the interrupt later. */
	s->thre_pending = tx_ready(s);
	update_irq(s);
	pthread_mutex_unlock(&s->lock);
}

/**
 * pv_serial_dlab() - Whether offsets 0 and 1 are the divisor latch now
 * @s:		The port
 *
 * Return: the DLAB bit of LCR
 */
bool pv_serial_dlab(struct pv_serial *s)
{
	bool dlab;

	pthread_mutex_lock(&s->lock);
	dlab = s->lcr & UART_LCR_DLAB;
	pthread_mutex_unlock(&s->lock);
	return dlab;
}
