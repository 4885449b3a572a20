/* SPDX-License-Identifier: MIT */
#include "pic.h"

#include <linux/kvm.h>

#include "ioctl.h"

/**
 * pv_pic_mask() - Mask all lines of both 8259s, as firmware leaves them
 * @vm_fd:	The VM's descriptor
 *
 * After reset all lines are open and begin with vector 0. A kernel that never programs the 8259s
 * would get the timer's tick as a divide error.
 *
 * Return: 0 or -errno
 */
int pv_pic_mask(int vm_fd)
{
	for (unsigned int chip = KVM_IRQCHIP_PIC_MASTER; chip <= KVM_IRQCHIP_PIC_SLAVE; chip++) {
		struct kvm_irqchip state = {.chip_id = chip};

		int error = pv_ioctl(vm_fd, KVM_GET_IRQCHIP, &state);

		state.chip.pic.imr = 0xff;
		if (!error)
			error = pv_ioctl(vm_fd, KVM_SET_IRQCHIP, &state);
		if (error)
			return error;
	}
	return 0;
}
