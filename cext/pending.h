/* SPDX-License-Identifier: MIT */
/*
 * An ioctl that a thread of its own makes, because the kernel waits in it, and the caller has other
 * work meanwhile.
 */
#ifndef PV_PENDING_H
#define PV_PENDING_H

/* cffi: begin */
struct pv_pending;
struct pv_pending *pv_ioctl_begin(int fd, unsigned long request, void *arg);
int pv_ioctl_end(struct pv_pending *p);
/* cffi: end */

#endif
