/* SPDX-License-Identifier: MIT */
#include "inject.h"

#include <pthread.h>
#include <stdlib.h>
#include <linux/kvm.h>

#include "event.h"
#include "intx.h"
#include "ioctl.h"

struct pv_inject {
	pthread_mutex_t lock;
	const int *vm_fd;
	int event;
	bool message; /* interrupts go to msi */
	struct kvm_msi msi;
	struct pv_intx *intx; /* interrupts go to this line; NULL: they do not */
	uint8_t bits;
	uint64_t count;
};

/**
 * pv_inject_new() - Make the interrupt of a virtqueue, which goes nowhere yet
 * @vm_fd:	Address of the VM's descriptor, lent; a machine reset replaces the descriptor, -1
 *		stands for no VM
 * @event:	The virtqueue's call eventfd, lent; keeps an interrupt that goes nowhere
 *
 * Return: the interrupt, to be freed by pv_inject_free(); NULL if memory is short
 */
struct pv_inject *pv_inject_new(const int *vm_fd, int event)
{
	struct pv_inject *i = calloc(1, sizeof(*i));

	if (!i)
		return NULL;
	pthread_mutex_init(&i->lock, NULL);
	i->vm_fd = vm_fd;
	i->event = event;
	return i;
}

/**
 * pv_inject_free() - Free an interrupt
 * @i:		From pv_inject_new(), nobody raises it any more; or NULL
 */
void pv_inject_free(struct pv_inject *i)
{
	if (!i)
		return;
	pthread_mutex_destroy(&i->lock);
	free(i);
}

/* Raise the interrupt where it goes at the moment; the lock is held. */
static void deliver(struct pv_inject *i)
{
	if (i->intx) {
		pv_intx_raise(i->intx, i->bits);
	} else if (i->message) {
		/* An error means that the guest sends messages where no APIC is. */
		if (*i->vm_fd >= 0)
			(void)pv_ioctl(*i->vm_fd, KVM_SIGNAL_MSI, &i->msi);
	} else {
		pv_event_add(i->event);
		return;
	}
	__atomic_store_n(&i->count, i->count + 1, __ATOMIC_RELAXED);
}

/* Interrupts go somewhere again, and so does the one that has been kept. The lock is held. */
static void release(struct pv_inject *i)
{
	if (pv_event_take(i->event))
		deliver(i);
}

/**
 * pv_inject_message() - Let the interrupt go to a message (MSI-X) from now on
 * @i:		The interrupt; any thread may call this
 * @address:	Of the message, as the guest has programmed it; any value
 * @data:	Likewise
 */
void pv_inject_message(struct pv_inject *i, uint64_t address, uint32_t data)
{
	pthread_mutex_lock(&i->lock);
	i->msi = (struct kvm_msi){.address_lo = (uint32_t)address,
				  .address_hi = (uint32_t)(address >> 32),
				  .data = data};
	i->message = true;
	i->intx = NULL;
	release(i);
	pthread_mutex_unlock(&i->lock);
}

/**
 * pv_inject_line() - Let the interrupt go to the card's line from now on
 * @i:		The interrupt; any thread may call this
 * @x:		The line, lent until the interrupt goes elsewhere
 * @bits:	Bits of the ISR status that it sets
 */
void pv_inject_line(struct pv_inject *i, struct pv_intx *x, uint8_t bits)
{
	pthread_mutex_lock(&i->lock);
	i->message = false;
	i->intx = x;
	i->bits = bits;
	release(i);
	pthread_mutex_unlock(&i->lock);
}

/**
 * pv_inject_hold() - Let the interrupt go nowhere: keep it in the eventfd
 * @i:		The interrupt; any thread may call this
 */
void pv_inject_hold(struct pv_inject *i)
{
	pthread_mutex_lock(&i->lock);
	i->message = false;
	i->intx = NULL;
	pthread_mutex_unlock(&i->lock);
}

/**
 * pv_inject() - Raise the interrupt
 * @i:		The interrupt; any thread may call this
 */
void pv_inject(struct pv_inject *i)
{
	pthread_mutex_lock(&i->lock);
	deliver(i);
	pthread_mutex_unlock(&i->lock);
}

/**
 * pv_inject_count() - How many interrupts have gone to a message or a line
 * @i:		The interrupt; any thread may call this
 *
 * A message is one ioctl. A line that is high already is none.
 *
 * Return: the number
 */
uint64_t pv_inject_count(const struct pv_inject *i)
{
	return __atomic_load_n(&i->count, __ATOMIC_RELAXED);
}
