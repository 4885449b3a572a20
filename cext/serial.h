/* SPDX-License-Identifier: MIT */
/*
 * A 16550A UART as Linux' 8250 driver expects it: with FIFOs, loop-back and interrupts by priority.
 * The names of registers and bits are those of National's PC16550D data sheet, section 8.
 *
 * It is in C because every byte on the console is a VM exit. The transmitter writes to a pv_pipe.
 * While the pipe has no room for a whole FIFO, the transmitter reads as busy, because a driver that
 * has seen THRE writes 16 bytes without looking again. So a flood of output slows the guest down
 * and loses nothing. A vCPU that writes to a busy transmitter waits in this access until the pipe
 * has room (pipe.h).
 */
#ifndef PV_SERIAL_H
#define PV_SERIAL_H

#include "pipe.h"
#include "types.h"

/* cffi: begin */
struct pv_serial;
struct pv_serial *pv_serial_new(const int *vm_fd, uint32_t gsi, struct pv_pipe *tx);
void pv_serial_free(struct pv_serial *s);
void pv_serial_reset(struct pv_serial *s);
uint64_t pv_serial_edges(struct pv_serial *s);
uint32_t pv_serial_input(struct pv_serial *s, const uint8_t *buf, uint32_t len);
/* cffi: end */

uint8_t pv_serial_in(struct pv_serial *s, uint32_t offset);
void pv_serial_out(struct pv_serial *s, uint32_t offset, uint8_t value);
bool pv_serial_dlab(struct pv_serial *s);

#endif
