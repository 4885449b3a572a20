/* SPDX-License-Identifier: MIT */
#include "pic.h"

#include <linux/kvm.h>

#include "ioctl.h"

/**
 * pv_pic_set_up() - Leave both 8259s as firmware does
 * @vm_fd:	The VM's descriptor
 * @level:	The lines that are level-triggered, as a mask: PCI's
 *
 * All lines are masked. After reset they are open and begin with vector 0, and a kernel that never
 * programs the 8259s would get the timer's tick as a divide error.
 *
 * Return: 0 or -errno
 */
int pv_pic_set_up(int vm_fd, uint32_t level)
{
	for (unsigned int chip = KVM_IRQCHIP_PIC_MASTER; chip <= KVM_IRQCHIP_PIC_SLAVE; chip++) {
		struct kvm_irqchip state = {.chip_id = chip};

		int error = pv_ioctl(vm_fd, KVM_GET_IRQCHIP, &state);

		state.chip.pic.imr = 0xff;
		state.chip.pic.elcr = (uint8_t)(chip == KVM_IRQCHIP_PIC_SLAVE ? level >> 8 : level);
		if (!error)
			error = pv_ioctl(vm_fd, KVM_SET_IRQCHIP, &state);
		if (error)
			return error;
	}
	return 0;
}
