/* SPDX-License-Identifier: MIT */
#include "bpf.h"

#include <errno.h>
#include <linux/bpf.h>
#include <sys/syscall.h>
#include <unistd.h>

/**
 * pv_bpf_load() - BPF_PROG_LOAD of a socket filter
 * @code:	Instructions, struct bpf_insn each
 * @count:	How many
 *
 * Return: a descriptor of the program, close-on-exec, owned by the caller; -errno
 */
int pv_bpf_load(const void *code, uint32_t count)
{
	union bpf_attr attr = {0};
	long ret;

	attr.prog_type = BPF_PROG_TYPE_SOCKET_FILTER;
	attr.insns = (uintptr_t)code;
	attr.insn_cnt = count;
	attr.license = (uintptr_t) "Dual MIT/GPL";
	ret = syscall(SYS_bpf, BPF_PROG_LOAD, &attr, sizeof(attr));
	return ret < 0 ? -errno : (int)ret;
}
