/* SPDX-License-Identifier: MIT */
#include "intx.h"

#include <errno.h>
#include <stdlib.h>
#include <linux/kvm.h>

#include "ioctl.h"
#include "relay.h"

struct pv_line {
	pthread_mutex_t own, *lock; /* the lock of a pair is that of one of them */
	struct pv_line *twin;	    /* drives the same pin of the 8259s */
	const int *vm_fd;
	uint32_t gsi;
	uint32_t high; /* how many functions hold the input high */
};

_Static_assert(PV_INTX_EVENTS <= PV_RELAY_EVENTS, "a card has more events than a relay takes");

struct pv_intx {
	pthread_mutex_t lock;
	struct pv_line *line;
	uint8_t isr;
	bool disabled, level;
	uint8_t bits[PV_INTX_EVENTS]; /* the thread's; they do not change while it runs */
	struct pv_relay relay;
};

/**
 * pv_line_new() - Make an input of the interrupt controller, which functions share
 * @vm_fd:	Address of the VM's descriptor, lent; a machine reset replaces the descriptor, -1
 *		stands for no VM
 * @gsi:	Number of the input
 *
 * Return: the input, to be freed by pv_line_free(); NULL if memory is short
 */
struct pv_line *pv_line_new(const int *vm_fd, uint32_t gsi)
{
	struct pv_line *line = calloc(1, sizeof(*line));

	if (!line)
		return NULL;
	pthread_mutex_init(&line->own, NULL);
	line->lock = &line->own;
	line->vm_fd = vm_fd;
	line->gsi = gsi;
	return line;
}

/**
 * pv_line_pair() - Say that two inputs drive the same pin of the 8259s
 * @a:		From pv_line_new(); no function uses the input yet
 * @b:		Likewise
 */
void pv_line_pair(struct pv_line *a, struct pv_line *b)
{
	a->twin = b;
	b->twin = a;
	b->lock = a->lock;
}

/**
 * pv_line_free() - Free an input
 * @line:	From pv_line_new(); no function uses the input, or its twin, any more; or NULL
 */
void pv_line_free(struct pv_line *line)
{
	if (!line)
		return;
	pthread_mutex_destroy(&line->own);
	free(line);
}

static void line_set(const struct pv_line *line, bool level)
{
	struct kvm_irq_level irq = {.irq = line->gsi, .level = level};

	if (*line->vm_fd >= 0)
		pv_ioctl(*line->vm_fd, KVM_IRQ_LINE, &irq);
}

/*
 * One function more, or one less, holds the input high. KVM counts nobody: at a pin of the 8259s
 * the latest call counts, whichever input it was for.
 */
static void line_drive(struct pv_line *line, bool level)
{
	pthread_mutex_lock(line->lock);
	if (level ? !line->high++ : !--line->high) {
		line_set(line, level);
		if (!level && line->twin && line->twin->high)
			line_set(line->twin, true);
	}
	pthread_mutex_unlock(line->lock);
}

/**
 * pv_intx_new() - Make a line
 *
 * Return: the line, to be freed by pv_intx_free(); NULL if memory is short
 */
struct pv_intx *pv_intx_new(void)
{
	struct pv_intx *x = calloc(1, sizeof(*x));

	if (x)
		pthread_mutex_init(&x->lock, NULL);
	return x;
}

/**
 * pv_intx_free() - Free a line
 * @x:		From pv_intx_new(), low and without a thread; or NULL
 */
void pv_intx_free(struct pv_intx *x)
{
	if (!x)
		return;
	pthread_mutex_destroy(&x->lock);
	free(x);
}

/**
 * pv_intx_wire() - Choose the input of the interrupt controller, before the line is first raised
 * @x:		The line
 * @line:	The input, lent until pv_intx_free()
 */
void pv_intx_wire(struct pv_intx *x, struct pv_line *line)
{
	x->line = line;
}

