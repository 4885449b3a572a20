/* SPDX-License-Identifier: MIT */
/*
 * What vCPUs share without Python (bus, serial port, pipe, kick and ISR registers, ledger), for
 * ThreadSanitizer: race_bus SECONDS. Two threads play vCPUs; others read the pipe, type, move a BAR,
 * raise interrupts, and read ledgers and counters.
 */
#include "check.h"
#include "vcpu.c"

#include <stdio.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define COM1   0x3f8u
#define ISR    0xc0001000u
#define NOTIFY 0xc0003000u
#define MOVING 0xd0000000u
#define QUEUES 4u
#define PAGE   4096u

static const uint64_t ports[] = {COM1,	COM1 + 1, COM1 + 2, COM1 + 3, COM1 + 4, COM1 + 5, COM1 + 6,
				 0xcf8, 0xcfc,	  0xe9,	    COM1,     0x70,	0x71,	  0x608};
static struct pv_bus *bus;
static struct pv_vcpu *vcpus[2];
static struct pv_serial *serial;
static struct pv_pipe *tty;
static struct pv_line *line;
static struct pv_intx *intx;
static struct pv_notify kicks = {.count = QUEUES, .stride = 4};
static struct pv_pci_latch latch = {.present = 1};
static struct pv_rtc rtc;
static uint8_t config[256];
static int vm_fd = -1;
static bool over_now; /* atomic */
static uint64_t exits;

static bool over(void)
{
	return __atomic_load_n(&over_now, __ATOMIC_RELAXED);
}

static void *vcpu(void *arg)
{
	struct pv_vcpu *v = arg;
	uint32_t state = v == vcpus[0] ? 1 : 2;
	uint64_t count = 0;
	uint8_t data[8];

	for (; !over(); count++) {
		bool pio;

		state = state * 1103515245u + 12345u;
		pio = state >> 20 & 1;
		v->addr = pio ? ports[(state >> 8) % (sizeof(ports) / sizeof(ports[0]))]
			  : state >> 9 & 1 ? ISR
					   : NOTIFY + (state >> 10 & 3) * 4;
		v->size = !pio || v->addr == 0xcf8 || v->addr == 0x608 ? 4 : 1;
		v->count = 1;
		v->write = state >> 16 & 1;
		memset(data, (int)(state >> 28), sizeof(data));
		if (v->addr == 0xcf8) {
			uint32_t address = 0x80000000u | (state >> 4 & 3) << 11;

			memcpy(data, &address, sizeof(address));
		}
		v->data = data;
		v->reason = pio ? KVM_EXIT_IO : KVM_EXIT_MMIO;
		v->last_exit = pv_now_ns();
		(void)pv_vcpu_access(v, pio ? PV_PIO : PV_MMIO);
		account_time(v, pv_now_ns());
	}
	__atomic_fetch_add(&exits, count, __ATOMIC_RELAXED);
	return NULL;
}

static void *reader(void *arg)
{
	uint8_t buf[256];

	(void)arg;
	while (pv_pipe_read(tty, buf, sizeof(buf), 10) >= 0)
		;
	return NULL;
}

static void *mover(void *arg)
{
	(void)arg;
	while (!over()) {
		CHECK(!pv_bus_add(bus, PV_MMIO, MOVING, PAGE, 50, PV_REGION_IGNORE, NULL));
		CHECK(!pv_bus_remove(bus, PV_MMIO, MOVING, 50));
		usleep(10);
	}
	return NULL;
}

static void *typist(void *arg)
{
	(void)arg;
	while (!over()) {
		pv_serial_input(serial, (const uint8_t *)"abc", 3);
		pv_intx_raise(intx, 1);
		pv_intx_disable(intx, false);
		(void)pv_pipe_dropped(tty);
		(void)pv_pipe_total(tty);
		(void)pv_serial_edges(serial);
		usleep(10);
	}
	return NULL;
}

static void *accountant(void *arg)
{
	struct pv_exit_slot *out = calloc(PV_LEDGER_SLOTS, sizeof(*out));

	(void)arg;
	CHECK(out);
	while (!over()) {
		for (int i = 0; i < 2; i++)
			(void)pv_vcpu_ledger(vcpus[i], out, PV_LEDGER_SLOTS);
		usleep(100);
	}
	free(out);
	return NULL;
}

static void add(enum pv_space space, uint64_t base, uint64_t len, uint32_t id,
		enum pv_region_kind kind, void *opaque)
{
	CHECK(!pv_bus_add(bus, space, base, len, id, kind, opaque));
}

int main(int argc, char **argv)
{
	void *(*const all[])(void *) = {vcpu, vcpu, reader, mover, typist, accountant};
	uint64_t end = pv_now_ns() + (argc > 1 ? strtoull(argv[1], NULL, 10) : 5) * 1000000000u;
	pthread_t thread[6];

	bus = pv_bus_new();
	tty = pv_pipe_new(256);
	serial = pv_serial_new(&vm_fd, 4, tty);
	line = pv_line_new(&vm_fd, 10);
	intx = pv_intx_new();
	CHECK(bus && tty && serial && line && intx);
	pv_intx_wire(intx, line);
	for (int i = 0; i < 2; i++) {
		vcpus[i] = pv_vcpu_new(-1, PAGE, bus);
		CHECK(vcpus[i]);
	}
	for (uint32_t i = 0; i < PV_QUEUES; i++)
		kicks.fd[i] = i < QUEUES ? eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC) : -1;
	latch.config[0] = config;
	add(PV_PIO, COM1, 8, 1, PV_REGION_SERIAL, serial);
	add(PV_PIO, 0xe9, 1, 3, PV_REGION_DEBUGCON, tty);
	add(PV_PIO, 0xcf8, 8, 4, PV_REGION_PCI, &latch);
	add(PV_PIO, 0x70, 2, 6, PV_REGION_RTC, &rtc);
	add(PV_PIO, 0x608, 4, 7, PV_REGION_PMTIMER, NULL);
	add(PV_MMIO, ISR, 4, 8, PV_REGION_ISR, intx);
	add(PV_MMIO, NOTIFY, 4 * QUEUES, 9, PV_REGION_NOTIFY, &kicks);
	for (int i = 0; i < 6; i++)
		CHECK(!pthread_create(&thread[i], NULL, all[i], i < 2 ? vcpus[i] : NULL));
	while (pv_now_ns() < end)
		usleep(1000);
	__atomic_store_n(&over_now, true, __ATOMIC_RELAXED);
	pv_pipe_close(tty); /* ends the reader, and vCPUs that wait for it */
	for (int i = 0; i < 6; i++)
		pthread_join(thread[i], NULL);
	printf("%s: %llu exits, %llu bytes, no race\n", argv[0], (unsigned long long)exits,
	       (unsigned long long)pv_pipe_total(tty));
	for (int i = 0; i < 2; i++)
		pv_vcpu_free(vcpus[i]);
	pv_serial_free(serial);
	pv_pipe_free(tty);
	pv_intx_reset(intx);
	pv_intx_free(intx);
	pv_line_free(line);
	pv_bus_free(bus);
	for (uint32_t i = 0; i < QUEUES; i++)
		close(kicks.fd[i]);
	return 0;
}
