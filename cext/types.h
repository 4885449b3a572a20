/* SPDX-License-Identifier: MIT */
/* Types that all of cext shares. */
#ifndef PV_TYPES_H
#define PV_TYPES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

/* cffi: begin */
#define PV_MEM_REGIONS 64

/* One range of guest RAM: guest-physical [gpa, gpa + size) is mapped at host. */
struct pv_mem_region {
	uint64_t gpa;
	uint64_t size;
	uint8_t *host;
	uint64_t offset; /* the position in the memfd */
};

/*
 * Guest memory as C sees it. Python (pyvmm.memory) fills it in before any thread reads it, and
 * never changes it afterwards. GuestMemory owns it and outlives every user.
 */
struct pv_memory {
	uint32_t count;
	struct pv_mem_region region[PV_MEM_REGIONS];
};

struct pv_taker;
/* cffi: end */

/*
 * Takes the kicks of one virtqueue in the thread of the vCPU that kicks. The call is bounded and
 * never waits for Python; several vCPUs may call at once.
 */
struct pv_taker {
	void (*take)(struct pv_taker *t);
};

/*
 * The host address of the guest range [gpa, gpa + len); NULL if the range is not inside one region.
 * Both ends are checked, and so is overflow (CVE-2018-1059). len may be 0.
 */
static inline uint8_t *pv_mem_host(const struct pv_memory *mem, uint64_t gpa, uint64_t len)
{
	for (uint32_t i = 0; i < mem->count; i++) {
		const struct pv_mem_region *r = &mem->region[i];

		if (gpa >= r->gpa && gpa - r->gpa < r->size)
			return len <= r->size - (gpa - r->gpa) ? r->host + (gpa - r->gpa) : NULL;
	}
	return NULL;
}

/* Find the guest-physical address of what lies at host. False if that is no guest RAM. */
static inline bool pv_mem_gpa(const struct pv_memory *mem, const void *host, uint64_t *gpa)
{
	for (uint32_t i = 0; i < mem->count; i++) {
		const struct pv_mem_region *r = &mem->region[i];
		uint64_t at = (uint64_t)((uintptr_t)host - (uintptr_t)r->host);

		if (at < r->size) {
			*gpa = r->gpa + at;
			return true;
		}
	}
	return false;
}

static inline uint64_t pv_ns(const struct timespec *t)
{
	return (uint64_t)t->tv_sec * 1000000000u + (uint64_t)t->tv_nsec;
}

/* CLOCK_MONOTONIC in nanoseconds. */
static inline uint64_t pv_now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return pv_ns(&t);
}

#endif
