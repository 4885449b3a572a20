/* SPDX-License-Identifier: MIT */
#include "rtc.h"

#include <time.h>

/* Registers of the data sheet, table 3, and the century where the ACPI FADT has it. */
enum {
	SECONDS,
	ALARM_SECONDS,
	MINUTES,
	ALARM_MINUTES,
	HOURS,
	ALARM_HOURS,
	WEEKDAY,
	DAY,
	MONTH,
	YEAR,
	A,
	B,
	C,
	D
};
#define CENTURY 0x32

#define REG_A	  0x26 /* 32.768 kHz, a rate of 1024 Hz */
#define REG_A_UIP 0x80 /* update in progress */
#define REG_B	  0x02 /* BCD, 24 hours */
#define REG_B_AIE 0x20 /* the alarm interrupts */
#define REG_D	  0x80 /* the battery is good */

/* The chip updates its registers for 1984 us, and says so from 244 us before on (figure 10). */
#define UPDATE_NS ((244 + 1984) * 1000)

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
uint8_t pv_rtc_read(struct pv_rtc *rtc, uint64_t offset)
{
	uint8_t index = __atomic_load_n(&rtc->index, __ATOMIC_RELAXED);
	struct timespec now;
	struct tm t;

	if (offset == 0)
		return 0xff;
	clock_gettime(CLOCK_REALTIME, &now);
	gmtime_r(&now.tv_sec, &t);
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
		return now.tv_nsec >= 1000000000 - UPDATE_NS ? REG_A | REG_A_UIP : REG_A;
	case B:
		return REG_B | (__atomic_load_n(&rtc->ram[B], __ATOMIC_RELAXED) & REG_B_AIE);
	case C:
		return __atomic_exchange_n(&rtc->flags, 0, __ATOMIC_RELAXED);
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
 *
 * Return: false if the write may change the alarm, so that Python has to look
 */
bool pv_rtc_write(struct pv_rtc *rtc, uint64_t offset, uint8_t value)
{
	uint8_t index, old;

	if (offset == 0) {
		__atomic_store_n(&rtc->index, value & 0x7f, __ATOMIC_RELAXED);
		return true;
	}
	index = __atomic_load_n(&rtc->index, __ATOMIC_RELAXED);
	old = __atomic_exchange_n(&rtc->ram[index], value, __ATOMIC_RELAXED);
	if (index == B)
		return !((old ^ value) & REG_B_AIE);
	return index > HOURS + 1 || !(index & 1) ||
	       !(__atomic_load_n(&rtc->ram[B], __ATOMIC_RELAXED) & REG_B_AIE);
}
