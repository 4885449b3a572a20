/* SPDX-License-Identifier: MIT */
#include "vduse.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <linux/vduse.h>

#include "ioctl.h"
#include "relay.h"

struct pv_vduse_calls {
	int fd;
	struct pv_relay relay;
};

static void inject(void *arg, uint32_t ring)
{
	struct pv_vduse_calls *c = arg;

	/* The kernel refuses while the driver resets the device: nobody waits for it then. */
	pv_ioctl(c->fd, VDUSE_VQ_INJECT_IRQ, &ring);
}

/**
 * pv_vduse_calls_new() - Start to interrupt a driver
 * @fd:		/dev/vduse/NAME, lent
 * @name:	The thread's name, which the system shows
 * @fds:	fds[i] is the call eventfd of ring i, lent
 * @count:	How many rings, at most PV_VDUSE_RINGS
 * @error:	-errno on failure
 *
 * Return: to be freed by pv_vduse_calls_free(); NULL on failure
 */
struct pv_vduse_calls *pv_vduse_calls_new(int fd, const char *name, const int32_t *fds,
					  uint32_t count, int *error)
{
	struct pv_vduse_calls *c = calloc(1, sizeof(*c));

	*error = -ENOMEM;
	if (!c)
		return NULL;
	c->fd = fd;
	*error = count > PV_VDUSE_RINGS ? -EINVAL
					: pv_relay_start(&c->relay, name, fds, count, inject, c);
	if (*error) {
		free(c);
		return NULL;
	}
	return c;
}

/**
 * pv_vduse_calls_free() - End the thread
 * @c:		From pv_vduse_calls_new(); NULL: nothing happens
 */
void pv_vduse_calls_free(struct pv_vduse_calls *c)
{
	if (!c)
		return;
	pv_relay_stop(&c->relay);
	free(c);
}
