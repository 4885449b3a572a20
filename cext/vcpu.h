/* SPDX-License-Identifier: MIT */
/*
 * The KVM_RUN loop of one vCPU and its exit ledger.
 *
 * Theory of operation
 *
 * A Python thread calls pv_vcpu_run(), which releases the interpreter lock and enters the guest
 * again and again. Each return of KVM_RUN is counted by its reason and, for accesses to ports and
 * memory, by address, size, direction and region. The time until the guest runs again is added up
 * with it. An access that a region in C answers never leaves this loop. For any other access,
 * pv_vcpu_run() describes the access in struct pv_vcpu and returns to Python, which fills in the
 * data and calls again.
 *
 * While a vCPU is kept out of the guest, the guest's clock goes on. A watchdog in the guest cannot
 * tell that from a CPU that is stuck, so KVM is told to set a flag in the vCPU's clock
 * (KVM_KVMCLOCK_CTRL), at which Linux restarts its watchdogs: after a pause of the machine, after a
 * long exit, and after a signal that nobody here has sent, such as SIGSTOP and SIGCONT.
 *
 * Only the owning thread writes the ledger. Other threads may read it at any time: each counter is
 * one aligned word, so a reader sees the counter either before or after an exit.
 */
#ifndef PV_VCPU_H
#define PV_VCPU_H

#include <pthread.h>
#include "bus.h"
#include "trace.h"
#include "types.h"

/* cffi: begin */
#define PV_LEDGER_SLOTS 4096

/*
 * A vCPU that nanoseconds later than this enters the guest again has been kept out of it: a device
 * could not write its output, or somebody paused the process.
 */
#define PV_LONG_EXIT 1000000000

/* A reason besides KVM's own (linux/kvm.h, KVM_EXIT_*): KVM_RUN has returned an error. */
#define PV_EXIT_ERROR 1000

/* One line of the ledger. A slot is used once count is not 0. */
struct pv_exit_slot {
	uint64_t addr;	 /* port or guest-physical address; for other reasons KVM's suberror */
	uint64_t count;	 /* returns of KVM_RUN */
	uint64_t time;	 /* nanoseconds from the return to the next entry */
	uint64_t units;	 /* accesses; one exit of a string instruction has several */
	uint32_t reason; /* KVM_EXIT_* or PV_EXIT_ERROR */
	uint32_t region; /* id of the bus region; 0 if no region is there */
	uint32_t reg;	 /* the register of that region, see pv_bus_register() */
	uint16_t size;	 /* bytes per access */
	uint8_t write;	 /* 1 if the guest writes */
};

/* Why pv_vcpu_run() has returned. */
enum pv_stop {
	PV_STOP_ASKED, /* somebody has called pv_vcpu_kick() */
	PV_STOP_PIO,   /* the guest accesses a port: use or fill in data, then run again */
	PV_STOP_MMIO,  /* the guest accesses memory without RAM: likewise */
	PV_STOP_OTHER, /* KVM_RUN has returned another reason, which is in reason */
	PV_STOP_ERROR  /* KVM_RUN has failed; error is the errno */
};

struct pv_vcpu_private;

struct pv_vcpu {
	int fd; /* lent */
	int error;
	uint32_t reason;
	/* The access of PV_STOP_PIO and PV_STOP_MMIO. */
	uint64_t addr;
	uint32_t region;
	uint32_t size;	/* bytes per element */
	uint32_t count; /* elements; a string instruction has several */
	bool write;
	uint8_t *data; /* size * count bytes */
	/* Details of other reasons. */
	uint32_t detail;  /* the suberror or the type of the system event */
	uint64_t info[8]; /* of an error: flags, address and size of a memory fault, if KVM told */
	uint32_t info_count;
	/* The ledger. */
	uint64_t runs;		/* returns of KVM_RUN */
	uint64_t overflow;	/* returns that found no free slot */
	uint64_t overflow_time; /* nanoseconds of those returns */
	/* Times of the first run, the first return and the latest return: CLOCK_MONOTONIC in ns. */
	uint64_t first_run; /* 0 before the first run */
	uint64_t first_exit;
	uint64_t last_exit;
	uint32_t used; /* the number of used slots */
	/* The indices of the used slots, in the order of their first exits. */
	uint16_t used_slot[PV_LEDGER_SLOTS];
	struct pv_exit_slot slot[PV_LEDGER_SLOTS];
	struct pv_trace *trace; /* lent, set before the first run; NULL without a trace */
	/* Private to vcpu.c. */
	struct pv_vcpu_private *priv;
};

int pv_vcpu_init(void);
struct pv_vcpu *pv_vcpu_new(int fd, size_t run_size, struct pv_bus *bus);
int pv_vcpu_attach(struct pv_vcpu *v, int fd, size_t run_size);
void pv_vcpu_free(struct pv_vcpu *v);
enum pv_stop pv_vcpu_run(struct pv_vcpu *v);
bool pv_vcpu_inside(const struct pv_vcpu *v);
void pv_vcpu_settle(struct pv_vcpu *v);
void pv_vcpu_rested(struct pv_vcpu *v);
bool pv_vcpu_access(struct pv_vcpu *v, enum pv_space space);
uint32_t pv_vcpu_ledger(const struct pv_vcpu *v, struct pv_exit_slot *out, uint32_t max);
void pv_vcpu_kick(struct pv_vcpu *v);
/* cffi: end */

#endif
