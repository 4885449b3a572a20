/* SPDX-License-Identifier: MIT */
/*
 * Fuzzes what a guest reaches by ports and memory without RAM, and C answers: the bus, serial port,
 * clocks, PCI address latch, kick and ISR registers, the pipes behind them, the ledger and the
 * trace, by pv_vcpu_access() as a VM exit does.
 *
 * Input: steps of 8 bytes: what, size and count, which place, offset, four bytes of data.
 */
#include "check.h"
#include "vcpu.c"

#include <fcntl.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "fuzz.h"

#define STEP	   8u
#define PIPE_SIZE  64u
#define QUEUES	   5u
#define COUNT_MAX  17u
#define CONFIG	   256u
#define COM1	   0x3f8u
#define ISR	   0xc0001000ull
#define ISR_ACK	   0xc0002060ull
#define NOTIFY	   0xc0003000ull
#define BY_VALUE   0xc0004050ull
#define TOP	   (~0ull - 15)
#define MOVING	   50u /* the id of the region that comes and goes */
#define ISR_PLACES 2u

static const uint64_t ports[] = {
	COM1, COM1 + 1, COM1 + 2, COM1 + 3, COM1 + 4, COM1 + 5, COM1 + 6, COM1 + 7, 0x600,
	0xe9, 0xcf8,	0xcf9,	  0xcfc,    0xcfd,    0xcfe,	0xcff,	  0x80,	    0x70,
	0x71, 0x608,	0x60a,	  0x510,    COM1 - 1, 0xcf7,	0xffffull};
static const uint64_t addresses[] = {ISR,	 ISR + 1,    ISR_ACK,	   ISR_ACK + 4,
				     NOTIFY,	 NOTIFY + 4, NOTIFY + 2,   NOTIFY + 16,
				     NOTIFY - 1, BY_VALUE,   BY_VALUE + 2, TOP,
				     TOP + 8,	 TOP - 1,    ~0ull,	   0xd0000000ull};

static struct pv_bus *bus;
static struct pv_vcpu *vcpu;
static struct pv_serial *serial;
static struct pv_pipe *console, *stream;
static struct pv_line *line[2];
static struct pv_intx *intx[ISR_PLACES];
static struct pv_notify by_place = {.count = QUEUES, .stride = 4};
static struct pv_notify by_value = {.count = QUEUES, .stride = 0};
static struct pv_pci_latch latch;
static struct pv_rtc rtc;
static int vm_fd = -1;
static uint32_t kicks;

static void take(struct pv_taker *t)
{
	(void)t;
	kicks++;
}

static struct pv_taker taker = {.take = take};

static void add(enum pv_space space, uint64_t base, uint64_t len, uint32_t id,
		enum pv_region_kind kind, void *opaque)
{
	CHECK(!pv_bus_add(bus, space, base, len, id, kind, opaque));
}

static void set_up(void)
{
	bus = pv_bus_new();
	vcpu = pv_vcpu_new(-1, 4096, bus);
	console = pv_pipe_new(PIPE_SIZE);
	stream = pv_pipe_new(PIPE_SIZE);
	serial = pv_serial_new(&vm_fd, 4, console);
	CHECK(bus && vcpu && console && stream && serial);
	vcpu->trace = pv_trace_new(64);
	for (int i = 0; i < 2; i++) {
		line[i] = pv_line_new(&vm_fd, 10 + (uint32_t)i);
		intx[i] = pv_intx_new();
		CHECK(line[i] && intx[i]);
	}
	pv_line_pair(line[0], line[1]);
	for (uint32_t i = 0; i < ISR_PLACES; i++)
		pv_intx_wire(intx[i], line[i]);
	for (uint32_t i = 0; i < PV_QUEUES; i++) {
		by_place.fd[i] = i < 4 ? eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC) : -1;
		by_value.fd[i] = by_place.fd[i];
	}
	latch.present = 7; /* Python answers for the first */
	for (uint32_t i = 1; i < 3; i++) {
		uint8_t *config = malloc(CONFIG);

		CHECK(config);
		memset(config, (int)i, CONFIG);
		latch.config[i] = config;
	}
	latch.live[1] = 0x30;
	add(PV_PIO, COM1, 8, 1, PV_REGION_SERIAL, serial);
	add(PV_PIO, 0x600, 1, 2, PV_REGION_STREAM, stream);
	add(PV_PIO, 0xe9, 1, 3, PV_REGION_DEBUGCON, stream);
	add(PV_PIO, 0xcf8, 8, 4, PV_REGION_PCI, &latch);
	add(PV_PIO, 0x80, 1, 5, PV_REGION_IGNORE, NULL);
	add(PV_PIO, 0x70, 2, 6, PV_REGION_RTC, &rtc);
	add(PV_PIO, 0x608, 4, 7, PV_REGION_PMTIMER, NULL);
	add(PV_PIO, 0x510, 2, 8, PV_REGION_PYTHON, NULL);
	add(PV_MMIO, ISR, 4, 9, PV_REGION_ISR, intx[0]);
	add(PV_MMIO, ISR_ACK, 8, 10, PV_REGION_ISR_ACK, intx[1]);
	add(PV_MMIO, NOTIFY, 4 * QUEUES, 11, PV_REGION_NOTIFY, &by_place);
	add(PV_MMIO, BY_VALUE, 4, 12, PV_REGION_NOTIFY_VALUE, &by_value);
	add(PV_MMIO, TOP, 16, 13, PV_REGION_IGNORE, NULL);
}

