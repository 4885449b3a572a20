/* SPDX-License-Identifier: MIT */
/*
 * The MC146818 clock and its CMOS RAM: UTC in BCD, with an alarm. The clock is in C because a boot
 * reads it 70 times, each time by two accesses. The alarm is in Python (devices/rtc.py).
 */
#ifndef PV_RTC_H
#define PV_RTC_H

#include "types.h"

/* cffi: begin */
struct pv_rtc {
	uint8_t index;	  /* the register that the guest has selected, 0..127 */
	uint8_t ram[128]; /* what the guest has stored */
	uint8_t flags;	  /* register C: the interrupts that have come since it was read */
};
/* cffi: end */

uint8_t pv_rtc_read(struct pv_rtc *rtc, uint64_t offset);
bool pv_rtc_write(struct pv_rtc *rtc, uint64_t offset, uint8_t value);

#endif
