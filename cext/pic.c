/* SPDX-License-Identifier: MIT */
#include "pic.h"

#include <stdbool.h>

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

/**
 * pv_pic_as_bios() - Leave 8259s and timer as a PC's BIOS leaves them for a boot sector
 * @vm_fd:	The VM's descriptor, after pv_pic_set_up()
 *
 * The vectors begin at 8 and 0x70, the timer's line and the cascade are open, and the timer ticks
 * at 18.2 Hz: mode 2, count 65536, which the chip knows as 0.
 *
 * Return: 0 or -errno
 */
int pv_pic_as_bios(int vm_fd)
{
	struct kvm_pit_state2 pit;
	int error;

	for (unsigned int chip = KVM_IRQCHIP_PIC_MASTER; chip <= KVM_IRQCHIP_PIC_SLAVE; chip++) {
		bool slave = chip == KVM_IRQCHIP_PIC_SLAVE;
		struct kvm_irqchip state = {.chip_id = chip};

		error = pv_ioctl(vm_fd, KVM_GET_IRQCHIP, &state);
		state.chip.pic.irq_base = slave ? 0x70 : 8;
		state.chip.pic.imr = slave ? 0xff : (uint8_t) ~(1 << 0 | 1 << 2);
		state.chip.pic.init4 = 1;
		if (!error)
			error = pv_ioctl(vm_fd, KVM_SET_IRQCHIP, &state);
		if (error)
			return error;
	}
	error = pv_ioctl(vm_fd, KVM_GET_PIT2, &pit);
	if (error)
		return error;
	pit.channels[0].mode = 2;
	pit.channels[0].rw_mode = pit.channels[0].read_state = pit.channels[0].write_state = 3;
	pit.channels[0].gate = 1;
	pit.channels[0].count = 0;
	return pv_ioctl(vm_fd, KVM_SET_PIT2, &pit);
}
