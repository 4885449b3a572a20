/* SPDX-License-Identifier: MIT */
/*
 * The KVM_RUN loop of one vCPU and its exit ledger.
 *
 * Theory of operation: a Python thread calls pv_vcpu_run(), which releases the interpreter lock and
 * enters the guest again and again. Each return of KVM_RUN is counted here, by reason and, for port
 * and memory accesses, by address, size, direction and region, with the time until the guest runs
 * again. Accesses that a region in C answers never leave this loop; the others return to Python
 * with the access described in the struct; Python fills in the data and calls again.
 *
 * The ledger is written by the owning thread only. Others may read it at any time: counters are
 * single aligned words, so a reader sees each one either before or after an exit.
 */
#ifndef PV_VCPU_H
#define PV_VCPU_H

#include <pthread.h>
#include "bus.h"
#include "trace.h"
#include "types.h"

/* cffi: begin */
#define PV_LEDGER_SLOTS 4096

/* Beyond KVM's own reasons (linux/kvm.h, KVM_EXIT_*): KVM_RUN returned an error. */
#define PV_EXIT_ERROR 1000

/* One line of the ledger. A slot is used once count is not 0. */
struct pv_exit_slot {
	uint64_t addr;	 /* port or guest-physical address; for other reasons KVM's suberror */
	uint64_t count;	 /* returns of KVM_RUN */
	uint64_t time;	 /* nanoseconds from the return to the next entry */
	uint64_t units;	 /* accesses: more than count for string instructions */
	uint32_t reason; /* KVM_EXIT_* or PV_EXIT_ERROR */
	uint32_t region; /* id of the bus region, 0: nobody's */
	uint32_t reg;	 /* which of its registers, see pv_bus_register() */
	uint16_t size;	 /* bytes of one access */
	uint8_t write;
};

enum pv_stop {
	PV_STOP_ASKED, /* pv_vcpu_kick() */
	PV_STOP_PIO,   /* access: fill in or consume data, then run again */
	PV_STOP_MMIO,  /* likewise */
	PV_STOP_OTHER, /* reason says which KVM_EXIT_* */
	PV_STOP_ERROR  /* KVM_RUN failed, error is the errno */
};

struct pv_vcpu_private;

struct pv_vcpu {
	int fd; /* lent */
	int error;
	uint32_t reason;
	/* The access of PV_STOP_PIO and PV_STOP_MMIO. */
	uint64_t addr;
	uint32_t region;
	uint32_t size;	/* of one element, bytes */
	uint32_t count; /* elements; more than 1 for string instructions */
	bool write;
	uint8_t *data; /* size * count bytes */
	/* Details of other reasons. */
	uint32_t detail; /* suberror, system event type, ... */
	uint64_t info[8];
	uint32_t info_count;
	/* The ledger. */
	uint64_t runs;		/* returns of KVM_RUN */
	uint64_t overflow;	/* returns that found no free slot */
	uint64_t overflow_time; /* nanoseconds */
	uint64_t first_run;	/* CLOCK_MONOTONIC, nanoseconds; 0 before */
	uint64_t first_exit;
	uint64_t last_exit; /* time of the latest return; with runs it tells whether the guest makes
			     * progress
			     */
	uint32_t used;	    /* slots with a key, by used_slot in the order of their first exit */
	uint16_t used_slot[PV_LEDGER_SLOTS];
	struct pv_exit_slot slot[PV_LEDGER_SLOTS];
	struct pv_trace *trace; /* lent, set before the first run; NULL: no trace */
	/* Private to vcpu.c. */
	struct pv_vcpu_private *priv;
};

/* Install the signal handler that gets a thread out of KVM_RUN; once a process. */
int pv_vcpu_init(void);
struct pv_vcpu *pv_vcpu_new(int fd, size_t run_size, struct pv_bus *bus);
/* Point at another KVM vCPU (machine reset); the ledger stays. Returns 0 or -errno. */
int pv_vcpu_attach(struct pv_vcpu *v, int fd, size_t run_size);
void pv_vcpu_free(struct pv_vcpu *v);
/* Run the guest until Python is needed. Called by the vCPU's one owning thread. */
enum pv_stop pv_vcpu_run(struct pv_vcpu *v);
/*
 * The machine has ended, or is about to start over: the latest exit's time ends here. By the owning
 * thread.
 */
void pv_vcpu_settle(struct pv_vcpu *v);
/*
 * What pv_vcpu_run() does with an access (addr, size, count, write and data of v are set): count
 * it, and answer it if a region in C or nobody is there. Returns false where Python must. In the
 * interface so that devices can be tried without KVM.
 */
bool pv_vcpu_access(struct pv_vcpu *v, enum pv_space space);
/*
 * Copy the ledger's lines, at most max (v->used says how many there are now). Any thread, and cheap
 * enough for one that holds a vCPU up. Returns the count; each line is whole to within one exit.
 */
uint32_t pv_vcpu_ledger(const struct pv_vcpu *v, struct pv_exit_slot *out, uint32_t max);
/* Any thread: make pv_vcpu_run() return PV_STOP_ASKED soon, also if it is called only later. */
void pv_vcpu_kick(struct pv_vcpu *v);
int pv_ioctl(int fd, unsigned long request, void *arg);
/* cffi: end */

#endif
