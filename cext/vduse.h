/* SPDX-License-Identifier: MIT */
/*
 * Interrupts of a VDUSE device (linux/vduse.h). A worker signals the call eventfd of a ring; the
 * kernel wants an ioctl instead, which a thread in C (relay.h) makes.
 */
#ifndef PV_VDUSE_H
#define PV_VDUSE_H

#include "types.h"

/* cffi: begin */
#define PV_VDUSE_RINGS 64

struct pv_vduse_calls;
struct pv_vduse_calls *pv_vduse_calls_new(int fd, const char *name, const int32_t *fds,
					  uint32_t count, int *error);
void pv_vduse_calls_free(struct pv_vduse_calls *c);
/* cffi: end */

#endif
