/* SPDX-License-Identifier: MIT */
/* The two 8259 interrupt controllers, which are in the kernel (KVM_CREATE_IRQCHIP). */
#ifndef PV_PIC_H
#define PV_PIC_H

#include "types.h"

/* cffi: begin */
int pv_pic_set_up(int vm_fd, uint32_t level);
/* cffi: end */

#endif
