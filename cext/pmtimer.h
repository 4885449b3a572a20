/* SPDX-License-Identifier: MIT */
/*
 * The ACPI power management timer (ACPI 6.4, 4.8.2.1): 32 bits that count at 3.579545 MHz. Kernels
 * that do without kvm-clock find the frequency of the TSC by it. It is in C because they read it in
 * a loop.
 */
#ifndef PV_PMTIMER_H
#define PV_PMTIMER_H

#include "types.h"

uint32_t pv_pmtimer_read(void);

#endif
