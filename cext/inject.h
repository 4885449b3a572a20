/* SPDX-License-Identifier: MIT */
/*
 * The interrupt of one virtqueue, which a thread raises itself by an ioctl (interrupt=ioctl).
 *
 * Theory of operation
 *
 * Usually whoever moves packets adds 1 to the virtqueue's call eventfd, and KVM raises the
 * interrupt from there (irqfd). Before Linux 2.6.32 there were no irqfds, and a VMM made a call per
 * interrupt: KVM_IRQ_LINE for the card's line, later KVM_SIGNAL_MSI for a message. A pv_inject does
 * so.
 *
 * Python says where interrupts go at the moment, as the guest programs it: to a message, to the
 * line, or nowhere. Interrupts that go nowhere are kept in the eventfd, as without irqfd, so that
 * the pending bit is a poll of the eventfd in either case. One lock is between the two sides: once
 * pv_inject_hold() has returned, nothing goes to the old destination.
 */
#ifndef PV_INJECT_H
#define PV_INJECT_H

#include "types.h"

/* cffi: begin */
struct pv_intx;
struct pv_inject;
struct pv_inject *pv_inject_new(const int *vm_fd, int event);
void pv_inject_free(struct pv_inject *i);
void pv_inject_message(struct pv_inject *i, uint64_t address, uint32_t data);
void pv_inject_line(struct pv_inject *i, struct pv_intx *x, uint8_t bits);
void pv_inject_hold(struct pv_inject *i);
void pv_inject(struct pv_inject *i);
uint64_t pv_inject_count(const struct pv_inject *i);
/* cffi: end */

#endif
