/* SPDX-License-Identifier: MIT */
#include "vcpu.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <linux/kvm.h>

#include "event.h"
#include "ioctl.h"

#ifndef KVM_EXIT_MEMORY_FAULT /* Linux 6.8 */
#define KVM_EXIT_MEMORY_FAULT 39
#endif

struct pv_vcpu_private {
	struct kvm_run *run;
	size_t run_size;
	struct pv_bus *bus;
	bool stop;		      /* atomic: somebody wants pv_vcpu_run() to return */
	bool in_run;		      /* thread is in pv_vcpu_run() and may be signalled */
	bool inside;		      /* atomic: thread is in KVM_RUN */
	bool unaccounted;	      /* the latest exit's time is still running */
	bool interrupted;	      /* by a signal; it may have stopped the process for long */
	struct pv_exit_slot *current; /* the latest exit's slot; NULL if the ledger was full */
	struct pv_exit_slot latest;   /* while tracing, the key of the latest exit */
	pthread_t thread;
	pthread_mutex_t lock; /* protects run, stop, in_run and thread from pv_vcpu_kick() */
};

/**
 * pv_vcpu_init() - Install the signal handler that gets a thread out of KVM_RUN
 *
 * One call per process is enough; more do no harm.
 *
 * Return: 0 or -errno
 */
int pv_vcpu_init(void)
{
	return pv_interrupt_init();
}

/**
 * pv_vcpu_new() - Make the run loop's state for a KVM vCPU
 * @fd:		The vCPU's descriptor; lent
 * @run_size:	KVM_GET_VCPU_MMAP_SIZE
 * @bus:	The bus that accesses go to; lent
 *
 * Return: the new object, to be freed by pv_vcpu_free(), or NULL
 */
struct pv_vcpu *pv_vcpu_new(int fd, size_t run_size, struct pv_bus *bus)
{
	struct pv_vcpu *v = calloc(1, sizeof(*v));

	if (!v)
		return NULL;
	v->priv = calloc(1, sizeof(*v->priv));
	if (!v->priv) {
		free(v);
		return NULL;
	}
	v->priv->bus = bus;
	pthread_mutex_init(&v->priv->lock, NULL);
	if (pv_vcpu_attach(v, fd, run_size)) {
		pv_vcpu_free(v);
		return NULL;
	}
	return v;
}

/**
 * pv_vcpu_attach() - Use another KVM vCPU, after a machine reset
 * @v:		No thread is in pv_vcpu_run()
 * @fd:		The vCPU's descriptor, lent; -1 to let go of the present one only
 * @run_size:	KVM_GET_VCPU_MMAP_SIZE
 *
 * The ledger stays.
 *
 * Return: 0 or -errno
 */
int pv_vcpu_attach(struct pv_vcpu *v, int fd, size_t run_size)
{
	struct pv_vcpu_private *p = v->priv;
	void *run = NULL;

	if (fd >= 0) {
		run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (run == MAP_FAILED)
			return -errno;
	}
	pthread_mutex_lock(&p->lock);
	if (p->run)
		munmap(p->run, p->run_size);
	p->run = run;
	p->run_size = run_size;
	v->fd = fd;
	p->stop = false;
	pthread_mutex_unlock(&p->lock);
	return 0;
}

/**
 * pv_vcpu_free() - Free the run loop's state
 * @v:		From pv_vcpu_new(), or NULL; no thread is in pv_vcpu_run()
 */
void pv_vcpu_free(struct pv_vcpu *v)
{
	if (!v)
		return;
	if (v->priv->run)
		munmap(v->priv->run, v->priv->run_size);
	pthread_mutex_destroy(&v->priv->lock);
	free(v->priv);
	free(v);
}

/* --- ledger ----------------------------------------------------------------------------------- */

static struct pv_exit_slot *find_slot(struct pv_vcpu *v, const struct pv_exit_slot *key)
{
	uint64_t h =
		((key->addr * 31 + key->reg) * 31 + key->reason * 7 + key->size * 3 + key->write) *
		0x9e3779b97f4a7c15u;

	for (uint32_t i = 0; i < PV_LEDGER_SLOTS; i++) {
		uint32_t at = (uint32_t)((h >> 40) + i) % PV_LEDGER_SLOTS;
		struct pv_exit_slot *s = &v->slot[at];

		if (!s->count) {
			/*
			 * A concurrent reader ignores the slot as long as its count is 0.
			 */
			*s = *key;
			v->used_slot[v->used] = (uint16_t)at;
			__atomic_store_n(&v->used, v->used + 1, __ATOMIC_RELEASE);
			return s;
		}
		if (s->addr == key->addr && s->reason == key->reason && s->size == key->size &&
		    s->write == key->write && s->region == key->region && s->reg == key->reg)
			return s;
		/*
		 * Bound the search: a hostile guest may exit at ever new addresses.
		 */
		if (i == 32)
			break;
	}
	return NULL;
}

