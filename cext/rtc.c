/* SPDX-License-Identifier: MIT */
#include "rtc.h"

#include <time.h>

/* Registers of the data sheet, table 3, and the century where the ACPI FADT has it. */
enum { SECONDS = 0, MINUTES = 2, HOURS = 4, WEEKDAY = 6, DAY, MONTH, YEAR, A, B, C, D };
#define CENTURY 0x32

#define REG_A 0x26 /* 32.768 kHz, a rate of 1024 Hz, no update in progress */
#define REG_B 0x02 /* BCD, 24 hours */
#define REG_D 0x80 /* the battery is good */

static uint8_t bcd(int value)
{
	return (uint8_t)(value / 10 << 4 | value % 10);
}

/**
 * pv_rtc_read() - Answer a read of one of the two ports.
 * @rtc: the clock
 * @offset: 0 is the index port, which reads as ones; 1 is the data port
 *
 * Several vCPUs may use the clock at the same time, so the bytes are read atomically. A guest that
 * selects on one vCPU and reads on another has to lock, as on a real machine.
 */
uint8_t pv_rtc_read(const struct pv_rtc *rtc, uint64_t offset)
{
	uint8_t index = __atomic_load_n(&rtc->index, __ATOMIC_RELAXED);
	time_t now = time(NULL);
	struct tm t;

	if (offset == 0)
		return 0xff;
	gmtime_r(&now, &t);
	switch (index) {
	case SECONDS:
		return bcd(t.tm_sec);
	case MINUTES:
		return bcd(t.tm_min);
	case HOURS:
		return bcd(t.tm_hour);
	case WEEKDAY: /* Sunday is 1 */
		return bcd(t.tm_wday + 1);
	case DAY:
		return bcd(t.tm_mday);
	case MONTH:
		return bcd(t.tm_mon + 1);
	case YEAR:
		return bcd(t.tm_year % 100);
	case CENTURY:
		return bcd((t.tm_year + 1900) / 100);
	case A:
		return REG_A;
	case B:
		return REG_B;
	case C:
		return 0;
	case D:
		return REG_D;
	}
	return __atomic_load_n(&rtc->ram[index], __ATOMIC_RELAXED);
}

/**
 * pv_rtc_write() - Take a write to one of the two ports.
 * @rtc: the clock
 * @offset: 0 selects a register (bit 7 masks the NMI, which nothing raises); 1 stores into CMOS RAM
 * @value: the byte
 *
 * The clock cannot be set: what is stored at its registers is never read.
 */
void pv_rtc_write(struct pv_rtc *rtc, uint64_t offset, uint8_t value)
{
	if (offset == 0)
		__atomic_store_n(&rtc->index, value & 0x7f, __ATOMIC_RELAXED);
	else
		__atomic_store_n(&rtc->ram[__atomic_load_n(&rtc->index, __ATOMIC_RELAXED)], value,
				 __ATOMIC_RELAXED);
}
