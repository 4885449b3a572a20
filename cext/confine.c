/* SPDX-License-Identifier: MIT */
#include "confine.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <malloc.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CALLS_MAX  64
#define IOCTLS_MAX 16
/* The filter's instructions that are neither a call's nor the last. */
#define HEAD 4

/* Landlock's newer scopes, which the headers of Linux 6.1 lack. */
#define LANDLOCK_NET	(1ull << 0 | 1ull << 1) /* bind and connect TCP; ABI 4 */
#define LANDLOCK_SCOPED (1ull << 0 | 1ull << 1) /* abstract sockets, signals; ABI 6 */
struct landlock_rules {
	uint64_t fs;
	uint64_t net;
	uint64_t scoped;
};

/*
 * Without this model, the C library would allocate memory for the variable in each thread, and free
 * it when the thread ends, which takes calls that it may not make.
 */
static __thread __attribute__((tls_model("initial-exec"))) void (*thread_stopped)(int call);

/* A confined thread has asked for a call that it may not make: it ends here. */
static void on_violation(int sig, siginfo_t *info, void *context)
{
	(void)context;
	if (!thread_stopped) { /* not ours: as without this handler */
		signal(sig, SIG_DFL);
		raise(sig);
		return;
	}
	thread_stopped(info->si_syscall);
	for (;;)
		poll(NULL, 0, -1);
}

/**
 * pv_confine_init() - Install the handler of SIGSYS
 *
 * One call per process is enough; more do no harm. No thread that is to be confined may block the
 * signal.
 *
 * Return: 0 or -errno
 */
int pv_confine_init(void)
{
	struct sigaction sa = {.sa_sigaction = on_violation, .sa_flags = SA_SIGINFO};

	return sigaction(SIGSYS, &sa, NULL) ? -errno : 0;
}

static struct sock_filter load(uint32_t offset)
{
	return (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offset);
}

static struct sock_filter answer(uint32_t action)
{
	return (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, action);
}

static struct sock_filter unless(uint32_t value, uint8_t skip)
{
	return (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, skip);
}

/* Allow a call if the lower half of its first argument passes a test. */
static size_t allow_if(struct sock_filter *f, size_t n, uint32_t call, uint16_t test,
		       uint32_t value)
{
	f[n++] = unless(call, 4);
	f[n++] = load(offsetof(struct seccomp_data, args[0]));
	f[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | test | BPF_K, value, 0, 1);
	f[n++] = answer(SECCOMP_RET_ALLOW);
	f[n++] = answer(SECCOMP_RET_KILL_PROCESS);
	return n;
}

/* Allow calls; the number is in the accumulator. */
static size_t allow_calls(struct sock_filter *f, size_t n, const uint16_t *calls, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		f[n++] = unless(calls[i], 1);
		f[n++] = answer(SECCOMP_RET_ALLOW);
	}
	return n;
}

/* Begin a filter: calls of another kind of program are no calls at all. */
static size_t filter_head(struct sock_filter *f)
{
	f[0] = load(offsetof(struct seccomp_data, arch));
	f[1] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0);
	f[2] = answer(SECCOMP_RET_KILL_PROCESS);
	f[3] = load(offsetof(struct seccomp_data, nr));
	return HEAD;
}

static int filter_install(struct sock_filter *f, size_t len, uint32_t flags)
{
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
	/* The sanitizer's runtime makes calls of its own, in any thread. */
	(void)f, (void)len, (void)flags;
	return -ENOSYS;
#else
	struct sock_fprog prog = {.len = (uint16_t)len, .filter = f};

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return -errno;
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &prog) ? -errno : 0;
#endif
}

/**
 * pv_confine_thread() - Leave this thread these system calls alone, for good
 * @calls:	Their numbers; those that the handler of SIGSYS needs are added
 * @count:	How many
 * @stopped:	Called in the thread with the number of a call that it may not make; may make the
 *		allowed calls only, and returns: the thread stays where it is
 *
 * Return: 0; -errno if this kernel has no such filters: then the thread is as before
 */
