/* SPDX-License-Identifier: MIT */
/*
 * A thread, or the whole process, that gives up what it does not need.
 *
 * Theory of operation
 *
 * A hostile guest attacks first what reads its memory: the worker. A thread that pv_thread.c makes
 * with a list of system calls can make no others from its gate on (seccomp; PR_SET_NO_NEW_PRIVS, of
 * this thread alone). The first other one does not happen: the kernel sends SIGSYS instead, whose
 * handler notes the call, tells the thread's owner, and parks the thread for good. It does not end
 * the process: the owner has a machine to end in order, and a terminal to give back.
 *
 * A process that has opened all that it needs, such as our own vhost-user back-end, can be confined
 * as a whole: no capabilities, no files, no sockets, no programs (Landlock, seccomp). What it may
 * not do kills it with SIGSYS, which its parent reports. The lists are in confine.c.
 *
 * A VMM gives up the same once its machine is made, but for files and devices that its command line
 * names; and so does `pyvmm backend`, without any file. A thread that asks for more is stopped like
 * a worker, the owner has some seconds to end the machine in order, and then the handler itself
 * says what happened and ends the process.
 */
#ifndef PV_CONFINE_H
#define PV_CONFINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

int pv_confine_init(void);
int pv_confine_signal(void);
int pv_confine_thread(const uint16_t *calls, size_t count, void (*stopped)(int call));

/* cffi: begin */
/* What pv_confine_process() has put into force. */
enum pv_confined { PV_CONFINED_FILES = 1, PV_CONFINED_CALLS = 2 };

int pv_confine_process(const uint32_t *ioctls, size_t count);
int pv_confine_network(const char *readable);
int pv_follow_parent(int32_t parent);
int pv_adopt_orphans(void);
int pv_become_user(uint32_t uid, uint32_t gid);
int pv_be_seen(bool seen);
int pv_enter_root(const char *root);
int pv_confine_program(uint64_t keep);
const char *pv_call_name(int call);
int pv_landlock_abi(void);
bool pv_has_seccomp(void);
int pv_confine_machine(const char *const *files, size_t file_count, const char *const *devices,
		       size_t device_count, uint64_t keep, int event, int status, int patience);
int pv_confine_backend(int event, int status, int patience);
int pv_confine_vcpu(void);
int pv_machine_stopped(char *thread);
void pv_machine_hold(bool held);
int pv_spawn_sibling(char *const *argv, const int *from, const int *to, size_t count);
/* cffi: end */

#endif
