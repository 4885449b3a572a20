/* SPDX-License-Identifier: MIT */
/*
 * The log of a live migration: which pages of guest memory the device has written.
 *
 * Theory of operation
 *
 * A front-end that migrates its guest copies memory while the guest runs, and copies again what was
 * written meanwhile. What the guest writes it sees itself; what we write, we have to mark, in a
 * bitmap that it shares with us (vhost-user, Migration): bit n stands for the page of 4 KiB at the
 * guest-physical address n * 4096.
 *
 * The front-end reads and clears the bitmap first, and then reads the page. So a page is marked
 * after each write, never before: a mark that comes before its write may be cleared, and the page
 * read, in between. Several devices mark pages in the same bitmap, so marks are atomic.
 *
 * The front-end is not trusted. It may change the bitmap at any time, but nothing is read from it.
 * A page for which the bitmap has no bit is counted and not marked.
 */
#ifndef PV_DIRTY_LOG_H
#define PV_DIRTY_LOG_H

#include "types.h"

/* cffi: begin */
#define PV_DIRTY_PAGE_SHIFT 12 /* VHOST_LOG_PAGE is 4096 */

/* One thread owns the structure, and several may share the bitmap. */
struct pv_dirty_log {
	uint8_t *bits;	 /* lent */
	uint64_t size;	 /* bytes */
	uint64_t missed; /* pages that have no bit */
	bool marked;	 /* something was marked; for the owner to reset */
};

void pv_dirty_mark(struct pv_dirty_log *log, uint64_t addr, uint64_t len);
/* cffi: end */

void pv_dirty_mark_host(struct pv_dirty_log *log, const struct pv_memory *mem, const void *host,
			uint64_t len);

#endif