static void intx_update(struct pv_intx *x)
{
	bool level = x->isr && !x->disabled;

	if (level == x->level || !x->line)
		return;
	x->level = level;
	line_drive(x->line, level);
}

/**
 * pv_intx_raise() - Set bits of the register, and raise the line unless it is disabled
 * @x:		The line; any thread may call this
 * @bits:	1 for a queue, 2 for the configuration
 */
void pv_intx_raise(struct pv_intx *x, uint8_t bits)
{
	pthread_mutex_lock(&x->lock);
	x->isr |= bits;
	intx_update(x);
	pthread_mutex_unlock(&x->lock);
}

/**
 * pv_intx_disable() - Disable or enable the line
 * @x:		The line; any thread may call this
 * @disabled:	Bit 10 of the PCI command register is set, or MSI-X is in use
 *
 * A pending interrupt disappears from the line or appears on it at once.
 */
void pv_intx_disable(struct pv_intx *x, bool disabled)
{
	pthread_mutex_lock(&x->lock);
	x->disabled = disabled;
	intx_update(x);
	pthread_mutex_unlock(&x->lock);
}

/**
 * pv_intx_reset() - Clear the register, and lower the line
 * @x:		The line; any thread may call this
 */
void pv_intx_reset(struct pv_intx *x)
{
	pthread_mutex_lock(&x->lock);
	x->isr = 0;
	intx_update(x);
	pthread_mutex_unlock(&x->lock);
}

/**
 * pv_intx_peek() - Look at the register, and leave it as it is
 * @x:		The line; any thread may call this
 *
 * Return: the bits, also while the line is disabled
 */
uint8_t pv_intx_peek(struct pv_intx *x)
{
	uint8_t isr;

	pthread_mutex_lock(&x->lock);
	isr = x->isr;
	pthread_mutex_unlock(&x->lock);
	return isr;
}

/**
 * pv_intx_read() - Do the guest's read of the register, which clears it and lowers the line
 * @x:		The line; any thread may call this
 *
 * Return: the bits before they were cleared
 */
uint8_t pv_intx_read(struct pv_intx *x)
{
	uint8_t isr;

	pthread_mutex_lock(&x->lock);
	isr = x->isr;
	x->isr = 0;
	intx_update(x);
	pthread_mutex_unlock(&x->lock);
	return isr;
}

/**
 * pv_intx_ack() - Do the guest's write to InterruptACK: clear bits of the register
 * @x:		The line; any thread may call this
 * @bits:	These bits; others that have been set meanwhile keep the line high
 */
void pv_intx_ack(struct pv_intx *x, uint8_t bits)
{
	pthread_mutex_lock(&x->lock);
	x->isr &= (uint8_t)~bits;
	intx_update(x);
	pthread_mutex_unlock(&x->lock);
}

static void raise_line(void *arg, uint32_t number)
{
	struct pv_intx *x = arg;

	pv_intx_raise(x, x->bits[number]);
}

/**
 * pv_intx_start() - Start a thread that raises the line whenever an eventfd is signalled
 * @x:		The line, without a thread
 * @name:	The thread's name, which the system shows
 * @fds:	Non-blocking eventfds, lent until pv_intx_stop()
 * @bits:	fds[i] sets bits[i] of the register
 * @count:	How many eventfds, at most PV_INTX_EVENTS
 *
 * Return: 0, or -errno
 */
int pv_intx_start(struct pv_intx *x, const char *name, const int32_t *fds, const uint8_t *bits,
		  uint32_t count)
{
	if (count > PV_INTX_EVENTS)
		return -EINVAL;
	for (uint32_t i = 0; i < count; i++)
		x->bits[i] = bits[i];
	return pv_relay_start(&x->relay, name, fds, count, raise_line, x);
}

/**
 * pv_intx_stop() - End the thread
 * @x:		The line; without a thread nothing happens
 */
void pv_intx_stop(struct pv_intx *x)
{
	pv_relay_stop(&x->relay);
}
