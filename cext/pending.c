/* SPDX-License-Identifier: MIT */
#include "pending.h"

#include <stdlib.h>

#include "ioctl.h"
#include "thread.h"

struct pv_pending {
	struct pv_thread thread;
	int fd;
	unsigned long request;
	void *arg;
	int result;
};

static void make(void *arg)
{
	struct pv_pending *p = arg;

	p->result = pv_ioctl(p->fd, p->request, p->arg);
}

/**
 * pv_ioctl_begin() - Have a thread make an ioctl
 * @fd:		Descriptor, which stays open until pv_ioctl_end()
 * @request:	Number of the request
 * @arg:	Its argument; if this is a pointer, the structure is lent until then
 *
 * If there can be no thread, the ioctl is made now.
 *
 * Return: for pv_ioctl_end(); NULL: no memory, and no ioctl
 */
struct pv_pending *pv_ioctl_begin(int fd, unsigned long request, void *arg)
{
	struct pv_pending *p = calloc(1, sizeof(*p));

	if (!p)
		return NULL;
	p->fd = fd;
	p->request = request;
	p->arg = arg;
	if (pv_thread_start(&p->thread, "ioctl", -1, make, p))
		make(p);
	else
		pv_thread_go(&p->thread);
	return p;
}

/**
 * pv_ioctl_end() - Wait for the end of an ioctl
 * @p:		From pv_ioctl_begin(), which this frees
 *
 * Return: as from pv_ioctl()
 */
int pv_ioctl_end(struct pv_pending *p)
{
	int result;

	pv_thread_join(&p->thread);
	result = p->result;
	free(p);
	return result;
}