static void account(struct pv_vcpu *v, const struct pv_exit_slot *key, uint32_t units)
{
	struct pv_exit_slot *s = find_slot(v, key);

	v->priv->current = s;
	v->priv->unaccounted = true;
	if (v->trace)
		v->priv->latest = *key;
	if (!s) {
		__atomic_store_n(&v->overflow, v->overflow + 1, __ATOMIC_RELAXED);
		return;
	}
	__atomic_store_n(&s->units, s->units + units, __ATOMIC_RELAXED);
	__atomic_store_n(&s->count, s->count + 1, __ATOMIC_RELEASE);
}

/* Put the latest exit into the trace. By now the value that the guest reads is known, too. */
static void trace_exit(struct pv_vcpu *v, uint64_t now)
{
	const struct pv_exit_slot *key = &v->priv->latest;
	struct pv_trace_event e = {
		.kind = PV_TRACE_EXIT,
		.ts = v->last_exit,
		.dur = now - v->last_exit,
		.addr = key->addr,
		.reason = key->reason,
		.region = key->region,
		.reg = key->reg,
		.count = 1,
		.size = key->size,
		.write = key->write,
	};

	if (key->reason == KVM_EXIT_IO || key->reason == KVM_EXIT_MMIO) {
		e.count = v->count;
		memcpy(&e.value, v->data, v->size < sizeof(e.value) ? v->size : sizeof(e.value));
	}
	pv_trace_put(v->trace, &e);
}

/* End the latest exit's time: the guest is about to run again, or the machine ends. */
static void account_time(struct pv_vcpu *v, uint64_t now)
{
	struct pv_vcpu_private *p = v->priv;

	if (!p->unaccounted)
		return;
	p->unaccounted = false;
	if (v->trace)
		trace_exit(v, now);
	if (p->current)
		__atomic_store_n(&p->current->time, p->current->time + now - v->last_exit,
				 __ATOMIC_RELAXED);
	else
		__atomic_store_n(&v->overflow_time, v->overflow_time + now - v->last_exit,
				 __ATOMIC_RELAXED);
}

/**
 * pv_vcpu_ledger() - Copy the lines of the ledger
 * @v:		The vCPU; it may run meanwhile
 * @out:	Gets the lines, in the order of their first exits
 * @max:	Entries of @out; v->used tells how many lines there are now
 *
 * Any thread may call this. It is quick enough for a thread that holds up a vCPU. While the vCPU
 * runs, each line may lack its latest exit.
 *
 * Return: the number of lines copied
 */
uint32_t pv_vcpu_ledger(const struct pv_vcpu *v, struct pv_exit_slot *out, uint32_t max)
{
	uint32_t used = __atomic_load_n(&v->used, __ATOMIC_ACQUIRE), n = 0;

	for (uint32_t i = 0; i < used && n < max; i++) {
		const struct pv_exit_slot *s = &v->slot[v->used_slot[i]];

		/* What names the line does not change; the counters do, meanwhile. */
		out[n] = (struct pv_exit_slot){
			.addr = s->addr,
			.count = __atomic_load_n(&s->count, __ATOMIC_ACQUIRE),
			.time = __atomic_load_n(&s->time, __ATOMIC_RELAXED),
			.units = __atomic_load_n(&s->units, __ATOMIC_RELAXED),
			.reason = s->reason,
			.region = s->region,
			.reg = s->reg,
			.size = s->size,
			.write = s->write,
		};
		if (out[n].count)
			n++;
	}
	return n;
}

/* --- exits ------------------------------------------------------------------------------------ */

/**
 * pv_vcpu_access() - Count an access and answer it in C if possible
 * @v:		addr, size, count, write and data describe the access
 * @space:	PV_PIO or PV_MMIO
 *
 * pv_vcpu_run() uses this. It is public so that devices can be tested without KVM.
 *
 * Return: true if a region in C, or no region, has answered; false if Python must answer
 */
