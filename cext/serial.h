/* SPDX-License-Identifier: MIT */
/*
 * A 16550A UART as Linux' 8250 driver expects it: FIFOs, loop-back, interrupts by priority.
 *
 * In C because a console byte is a VM exit of its own. Transmit goes to a pv_pipe; while that has
 * no room for a whole FIFO the transmitter reads as busy, so a flood slows the guest down and loses
 * nothing (a driver that has seen THRE writes 16 bytes without looking again). Who writes to a busy
 * transmitter waits in that access until there is room (pipe.h). Register names: National PC16550D
 * data sheet, section 8.
 */
#ifndef PV_SERIAL_H
#define PV_SERIAL_H

#include "pipe.h"
#include "types.h"

/* cffi: begin */
struct pv_serial;
/*
 * vm_fd: the address of the VM's descriptor (it is replaced at a machine reset); gsi: interrupt
 * line, edge; tx: borrowed, outlives the port.
 */
struct pv_serial *pv_serial_new(const int *vm_fd, uint32_t gsi, struct pv_pipe *tx);
void pv_serial_free(struct pv_serial *s);
void pv_serial_reset(struct pv_serial *s);
/* How often the interrupt line has risen. */
uint64_t pv_serial_edges(struct pv_serial *s);
/*
 * Type len bytes at the guest; returns how many fitted in the receive queue (1024 bytes), never
 * blocks.
 */
uint32_t pv_serial_input(struct pv_serial *s, const uint8_t *buf, uint32_t len);
/* cffi: end */

uint8_t pv_serial_in(struct pv_serial *s, uint32_t offset);
void pv_serial_out(struct pv_serial *s, uint32_t offset, uint8_t value);
/* Whether offsets 0 and 1 are the divisor latch now. */
bool pv_serial_dlab(struct pv_serial *s);

#endif
