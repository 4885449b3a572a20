/* SPDX-License-Identifier: MIT */
/*
 * Classic BPF over frames in segments: the filter of a capture at the ring.
 *
 * Theory of operation
 *
 * libpcap compiles an expression to instructions (struct sock_filter, linux/filter.h), which the
 * kernel runs for a packet socket. A capture at the ring runs the same instructions here, over the
 * guest's buffers, so that a frame that nobody wants is never copied. pv_filter_check() is called
 * once: the instructions are known, jumps go forward and stay inside, and the last instruction
 * returns. So a run ends after at most as many steps as there are instructions. What the guest
 * changes meanwhile changes the verdict on its own frame, and no more: each load is bounded.
 */
#ifndef PV_FILTER_H
#define PV_FILTER_H

#include <linux/filter.h>
#include <string.h>
#include <sys/uio.h>

#include "types.h"

/* cffi: begin */
#define PV_FILTER_MAX 4093 /* instructions: BPF_MAXINSNS, and pv_capture_filter() adds three */

bool pv_filter_check(const void *code, uint32_t count);
uint32_t pv_filter_match(const void *code, uint32_t count, const uint8_t *frame, size_t len);
/* cffi: end */
uint32_t pv_filter_run(const struct sock_filter *code, const struct iovec *iov, size_t skip,
		       size_t len);

/* Copy len bytes from an offset of segments, which are long enough. */
static inline void pv_segments_load(const struct iovec *iov, size_t at, uint8_t *to, size_t len)
{
	for (; len; iov++) {
		size_t n = iov->iov_len;

		if (at >= n) {
			at -= n;
			continue;
		}
		n = n - at < len ? n - at : len;
		memcpy(to, (const uint8_t *)iov->iov_base + at, n);
		to += n;
		len -= n;
		at = 0;
	}
}

#endif
