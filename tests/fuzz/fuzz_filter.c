/* SPDX-License-Identifier: MIT */
/*
 * Fuzzes the filter of captures (cext/filter.h). Input: the number of instructions (1 byte), where
 * the frame is cut (2), bytes before it (1), the instructions (8 each), the frame.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "filter.h"
#include "fuzz.h"

#define HEAD 4

/* An allocation of its own: ASan sees a byte too far. */
static void *copy(const uint8_t *data, size_t size)
{
	void *made = malloc(size ? size : 1);

	if (made && size)
		memcpy(made, data, size);
	return made;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint32_t count, pieces, whole;
	size_t bytes, skip, cut[2];
	struct iovec iov[3];
	void *code, *frame;

	if (size < HEAD)
		return 0;
	count = data[0];
	bytes = count * sizeof(struct sock_filter);
	if (size - HEAD < bytes)
		return 0;
	code = copy(data + HEAD, bytes);
	size -= HEAD + bytes;
	/* Three segments, of which some may be empty; the frame begins behind skip bytes. */
	cut[0] = size ? data[1] % (size + 1) : 0;
	cut[1] = cut[0] + data[2] % (size - cut[0] + 1);
	skip = data[3] % (size + 1);
	data += HEAD + bytes;
	iov[0].iov_len = cut[0];
	iov[1].iov_len = cut[1] - cut[0];
	iov[2].iov_len = size - cut[1];
	iov[0].iov_base = copy(data, iov[0].iov_len);
	iov[1].iov_base = copy(data + cut[0], iov[1].iov_len);
	iov[2].iov_base = copy(data + cut[1], iov[2].iov_len);
	frame = copy(data + skip, size - skip);
	if (pv_filter_check(code, count)) {
		pieces = pv_filter_run(code, iov, skip, size - skip);
		whole = pv_filter_match(code, count, frame, size - skip);
		if (pieces != whole) { /* how the frame lies makes no difference */
			fprintf(stderr, "in pieces %u, whole %u\n", pieces, whole);
			abort();
		}
	}
	for (int i = 0; i < 3; i++)
		free(iov[i].iov_base);
	free(frame);
	free(code);
	return 0;
}
