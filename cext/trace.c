/* SPDX-License-Identifier: MIT */
#include "trace.h"

#include <stdlib.h>

/**
 * pv_trace_new() - Make a ring
 * @size:	Events that it holds, a power of two
 *
 * Return: the ring, to be freed by pv_trace_free(); NULL if @size is no power of two or memory is
 * short
 */
struct pv_trace *pv_trace_new(uint32_t size)
{
	struct pv_trace *t;

	if (!size || size & (size - 1))
		return NULL;
	t = calloc(1, sizeof(*t));
	if (!t)
		return NULL;
	t->event = calloc(size, sizeof(*t->event));
	t->mask = size - 1;
	if (!t->event) {
		free(t);
		return NULL;
	}
	return t;
}

/**
 * pv_trace_free() - Free a ring
 * @t:		From pv_trace_new(), or NULL; nobody writes it any more
 */
void pv_trace_free(struct pv_trace *t)
{
	if (!t)
		return;
	free(t->event);
	free(t);
}
