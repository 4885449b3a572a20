/* SPDX-License-Identifier: MIT */
/* The two 8259 interrupt controllers, which are in the kernel (KVM_CREATE_IRQCHIP). */
#ifndef PV_PIC_H
#define PV_PIC_H

/* cffi: begin */
int pv_pic_mask(int vm_fd);
/* cffi: end */

#endif
