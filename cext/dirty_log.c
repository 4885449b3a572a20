/* SPDX-License-Identifier: MIT */
#include "dirty_log.h"

/**
 * pv_dirty_mark() - Mark the pages of a range that has been written
 * @log:	The log
 * @addr:	Guest-physical address, or any other that the front-end has named; any value
 * @len:	Bytes; a range that wraps round ends at the last address
 */
void pv_dirty_mark(struct pv_dirty_log *log, uint64_t addr, uint64_t len)
{
	uint64_t end = addr + (len - 1) < addr ? UINT64_MAX : addr + (len - 1);
	uint64_t page = addr >> PV_DIRTY_PAGE_SHIFT, last = end >> PV_DIRTY_PAGE_SHIFT;

	if (!len)
		return;
	log->marked = true;
	for (; page <= last; page++) {
		if (page / 8 >= log->size) {
			__atomic_store_n(&log->missed, log->missed + (last - page + 1),
					 __ATOMIC_RELAXED);
			return;
		}
		/*
		 * Release: who sees the mark sees what was written. That the bit is set already is
		 * no reason to leave this out: it may be cleared, and the page read, before our
		 * write is visible.
		 */
		__atomic_fetch_or(&log->bits[page / 8], (uint8_t)(1u << page % 8),
				  __ATOMIC_RELEASE);
	}
}

/**
 * pv_dirty_mark_host() - Mark the pages of a buffer that has been written
 * @log:	The log
 * @mem:	Guest memory
 * @host:	Where the buffer is mapped; within one region of @mem
 * @len:	Bytes
 */
void pv_dirty_mark_host(struct pv_dirty_log *log, const struct pv_memory *mem, const void *host,
			uint64_t len)
{
	uint64_t gpa;

	if (pv_mem_gpa(mem, host, &gpa))
		pv_dirty_mark(log, gpa, len);
}
