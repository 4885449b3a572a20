/* SPDX-License-Identifier: MIT */
/*
 * A level-triggered interrupt line that shows virtio's ISR status register (virtio 1.2, 4.1.4.5).
 *
 * Theory of operation
 *
 * pv_intx_raise() sets bits of the register. The line is high while any bit is set and the line is
 * not disabled. Over PCI, the guest's read of the register clears it and lowers the line. Over MMIO,
 * where the register is called InterruptStatus (4.2.2), a read changes nothing, and the guest writes
 * the bits that it has seen to InterruptACK. The cards that have the same line number share an input
 * of the interrupt controller (struct pv_line): the input is high while any of them wants it so.
 * Without an IO-APIC, a PCI line and the line of a card over MMIO end at the same pin of the 8259s.
 * Such lines are a pair: the pin is high while one of the two is.
 *
 * While a card has no MSI-X, or MSI-X is off, a thread in C (relay.h) raises the line whenever a
 * call eventfd of a queue is signalled. Every interrupt passes through this thread, so it never
 * waits for Python. The thread's system calls are poll, read, ioctl (KVM_IRQ_LINE) and futex (for
 * the lock).
 */
#ifndef PV_INTX_H
#define PV_INTX_H

#include "types.h"

/* cffi: begin */
#define PV_INTX_EVENTS 130 /* of one card: 129 virtqueues and the configuration */

struct pv_line;
struct pv_line *pv_line_new(const int *vm_fd, uint32_t gsi);
void pv_line_pair(struct pv_line *a, struct pv_line *b);
void pv_line_free(struct pv_line *line);

struct pv_intx;
struct pv_intx *pv_intx_new(void);
void pv_intx_free(struct pv_intx *x);
void pv_intx_wire(struct pv_intx *x, struct pv_line *line);
void pv_intx_raise(struct pv_intx *x, uint8_t bits);
void pv_intx_disable(struct pv_intx *x, bool disabled);
void pv_intx_reset(struct pv_intx *x);
uint8_t pv_intx_peek(struct pv_intx *x);
uint8_t pv_intx_read(struct pv_intx *x);
void pv_intx_ack(struct pv_intx *x, uint8_t bits);
int pv_intx_start(struct pv_intx *x, const char *name, const int32_t *fds, const uint8_t *bits,
		  uint32_t count);
void pv_intx_stop(struct pv_intx *x);
/* cffi: end */

#endif
