/* SPDX-License-Identifier: MIT */
#include "cable.h"

#include <stdlib.h>
#include <string.h>

#include "event.h"

_Static_assert(PV_CABLE_BYTES % sizeof(struct pv_frame_head) == 0, "a mark to skip always fits");

struct pv_cable {
	struct pv_frames *queue[2];
	struct pv_cable_end end[2];
};

/**
 * pv_cable_new() - Make a cable
 * @bell:	Non-blocking eventfd of end 0, to which 1 is added when its worker is to be woken;
 *		lent until pv_cable_free()
 * @far_bell:	Likewise of end 1; negative: there is no such end, and frames come back
 *
 * Return: the cable; NULL if there is no memory
 */
struct pv_cable *pv_cable_new(int bell, int far_bell)
{
	struct pv_cable *c = calloc(1, sizeof(*c));
	int count = far_bell < 0 ? 1 : 2;

	if (!c)
		return NULL;
	for (int i = 0; i < count; i++) {
		c->queue[i] = aligned_alloc(PV_CABLE_LINE, sizeof(*c->queue[i]));
		if (!c->queue[i]) {
			pv_cable_free(c);
			return NULL;
		}
		memset(c->queue[i], 0, sizeof(*c->queue[i]));
	}
	for (int i = 0; i < count; i++)
		c->end[i] = (struct pv_cable_end){.in = c->queue[i],
						  .out = c->queue[count - 1 - i],
						  .far_bell = count == 1 || i ? bell : far_bell,
						  .loop = count == 1};
	return c;
}

/**
 * pv_cable_free() - Release a cable
 * @c:		No worker uses it; may be NULL
 */
void pv_cable_free(struct pv_cable *c)
{
	if (!c)
		return;
	for (int i = 0; i < 2; i++)
		free(c->queue[i]);
	free(c);
}

/**
 * pv_cable_end() - One end of a cable
 * @c:		The cable
 * @end:	0, or 1 if it has two
 *
 * Return: the end, valid until pv_cable_free()
 */
struct pv_cable_end *pv_cable_end(struct pv_cable *c, int end)
{
	return &c->end[end];
}

/**
 * pv_cable_ring() - Wake the worker at the far end
 * @end:	The near one
 */
void pv_cable_ring(const struct pv_cable_end *end)
{
	pv_event_signal(end->far_bell);
}

/**
 * pv_cable_send() - Send one frame
 * @end:	No worker uses this end now
 * @frame:	The frame, without a virtio-net header
 * @len:	Its bytes
 *
 * Return: false if there is no room, or the frame is too long
 */
bool pv_cable_send(struct pv_cable_end *end, const uint8_t *frame, uint32_t len)
{
	uint8_t *to = len <= PV_CABLE_FRAME_MAX ? pv_frames_put(end->out, len) : NULL;

	if (!to)
		return false;
	memcpy(to, frame, len);
	if (pv_frames_publish(end->out))
		pv_cable_ring(end);
	return true;
}