int pv_confine_thread(const uint16_t *calls, size_t count, void (*stopped)(int call))
{
	struct sock_filter f[HEAD + 2 * (CALLS_MAX + 2) + 1];
	size_t n = filter_head(f);
	int error;

	if (count > CALLS_MAX)
		return -E2BIG;
	n = allow_calls(f, n, calls, count);
	f[n++] = unless(SYS_poll, 1);
	f[n++] = answer(SECCOMP_RET_ALLOW);
	/* A stop (SIGSTOP) interrupts poll and the like, and this goes on with them. */
	f[n++] = unless(SYS_restart_syscall, 1);
	f[n++] = answer(SECCOMP_RET_ALLOW);
	f[n++] = answer(SECCOMP_RET_TRAP);
	thread_stopped = stopped;
	error = filter_install(f, n, 0);
	if (error)
		thread_stopped = NULL;
	return error;
}

/*
 * What a Python program needs that serves sessions on descriptors which it has or is given: threads,
 * memory, time, and no path but those of links: of /proc/self/fd, which tells what a descriptor is.
 */
/* clang-format off */
static const uint16_t process_calls[] = {
	/* descriptors */
	SYS_read, SYS_write, SYS_readv, SYS_writev, SYS_preadv2, SYS_close, SYS_fstat, SYS_fstatfs,
	SYS_lseek, SYS_ftruncate, SYS_fcntl, SYS_dup, SYS_poll, SYS_ppoll, SYS_epoll_create1,
	SYS_epoll_ctl, SYS_epoll_wait, SYS_epoll_pwait2, SYS_eventfd2, SYS_memfd_create, SYS_readlink,
	/* sockets that are there */
	SYS_sendmsg, SYS_recvmsg, SYS_sendto, SYS_recvfrom, SYS_shutdown, SYS_getsockopt,
	SYS_setsockopt, SYS_getsockname, SYS_getpeername,
	/* memory */
	SYS_mmap, SYS_munmap, SYS_mprotect, SYS_mremap, SYS_madvise, SYS_brk,
	/* threads, signals, time */
	SYS_set_robust_list, SYS_rseq, SYS_futex, SYS_gettid, SYS_getpid, SYS_seccomp,
	SYS_sched_yield, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn,
	SYS_sigaltstack, SYS_restart_syscall, SYS_clock_gettime, SYS_clock_nanosleep, SYS_timer_create,
	SYS_timer_settime, SYS_timer_delete, SYS_getrandom, SYS_exit, SYS_exit_group,
};
/* clang-format on */
/* Refused without harm: fstat() of older C libraries, and whoever looks for files or limits. */
static const uint16_t refused_calls[] = {SYS_newfstatat, SYS_stat, SYS_prlimit64};
static const uint32_t process_ioctls[] = {FIOCLEX, FIONBIO, FIONREAD};

/*
 * What libslirp needs, in a process of one thread: sockets of IPv4, and the host's name servers,
 * which /etc/resolv.conf names.
 */
/* clang-format off */
static const uint16_t network_calls[] = {
	/* sockets */
	SYS_connect, SYS_bind, SYS_accept, SYS_accept4, SYS_sendmsg, SYS_recvmsg, SYS_sendto,
	SYS_recvfrom, SYS_shutdown, SYS_getsockopt, SYS_setsockopt, SYS_getsockname, SYS_getpeername,
	/* descriptors, one file */
	SYS_read, SYS_write, SYS_writev, SYS_close, SYS_fstat, SYS_newfstatat, SYS_stat, SYS_lseek,
	SYS_fcntl, SYS_poll, SYS_open, SYS_openat,
	/* memory, time, the end */
	SYS_mmap, SYS_munmap, SYS_mprotect, SYS_mremap, SYS_madvise, SYS_brk, SYS_futex,
	SYS_clock_gettime, SYS_gettimeofday, SYS_getrandom, SYS_getpid, SYS_rt_sigprocmask,
	SYS_rt_sigreturn, SYS_restart_syscall, SYS_exit_group,
};
/* clang-format on */
static const uint32_t network_ioctls[] = {FIONBIO, FIONREAD};

/* Let a file be read, whatever else @ruleset takes away. */
static void allow_file(int ruleset, const char *path)
{
	struct landlock_path_beneath_attr rule = {.allowed_access = LANDLOCK_ACCESS_FS_READ_FILE};

	rule.parent_fd = open(path, O_PATH | O_CLOEXEC);
	if (rule.parent_fd < 0)
		return;
	(void)syscall(SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PATH_BENEATH, &rule, 0);
	close(rule.parent_fd);
}

/*
 * No path but @readable, no abstract socket, no process outside, and without @readable no TCP port.
 * Returns whether that is in force.
 */
