/* SPDX-License-Identifier: MIT */
#include "serial.h"

#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <linux/kvm.h>
#include <linux/serial_reg.h>

#define RX_SIZE	  1024
#define FIFO_SIZE 16 /* what drivers reckon with; the queues behind it are larger */
/*
 * The line is an edge for the interrupt controller. Linux' handler gives up after 512 rounds ("too
 * much work for irq4"), and a transmitter that is never busy can keep it that long while another
 * CPU writes. Then the line stays high, and nothing would ever be heard of the port again; so
 * within that many rounds there is a new edge, which the controller keeps for when the handler is
 * done.
 */
#define EDGE_ROUNDS 128

struct pv_serial {
	pthread_mutex_t lock;
	const int *vm_fd;
	uint32_t gsi;
	struct pv_pipe *tx;
	uint8_t dll, dlm, ier, fcr, lcr, mcr, lsr_sticky, scr;
	bool thre_pending; /* the THRE interrupt condition, cleared by reading IIR (data
			      sheet 8.6.3) */
	bool irq_level;
	uint64_t edges;
	uint32_t rounds; /* reads of IIR since the last edge */
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
		ioctl(*s->vm_fd, KVM_IRQ_LINE, &line);
}

static void update_irq(struct pv_serial *s)
{
	set_line(s, pending(s) != UART_IIR_NO_INT);
}

/* The pipe has room again: the transmitter is empty. */
static void on_room(void *arg)
{
	struct pv_serial *s = arg;

	pthread_mutex_lock(&s->lock);
	s->thre_pending = true;
	update_irq(s);
	pthread_mutex_unlock(&s->lock);
}

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

void pv_serial_free(struct pv_serial *s)
{
	if (!s)
		return;
	pv_pipe_on_room(s->tx, NULL, NULL);
	pthread_mutex_destroy(&s->lock);
	free(s);
}

void pv_serial_reset(struct pv_serial *s)
{
	pthread_mutex_lock(&s->lock);
	s->dll = 0x0c; /* 9600 baud; nobody waits for it */
	s->dlm = s->ier = s->fcr = s->lcr = s->scr = s->lsr_sticky = 0;
	s->mcr = UART_MCR_OUT2;
	s->thre_pending = false;
	s->irq_level = false; /* the line is new, or about to be */
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

uint64_t pv_serial_edges(struct pv_serial *s)
{
	uint64_t n;

	pthread_mutex_lock(&s->lock);
	n = s->edges;
	pthread_mutex_unlock(&s->lock);
	return n;
}

uint32_t pv_serial_input(struct pv_serial *s, const uint8_t *buf, uint32_t len)
{
	uint32_t n;

	pthread_mutex_lock(&s->lock);
	/*
	 * In loop-back the receiver is cut off from the line (data sheet 8.7); without a reader the
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
		set_line(s, false); /* update_irq raises it again if anything is left */
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
	/* Looped, outputs come back as inputs: RTS as CTS, DTR as DSR, OUT1 as RI, OUT2 as DCD. */
	if (s->mcr & UART_MCR_LOOP)
		return (uint8_t)((s->mcr & UART_MCR_RTS ? UART_MSR_CTS : 0) |
				 (s->mcr & UART_MCR_DTR ? UART_MSR_DSR : 0) |
				 (s->mcr & UART_MCR_OUT1 ? UART_MSR_RI : 0) |
				 (s->mcr & UART_MCR_OUT2 ? UART_MSR_DCD : 0));
	return UART_MSR_CTS | UART_MSR_DSR | UART_MSR_DCD;
}

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

/*
 * Returns whether the byte is for the line; the pipe is written without our lock, since its reader
 * calls on_room.
 */
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
			 * Enabling THRI with an empty transmitter interrupts at once (8250's
			 * start_tx relies on it).
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
	pv_pipe_write(s->tx, &value, 1, -1);
	pthread_mutex_lock(&s->lock);
	/* A full pipe keeps the interrupt back until on_room. */
	s->thre_pending = tx_ready(s);
	update_irq(s);
	pthread_mutex_unlock(&s->lock);
}

bool pv_serial_dlab(struct pv_serial *s)
{
	bool dlab;

	pthread_mutex_lock(&s->lock);
	dlab = s->lcr & UART_LCR_DLAB;
	pthread_mutex_unlock(&s->lock);
	return dlab;
}
