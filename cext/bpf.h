/* SPDX-License-Identifier: MIT */
/* bpf(2): programs that look at packets (BPF_PROG_TYPE_SOCKET_FILTER). */
#ifndef PV_BPF_H
#define PV_BPF_H

#include <stdint.h>

/* cffi: begin */
int pv_bpf_load(const void *code, uint32_t count);
/* cffi: end */

#endif