static bool confine_files(const char *readable)
{
	static const size_t sizes[] = {8, 8, 8, 16, 16, 24}; /* of the structure, by ABI */
	static const uint8_t rights[] = {13, 14, 15, 15, 16, 16};
	long abi = syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);
	struct landlock_rules rules = {.net = LANDLOCK_NET, .scoped = LANDLOCK_SCOPED};
	int fd, error;

	if (abi < 1)
		return false;
	if (abi > 6)
		abi = 6;
	rules.fs = (1ull << rights[abi - 1]) - 1;
	if (readable)
		rules.net = 0;
	fd = (int)syscall(SYS_landlock_create_ruleset, &rules, sizes[abi - 1], 0);
	if (fd < 0)
		return false;
	if (readable)
		allow_file(fd, readable);
	error = (int)syscall(SYS_landlock_restrict_self, fd, 0);
	close(fd);
	return !error;
}

/* Take capabilities, but those of the mask @keep, from all programs that this thread executes. */
static void bound_capabilities(uint64_t keep)
{
	for (int cap = 0; cap < 64; cap++)
		if (!(keep >> cap & 1))
			prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);
}

static void drop_capabilities(void)
{
	struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct none[2] = {0};

	bound_capabilities(0);
	(void)syscall(SYS_capset, &head, none);
}

/* Allow ioctls; the request is in the accumulator. */
static size_t allow_requests(struct sock_filter *f, size_t n, const uint32_t *ioctls, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		f[n++] = unless(ioctls[i], 1);
		f[n++] = answer(SECCOMP_RET_ALLOW);
	}
	return n;
}

/**
 * pv_confine_process() - Leave this process what its descriptors are good for, for good
 * @ioctls:	Requests that it may make besides those of all such processes
 * @count:	How many, at most IOCTLS_MAX
 *
 * All its threads are confined, and those to come. A call that is not allowed kills the process.
 *
 * Return: PV_CONFINED_* bits, where the kernel knows these means; -errno if it knows them and
 * refuses
 */
int pv_confine_process(const uint32_t *ioctls, size_t count)
{
	struct sock_filter f[128 + 2 * (CALLS_MAX + IOCTLS_MAX)];
	size_t n, calls = sizeof(process_calls) / sizeof(process_calls[0]);
	size_t common = sizeof(process_ioctls) / sizeof(process_ioctls[0]);
	int error, done = 0;

	if (count > IOCTLS_MAX)
		return -E2BIG;
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return -errno;
	mallopt(M_ARENA_MAX, 1); /* to trim another arena, the C library opens a file */
	if (confine_files(NULL))
		done |= PV_CONFINED_FILES;
	drop_capabilities();
	n = filter_head(f);
	n = allow_calls(f, n, process_calls, calls);
	for (size_t i = 0; i < sizeof(refused_calls) / sizeof(refused_calls[0]); i++) {
		f[n++] = unless(refused_calls[i], 1);
		f[n++] = answer(SECCOMP_RET_ERRNO | EACCES);
	}
	f[n++] = unless(SYS_ioctl, (uint8_t)(2 + 2 * (common + count)));
	f[n++] = load(offsetof(struct seccomp_data, args[1]));
	n = allow_requests(f, n, process_ioctls, common);
	n = allow_requests(f, n, ioctls, count);
	f[n++] = answer(SECCOMP_RET_KILL_PROCESS);
	/* Threads, but no processes. A filter cannot see the flags of clone3. */
	f[n++] = unless(SYS_clone3, 1);
	f[n++] = answer(SECCOMP_RET_ERRNO | ENOSYS);
	n = allow_if(f, n, SYS_clone, BPF_JSET, CLONE_THREAD);
	/* What pv_follow_parent() has arranged stays, PR_SET_PDEATHSIG being the first request. */
	n = allow_if(f, n, SYS_prctl, BPF_JGT, PR_SET_PDEATHSIG);
	/* Only of this process. */
	n = allow_if(f, n, SYS_sched_setaffinity, BPF_JEQ, 0);
	n = allow_if(f, n, SYS_sched_getaffinity, BPF_JEQ, 0);
	n = allow_if(f, n, SYS_tgkill, BPF_JEQ, (uint32_t)getpid());
	f[n++] = answer(SECCOMP_RET_KILL_PROCESS);
	error = filter_install(f, n, SECCOMP_FILTER_FLAG_TSYNC);
	if (error)
		return error == -ENOSYS || error == -EINVAL ? done : error;
	return done | PV_CONFINED_CALLS;
}

