/* SPDX-License-Identifier: MIT */
/*
 * The MC146818 clock and its CMOS RAM, as much of it as Linux reads at boot: UTC in BCD, no alarms,
 * never busy. If nothing answered, Linux' rtc_cmos would wait 10 s for "update in progress" to
 * clear. The clock is in C because a boot reads it 70 times, each time by two accesses.
 */
#ifndef PV_RTC_H
#define PV_RTC_H

#include "types.h"

/* cffi: begin */
struct pv_rtc {
	uint8_t index;	  /* the register that the guest has selected, 0..127 */
	uint8_t ram[128]; /* what the guest has stored */
};
/* cffi: end */

uint8_t pv_rtc_read(const struct pv_rtc *rtc, uint64_t offset);
void pv_rtc_write(struct pv_rtc *rtc, uint64_t offset, uint8_t value);

#endif
