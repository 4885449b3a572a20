/* SPDX-License-Identifier: MIT */
/* ioctl(2) that a signal does not interrupt. All of ours but KVM_RUN go this way. */
#ifndef PV_IOCTL_H
#define PV_IOCTL_H

/* cffi: begin */
int pv_ioctl(int fd, unsigned long request, void *arg);
/* cffi: end */

#endif