/**
 * pv_follow_parent() - Have the kernel kill this process when the thread that has made it ends
 * @parent:	Process id of that thread's process
 *
 * To be called by the child of fork(2), before anything that others may influence.
 *
 * Return: 0; -ESRCH if the parent has ended already
 */
int pv_follow_parent(int32_t parent)
{
	if (prctl(PR_SET_PDEATHSIG, SIGKILL))
		return -errno;
	return getppid() == parent ? 0 : -ESRCH;
}

/**
 * pv_enter_root() - Make a directory the root of this process, and let go of the old root
 * @root:	A mount point of this process's own mount namespace
 *
 * Return: 0; -errno
 */
int pv_enter_root(const char *root)
{
	if (chdir(root) || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) ||
	    chdir("/"))
		return -errno;
	return 0;
}

/**
 * pv_confine_program() - Leave the program that this process executes next only a few capabilities
 * @keep:	Mask of CAP_* that it gets if its user is root
 *
 * Return: 0; -errno
 */
int pv_confine_program(uint64_t keep)
{
	bound_capabilities(keep);
	return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ? -errno : 0;
}

/**
 * pv_confine_network() - Leave this thread, which is all of its process, sockets of IPv4
 * @readable:	The one file that may be read from now on
 *
 * A call that is not allowed kills the process.
 *
 * Return: as pv_confine_process()
 */
int pv_confine_network(const char *readable)
{
	struct sock_filter f[64 + 2 * CALLS_MAX];
	size_t n, calls = sizeof(network_calls) / sizeof(network_calls[0]);
	size_t ioctls = sizeof(network_ioctls) / sizeof(network_ioctls[0]);
	int error, done = 0;

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return -errno;
	if (confine_files(readable))
		done |= PV_CONFINED_FILES;
	drop_capabilities();
	n = filter_head(f);
	n = allow_calls(f, n, network_calls, calls);
	f[n++] = unless(SYS_ioctl, (uint8_t)(2 + 2 * ioctls));
	f[n++] = load(offsetof(struct seccomp_data, args[1]));
	n = allow_requests(f, n, network_ioctls, ioctls);
	f[n++] = answer(SECCOMP_RET_ERRNO | ENOTTY); /* of a message: is there a terminal? */
	/* The C library asks for others, too: to learn of the interface in fe80::1%eth0. */
	f[n++] = unless(SYS_socket, 4);
	f[n++] = load(offsetof(struct seccomp_data, args[0]));
	f[n++] = unless(AF_INET, 1);
	f[n++] = answer(SECCOMP_RET_ALLOW);
	f[n++] = answer(SECCOMP_RET_ERRNO | EAFNOSUPPORT);
	f[n++] = answer(SECCOMP_RET_KILL_PROCESS);
	error = filter_install(f, n, 0);
	if (error)
		return error == -ENOSYS || error == -EINVAL ? done : error;
	return done | PV_CONFINED_CALLS;
}

/**
 * pv_call_name() - What a system call is called
 * @call:	Its number on x86-64
 *
 * Return: the name of one that an attacker would want; else NULL
 */
const char *pv_call_name(int call)
{
	static const struct {
		int call;
		const char *name;
	} names[] = {
		{SYS_open, "open"},	    {SYS_openat, "openat"},   {SYS_socket, "socket"},
		{SYS_connect, "connect"},   {SYS_execve, "execve"},   {SYS_execveat, "execveat"},
		{SYS_fork, "fork"},	    {SYS_vfork, "vfork"},     {SYS_clone, "clone"},
		{SYS_clone3, "clone3"},	    {SYS_ptrace, "ptrace"},   {SYS_mmap, "mmap"},
		{SYS_mprotect, "mprotect"}, {SYS_ioctl, "ioctl"},     {SYS_kill, "kill"},
		{SYS_tgkill, "tgkill"},	    {SYS_mount, "mount"},     {SYS_bpf, "bpf"},
		{SYS_unshare, "unshare"},   {SYS_setns, "setns"},     {SYS_prctl, "prctl"},
		{SYS_bind, "bind"},	    {SYS_sendmsg, "sendmsg"}, {SYS_setuid, "setuid"},
	};

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		if (names[i].call == call)
			return names[i].name;
	return NULL;
}