bool pv_vcpu_access(struct pv_vcpu *v, enum pv_space space)
{
	struct pv_bus_region r = {0};
	bool found = pv_bus_find(v->priv->bus, space, v->addr, v->size, &r);
	struct pv_exit_slot key = {
		.addr = v->addr,
		.reason = space == PV_PIO ? KVM_EXIT_IO : KVM_EXIT_MMIO,
		.region = r.id,
		.size = (uint16_t)v->size,
		.write = v->write,
	};

	v->region = r.id;
	if (found)
		key.reg = pv_bus_register(&r, v->addr, v->write, v->data, v->size);
	account(v, &key, v->count);
	if (!found) {
		if (!v->write)
			memset(v->data, 0xff, (size_t)v->size * v->count);
		return true;
	}
	if ((r.kind == PV_REGION_STREAM || r.kind == PV_REGION_DEBUGCON) && v->write) {
		/* One call takes a whole string. */
		pv_pipe_write(r.opaque, v->data, v->size * v->count, -1);
		return true;
	}
	for (uint32_t i = 0; i < v->count && found; i++)
		found = pv_bus_access(&r, v->addr, v->write, v->data + i * v->size, v->size);
	pv_bus_put(v->priv->bus, &r);
	return found;
}

static enum pv_stop other_exit(struct pv_vcpu *v, const struct kvm_run *run)
{
	struct pv_exit_slot key = {.reason = run->exit_reason};

	v->detail = 0;
	v->info_count = 0;
	switch (run->exit_reason) {
	case KVM_EXIT_INTERNAL_ERROR:
		v->detail = run->internal.suberror;
		v->info_count = run->internal.ndata < 8 ? run->internal.ndata : 8;
		memcpy(v->info, run->internal.data, v->info_count * sizeof(v->info[0]));
		break;
	case KVM_EXIT_FAIL_ENTRY:
		v->info[0] = run->fail_entry.hardware_entry_failure_reason;
		v->info_count = 1;
		break;
	case KVM_EXIT_UNKNOWN:
		v->info[0] = run->hw.hardware_exit_reason;
		v->info_count = 1;
		break;
	case KVM_EXIT_SYSTEM_EVENT:
		v->detail = run->system_event.type;
		break;
	}
	key.addr = v->detail;
	account(v, &key, 1);
	return PV_STOP_OTHER;
}

/* Handle one return of KVM_RUN. Returns true to run again, else sets *stop. */
static bool handle_exit(struct pv_vcpu *v, enum pv_stop *stop)
{
	struct kvm_run *run = v->priv->run;

	v->reason = run->exit_reason;
	switch (run->exit_reason) {
	case KVM_EXIT_IO:
		v->addr = run->io.port;
		v->size = run->io.size;
		v->count = run->io.count;
		v->write = run->io.direction == KVM_EXIT_IO_OUT;
		v->data = (uint8_t *)run + run->io.data_offset;
		*stop = PV_STOP_PIO;
		return pv_vcpu_access(v, PV_PIO);
	case KVM_EXIT_MMIO:
		v->addr = run->mmio.phys_addr;
		v->size = run->mmio.len;
		v->count = 1;
		v->write = run->mmio.is_write;
		v->data = run->mmio.data;
		*stop = PV_STOP_MMIO;
		return pv_vcpu_access(v, PV_MMIO);
	default:
		*stop = other_exit(v, run);
		return false;
	}
}

/* Handle an error of KVM_RUN. Returns true to run again, else sets *stop. */
static bool handle_error(struct pv_vcpu *v, int error, enum pv_stop *stop)
{
	struct pv_exit_slot key = {.reason = PV_EXIT_ERROR, .addr = (uint64_t)error};

	if (error == EINTR || error == EAGAIN) {
		v->priv->interrupted = error == EINTR;
		key = (struct pv_exit_slot){.reason = KVM_EXIT_INTR};
		account(v, &key, 1);
		return true;
	}
	account(v, &key, 1);
	v->error = error;
	v->info_count = 0;
	if (v->priv->run->exit_reason == KVM_EXIT_MEMORY_FAULT) {
		/* kvm_run.memory_fault: flags, gpa, size. Older headers do not have its name. */
		v->info_count = 3;
		memcpy(v->info, v->priv->run->padding, 3 * sizeof(v->info[0]));
	}
	*stop = PV_STOP_ERROR;
	return false;
}

/*
 * Take back a request to stop; returns whether there was one. This needs the lock: a kick sets both
 * stop and immediate_exit, and if one of them were left behind alone, KVM_RUN would return for ever
 * without anybody knowing why.
 */
static bool take_stop(struct pv_vcpu_private *p)
{
	bool stop;

	pthread_mutex_lock(&p->lock);
	stop = p->stop;
	p->stop = false;
	if (stop)
		p->run->immediate_exit = 0;
	pthread_mutex_unlock(&p->lock);
	return stop;
}