static void empty(struct pv_pipe *p)
{
	uint8_t buf[PIPE_SIZE];

	while (pv_pipe_read(p, buf, sizeof(buf), 0) > 0)
		;
}

/* One exit. A pipe gets the room that the access may need: here nobody reads meanwhile. */
static void guest_access(const uint8_t *d)
{
	bool pio = d[0] & 8, write = d[0] & 16, answered;
	uint32_t size = 1u << (d[1] & 3), count = 1 + (d[1] >> 2) % COUNT_MAX;
	uint64_t runs = vcpu->overflow + vcpu->used;
	uint8_t *buf;

	if (pio && size == 8)
		size = 4; /* the widest */
	if (!pio)
		count = 1;
	/* An allocation of its own: ASan sees a byte too far. */
	buf = malloc((size_t)size * count);
	CHECK(buf);
	for (uint32_t i = 0; i < size * count; i++)
		buf[i] = d[4 + i % 4];
	vcpu->addr = pio ? ports[d[2] % (sizeof(ports) / sizeof(ports[0]))]
			 : addresses[d[2] % (sizeof(addresses) / sizeof(addresses[0]))];
	if ((d[3] & 0xf0) == 0xf0)
		vcpu->addr += d[3] & 15;
	vcpu->size = size;
	vcpu->count = count;
	vcpu->write = write;
	vcpu->data = buf;
	vcpu->reason = pio ? KVM_EXIT_IO : KVM_EXIT_MMIO;
	vcpu->last_exit = 1;
	if (write && !pv_pipe_writable(console, size * count))
		empty(console);
	if (write && size * count <= PIPE_SIZE && !pv_pipe_writable(stream, size * count))
		empty(stream);
	pv_pipe_hurry(stream, size * count > PIPE_SIZE);
	pv_pipe_hurry(console, size * count > PIPE_SIZE);
	answered = pv_vcpu_access(vcpu, pio ? PV_PIO : PV_MMIO);
	CHECK(answered || vcpu->region);
	CHECK(vcpu->overflow + vcpu->used >= runs);
	account_time(vcpu, 2);
	pv_pipe_hurry(stream, false);
	pv_pipe_hurry(console, false);
	free(buf);
}

int LLVMFuzzerTestOneInput(const uint8_t *d, size_t n)
{
	static struct pv_exit_slot lines[PV_LEDGER_SLOTS];
	static uint32_t inputs;
	uint64_t moving = 0, length = 0;
	uint8_t buf[PIPE_SIZE];
	int got;

	if (!bus)
		set_up();
	for (; n >= STEP; d += STEP, n -= STEP) {
		uint32_t which = d[1] % ISR_PLACES;

		switch (d[0] & 7) {
		default:
			guest_access(d);
			break;
		case 4:
			got = (int)pv_serial_input(serial, d + 4, d[1] & 3);
			CHECK(got <= (d[1] & 3));
			break;
		case 5:
			got = pv_pipe_read(d[0] & 8 ? console : stream, buf, 1 + d[1] % PIPE_SIZE,
					   0);
			CHECK(got >= 0 && got <= 1 + (int)(d[1] % PIPE_SIZE));
			break;
		case 6: /* a BAR moves */
			if (length)
				CHECK(!pv_bus_remove(bus, PV_MMIO, moving, MOVING));
			moving = (d[0] & 8 ? TOP : ISR) + d[2] * 0x10ull;
			length = d[3];
			if (pv_bus_add(bus, PV_MMIO, moving, length, MOVING, PV_REGION_IGNORE,
				       NULL))
				length = 0;
			break;
		case 7:
			if (d[0] & 8)
				pv_notify_take(bus, &by_place, d[2] % QUEUES,
					       d[3] & 1 ? &taker : NULL);
			else if (d[0] & 16)
				pv_intx_disable(intx[which], d[3] & 1);
			else if (d[0] & 32)
				pv_intx_reset(intx[which]);
			else
				pv_intx_raise(intx[which], d[2] & 3);
			CHECK(pv_intx_peek(intx[which]) <= 3);
			break;
		}
	}
	if (length)
		CHECK(!pv_bus_remove(bus, PV_MMIO, moving, MOVING));
	/* The next input begins with the same. */
	pv_serial_reset(serial);
	empty(console);
	empty(stream);
	latch.address = 0;
	memset(&rtc, 0, sizeof(rtc));
	for (uint32_t i = 0; i < ISR_PLACES; i++) {
		pv_intx_disable(intx[i], false);
		pv_intx_reset(intx[i]);
	}
	for (uint32_t i = 0; i < QUEUES; i++) {
		pv_notify_take(bus, &by_place, i, NULL);
		(void)pv_event_take(by_place.fd[i]);
	}
	if (++inputs % 1024 == 0)
		CHECK(pv_vcpu_ledger(vcpu, lines, PV_LEDGER_SLOTS) == vcpu->used);
	return 0;
}
