/* SPDX-License-Identifier: MIT */
#include "pmtimer.h"

#define HZ     3579545ull
#define SECOND 1000000000ull

/**
 * pv_pmtimer_read() - Read the timer
 *
 * Return: ticks since the host's boot, modulo 2^32
 */
uint32_t pv_pmtimer_read(void)
{
	uint64_t now = pv_now_ns();

	return (uint32_t)(now / SECOND * HZ + now % SECOND * HZ / SECOND);
}