/*
 * Tell the guest that the vCPU was kept out of it, so that its watchdogs do not bark. KVM refuses
 * with EINVAL if the guest has no kvmclock; then nobody can be told.
 */
static void tell_of_pause(struct pv_vcpu *v)
{
	(void)pv_ioctl(v->fd, KVM_KVMCLOCK_CTRL, NULL);
}

/**
 * pv_vcpu_rested() - Note that the machine goes on after a pause
 * @v:		The vCPU, whose thread calls this
 *
 * The time of the pause does not count as the latest exit's, and the guest learns of the pause.
 */
void pv_vcpu_rested(struct pv_vcpu *v)
{
	v->last_exit = pv_now_ns();
	tell_of_pause(v);
}

/**
 * pv_vcpu_run() - Run the guest until Python is needed
 * @v:		The vCPU
 *
 * Only one thread at a time may call this.
 *
 * Return: why it has stopped
 */
enum pv_stop pv_vcpu_run(struct pv_vcpu *v)
{
	struct pv_vcpu_private *p = v->priv;
	enum pv_stop stop = PV_STOP_ASKED;
	bool again = true;

	pthread_mutex_lock(&p->lock);
	p->thread = pthread_self();
	p->in_run = true;
	pthread_mutex_unlock(&p->lock);
	while (again) {
		uint64_t now = pv_now_ns();
		int ret;

		if (p->unaccounted && (p->interrupted || now - v->last_exit > PV_LONG_EXIT))
			tell_of_pause(v);
		p->interrupted = false;
		account_time(v, now);
		/*
		 * Do not stop before KVM_RUN: with immediate_exit, KVM completes the access of the
		 * latest exit without entering the guest, so that the registers are up to date.
		 */
		if (__atomic_load_n(&p->stop, __ATOMIC_ACQUIRE))
			p->run->immediate_exit = 1;
		if (!v->first_run)
			v->first_run = now;
		__atomic_store_n(&p->inside, true, __ATOMIC_RELAXED);
		ret = ioctl(v->fd, KVM_RUN, 0);
		__atomic_store_n(&p->inside, false, __ATOMIC_RELEASE);
		v->last_exit = pv_now_ns();
		if (!v->first_exit)
			v->first_exit = v->last_exit;
		__atomic_store_n(&v->runs, v->runs + 1, __ATOMIC_RELAXED);
		again = ret ? handle_error(v, errno, &stop) : handle_exit(v, &stop);
		if (ret && again && take_stop(p)) {
			/*
			 * Our own signal says nothing of a pause. To tell the guest of one at each
			 * look of the hang watch would keep its watchdogs silent for ever.
			 */
			p->interrupted = false;
			stop = PV_STOP_ASKED;
			again = false;
		}
	}
	pthread_mutex_lock(&p->lock);
	p->in_run = false;
	pthread_mutex_unlock(&p->lock);
	return stop;
}

/**
 * pv_vcpu_inside() - Whether the vCPU may be in the guest now
 * @v:		The vCPU
 *
 * Any thread may call this. After pv_vcpu_kick(), a vCPU that is not in the guest does not execute
 * an instruction of the guest before pv_vcpu_run() has returned.
 */
bool pv_vcpu_inside(const struct pv_vcpu *v)
{
	return __atomic_load_n(&v->priv->inside, __ATOMIC_ACQUIRE);
}

/**
 * pv_vcpu_settle() - End the latest exit's time here
 * @v:		The vCPU, whose thread calls this
 *
 * For a machine that has ended or is about to be reset.
 */
void pv_vcpu_settle(struct pv_vcpu *v)
{
	account_time(v, pv_now_ns());
}

/**
 * pv_vcpu_kick() - Make pv_vcpu_run() return PV_STOP_ASKED soon
 * @v:		The vCPU
 *
 * Any thread may call this. If no thread is in pv_vcpu_run() now, the next call of it returns.
 */
void pv_vcpu_kick(struct pv_vcpu *v)
{
	struct pv_vcpu_private *p = v->priv;

	pthread_mutex_lock(&p->lock);
	__atomic_store_n(&p->stop, true, __ATOMIC_RELEASE);
	/*
	 * immediate_exit is meant to be written by another thread: it closes the gap between the
	 * check of stop and the entry into the guest (Documentation/virt/kvm/api.rst, section 5).
	 */
	if (p->run)
		p->run->immediate_exit = 1;
	if (p->in_run)
		pv_interrupt(p->thread);
	pthread_mutex_unlock(&p->lock);
}
