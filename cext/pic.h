/* SPDX-License-Identifier: MIT */
/*
 * The two 8259 interrupt controllers and the timer, which are in the kernel (KVM_CREATE_IRQCHIP,
 * KVM_CREATE_PIT2).
 */
#ifndef PV_PIC_H
#define PV_PIC_H

#include "types.h"

/* cffi: begin */
int pv_pic_set_up(int vm_fd, uint32_t level);
int pv_pic_as_bios(int vm_fd);
/* cffi: end */

#endif
