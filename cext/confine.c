/* SPDX-License-Identifier: MIT */
#include "confine.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/if_tun.h>
#include <linux/kvm.h>
#include <linux/keyctl.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <malloc.h>
#include <poll.h>
#include <sched.h>
#include <semaphore.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

/* Sanitizers' runtimes make calls of their own, in any thread: gcc says so, and clang. */
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED
#endif

#define CALLS_MAX   160
#define IOCTLS_MAX  16
#define THREADS_MAX 4096
/* Bytes; less than those that come by mmap(2). Several make a heap that is trimmed. */
#define TRIMMED 65536
/* The filter's instructions that are neither a call's nor the last. */
#define HEAD 4
/* The part of a socket's type that is no flag, as in the kernel. */
#define SOCK_TYPE_MASK 0xf
/* The first number of a call of the x32 ABI (__X32_SYSCALL_BIT). */
#define X32_CALLS 0x40000000u

/* The headers' own needs a structure that <termios.h> hides. C libraries differ in their use. */
#undef TCSETS2
#define TCSETS2 0x402c542b

/* System calls that headers of Linux 6.1 lack; other C libraries wait by them. */
#ifndef SYS_futex_wake
#define SYS_futex_wake	  454
#define SYS_futex_wait	  455
#define SYS_futex_requeue 456
#endif

/* Landlock's newer scopes, which the headers of Linux 6.1 lack. */
#define LANDLOCK_NET	  (1ull << 0 | 1ull << 1)	  /* bind and connect TCP; ABI 4 */
#define LANDLOCK_ABSTRACT (1ull << 0)			  /* abstract sockets; ABI 6 */
#define LANDLOCK_SCOPED	  (LANDLOCK_ABSTRACT | 1ull << 1) /* and signals */
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

/* The confined process: what its handler of SIGSYS needs. */
static struct {
	bool armed;
	bool machine; /* it is a VMM, whose vCPUs have a list of their own */
	int event;    /* eventfd that is told */
	int status;   /* exit status */
	int patience; /* for an orderly end, s: whoever has the interpreter's lock never allows it */
	bool terminal;
	struct termios modes; /* of standard input, before the guest had it */
	int stopped;	      /* atomic: a call has been noted */
	int holder;	      /* atomic: the thread that goes on without hurry; 0: none */
	int call;
	char thread[16];
} process;

static size_t append(char *line, size_t n, const char *text)
{
	size_t len = strlen(text);

	memcpy(line + n, text, len);
	return n + len;
}

/* The end of a process in which a thread was not ours any more; signal-safe functions only. */
static void last_words(int call)
{
	const char *name = pv_call_name(call);
	char digits[12], line[160];
	size_t n, first = sizeof(digits);
	unsigned int left = (unsigned int)call;

	digits[--first] = '\0';
	do
		digits[--first] = (char)('0' + left % 10);
	while (left /= 10);
	if (process.terminal)
		tcsetattr(0, TCSANOW, &process.modes);
	n = append(line, 0, "pyvmm: a thread of pyvmm's was stopped: ");
	n = append(line, n, process.thread);
	n = append(line, n, " asked for ");
	n = append(line, n, name ? name : "system call ");
	n = append(line, n, name ? "()" : digits + first);
	n = append(line, n, ", which it may not have\n");
	if (write(STDERR_FILENO, line, n) < 0) {
		/* Nobody can be told. */
	}
	_exit(process.status);
}

/* A thread of the confined process has asked for a call that no thread of the process may make. */
static void process_stopped(int call)
{
	struct timespec now, end;
	uint64_t one = 1;

	if (!__atomic_exchange_n(&process.stopped, 1, __ATOMIC_ACQ_REL)) {
		process.call = call;
		prctl(PR_GET_NAME, process.thread);
		if (write(process.event, &one, sizeof(one)) < 0) {
			/* The eventfd has gone, with the machine. */
		}
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += process.patience;
	do {
		int holder = __atomic_load_n(&process.holder, __ATOMIC_ACQUIRE);

		poll(NULL, 0, 100);
		clock_gettime(CLOCK_MONOTONIC, &now);
		if (holder && holder != gettid()) {
			end = now;
			end.tv_sec += process.patience;
		}
	} while (now.tv_sec < end.tv_sec ||
		 (now.tv_sec == end.tv_sec && now.tv_nsec < end.tv_nsec));
	last_words(process.call);
}

/* A confined thread has asked for a call that it may not make: it ends here. */
static void on_violation(int sig, siginfo_t *info, void *context)
{
	(void)context;
	if (!thread_stopped && process.armed)
		process_stopped(info->si_syscall);
	if (!thread_stopped) { /* not ours: as without this handler */
		signal(sig, SIG_DFL);
		raise(sig);
		return;
	}
	thread_stopped(info->si_syscall);
	for (;;) /* nobody ever wakes it */
		syscall(SYS_futex, &(uint32_t){0}, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
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

/* Refuse calls without harm; the number is in the accumulator. */
static size_t refuse_calls(struct sock_filter *f, size_t n, const uint16_t *calls, size_t count,
			   uint16_t error)
{
	for (size_t i = 0; i < count; i++) {
		f[n++] = unless(calls[i], 1);
		f[n++] = answer(SECCOMP_RET_ERRNO | error);
	}
	return n;
}

/* As allow_if(), but report the call instead of ending the process. */
static size_t trap_unless(struct sock_filter *f, size_t n, uint32_t call, uint16_t test,
			  uint32_t value)
{
	n = allow_if(f, n, call, test, value);
	f[n - 1] = answer(SECCOMP_RET_TRAP);
	return n;
}

/* Allow a call unless the lower half of its second argument is one of @denied. */
static size_t allow_but(struct sock_filter *f, size_t n, uint32_t call, const uint32_t *denied,
			size_t count, uint32_t action)
{
	f[n++] = unless(call, (uint8_t)(2 + 2 * count));
	f[n++] = load(offsetof(struct seccomp_data, args[1]));
	for (size_t i = 0; i < count; i++) {
		f[n++] = unless(denied[i], 1);
		f[n++] = answer(action);
	}
	f[n++] = answer(SECCOMP_RET_ALLOW);
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
#ifdef SANITIZED
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

/*
 * What each thread with a list needs: locks, or to be parked (on_violation); to go on after it was
 * interrupted; its end. A call without a time-out goes on by itself after a stop (SIGSTOP), others
 * return EINTR: poll(2) would need restart_syscall, ppoll(2) does not.
 */
static const uint16_t thread_calls[] = {SYS_futex, SYS_rt_sigreturn, SYS_exit};
/*
 * What the C library asks for at the thread's end, and gets along without. The stack's pages remain
 * until the next thread uses them. Signals that are not blocked meanwhile do no harm, because
 * their handlers need nothing of what is taken down.
 */
static const uint16_t thread_refused[] = {SYS_madvise, SYS_rt_sigprocmask};

/**
 * pv_confine_thread() - Leave this thread these system calls alone, for good
 * @calls:	Their numbers; those that each such thread needs are added (thread_calls)
 * @count:	How many
 * @stopped:	Called in the thread with the number of a call that it may not make; may make the
 *		allowed calls only, and returns: the thread stays where it is
 *
 * Return: 0; -errno if this kernel has no such filters: then the thread is as before
 */
int pv_confine_thread(const uint16_t *calls, size_t count, void (*stopped)(int call))
{
	const size_t common = sizeof(thread_calls) / sizeof(thread_calls[0]);
	const size_t refused = sizeof(thread_refused) / sizeof(thread_refused[0]);
	struct sock_filter f[HEAD + 2 * CALLS_MAX + 1];
	size_t n = filter_head(f);
	int error;

	if (count + common + refused > CALLS_MAX)
		return -E2BIG;
	n = allow_calls(f, n, calls, count);
	n = allow_calls(f, n, thread_calls, common);
	n = refuse_calls(f, n, thread_refused, refused, EPERM);
	f[n++] = answer(SECCOMP_RET_TRAP);
	thread_stopped = stopped;
	error = filter_install(f, n, 0);
	if (error)
		thread_stopped = NULL;
	return error;
}

/*
 * What a Python program needs that serves sessions on descriptors which it has or is given:
 * threads, memory, time, and no path but those of links: of /proc/self/fd, which tells what a
 * descriptor is.
 */
/* clang-format off */
static const uint16_t process_calls[] = {
	/* descriptors */
	SYS_read, SYS_write, SYS_readv, SYS_writev, SYS_preadv2, SYS_close, SYS_fstat, SYS_fstatfs,
	SYS_lseek, SYS_ftruncate, SYS_fcntl, SYS_dup, SYS_poll, SYS_ppoll, SYS_epoll_create1,
	SYS_epoll_ctl, SYS_epoll_wait, SYS_epoll_pwait2, SYS_eventfd2, SYS_memfd_create,
	SYS_readlink,
	/* sockets that are there */
	SYS_sendmsg, SYS_recvmsg, SYS_sendto, SYS_recvfrom, SYS_shutdown, SYS_getsockopt,
	SYS_setsockopt, SYS_getsockname, SYS_getpeername,
	/* memory */
	SYS_mmap, SYS_munmap, SYS_mprotect, SYS_mremap, SYS_madvise, SYS_brk,
	/* threads, signals, time */
	SYS_set_robust_list, SYS_rseq, SYS_futex, SYS_gettid, SYS_getpid, SYS_seccomp,
	SYS_sched_yield, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sigaltstack,
	SYS_restart_syscall, SYS_clock_gettime, SYS_clock_nanosleep, SYS_timer_create,
	SYS_timer_settime, SYS_timer_delete, SYS_getrandom, SYS_exit, SYS_exit_group,
	/* of any thread: where its stack ends (pthread_getattr_np), as Python 3.14 wants to know */
	SYS_sched_getaffinity,
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
	SYS_recvfrom, SYS_shutdown, SYS_getsockopt, SYS_setsockopt, SYS_getsockname,
	SYS_getpeername,
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

/* Let what is at @path be used in the ways of @rights, whatever else @ruleset takes away. */
static void allow_path(int ruleset, const char *path, uint64_t rights)
{
	struct landlock_path_beneath_attr rule = {.allowed_access = rights};

	rule.parent_fd = open(path, O_PATH | O_CLOEXEC);
	if (rule.parent_fd < 0)
		return;
	if (syscall(SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PATH_BENEATH, &rule, 0) &&
	    errno == EINVAL) { /* a right to directories, and this is a file */
		rule.allowed_access &= ~LANDLOCK_ACCESS_FS_READ_DIR;
		(void)syscall(SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PATH_BENEATH, &rule, 0);
	}
	close(rule.parent_fd);
}

/*
 * Make a ruleset that takes away all that the kernel knows, but TCP if @tcp, and signals to other
 * domains if @signals: threads that confine themselves one by one have domains of their own, and
 * before Linux 6.15 could send no signals to each other. Returns its descriptor or -1.
 */
static int make_ruleset(bool tcp, bool signals)
{
	static const size_t sizes[] = {8, 8, 8, 16, 16, 24}; /* of the structure, by ABI */
	static const uint8_t rights[] = {13, 14, 15, 15, 16, 16};
	long abi = pv_landlock_abi();
	struct landlock_rules rules = {.net = tcp ? 0 : LANDLOCK_NET,
				       .scoped = signals ? LANDLOCK_ABSTRACT : LANDLOCK_SCOPED};

	if (abi < 1)
		return -1;
	if (abi > 6)
		abi = 6;
	rules.fs = (1ull << rights[abi - 1]) - 1;
	return (int)syscall(SYS_landlock_create_ruleset, &rules, sizes[abi - 1], 0);
}

/*
 * No path but @readable, no abstract socket, no process outside, and without @readable no TCP port.
 * Returns whether that is in force.
 */
static bool confine_files(const char *readable)
{
	int fd = make_ruleset(readable, false), error;

	if (fd < 0)
		return false;
	if (readable)
		allow_path(fd, readable, LANDLOCK_ACCESS_FS_READ_FILE);
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

static void *leave(void *unused)
{
	(void)unused;
	pthread_exit(NULL);
}

/*
 * Do now what the C library does at the first pthread_exit(): it opens libgcc_s. Python calls
 * pthread_exit() in threads that are still there at the end of the interpreter.
 */
static void load_unwinder(void)
{
	pthread_t thread;

	if (!pthread_create(&thread, NULL, leave, NULL))
		pthread_join(thread, NULL);
}

static void *trim(void *unused)
{
	char *volatile held[8]; /* which the compiler must not leave out */

	(void)unused;
	for (int i = 0; i < 8; i++)
		held[i] = malloc(TRIMMED);
	for (int i = 8; i-- > 0;)
		free(held[i]);
	return NULL;
}

/*
 * Do now what the C library does at the first use of a time, and when a thread first gives memory
 * back: it reads files, which the thread of a vCPU may not.
 */
static void read_ahead(void)
{
	pthread_t thread;

	tzset();
	if (!pthread_create(&thread, NULL, trim, NULL))
		pthread_join(thread, NULL);
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
	load_unwinder();
	if (confine_files(NULL))
		done |= PV_CONFINED_FILES;
	drop_capabilities();
	n = filter_head(f);
	n = allow_calls(f, n, process_calls, calls);
	n = refuse_calls(f, n, refused_calls, sizeof(refused_calls) / sizeof(refused_calls[0]),
			 EACCES);
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
 * pv_adopt_orphans() - Have processes below this one whose parent ends become its children
 *
 * Processes that it forks later do not adopt any themselves.
 *
 * Return: 0; -errno
 */
int pv_adopt_orphans(void)
{
	return prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) ? -errno : 0;
}

/**
 * pv_become_user() - Be another user, for good, and leave this process nothing of what root has
 * @uid:	Not 0
 * @gid:	The user's only group
 *
 * No capability, now or by any program; no key of the session's. No other process of this user may
 * look at this one or trace it, see pv_be_seen(). The caller must be root's, and the only thread of
 * its process.
 *
 * Return: 0; -errno
 */
int pv_become_user(uint32_t uid, uint32_t gid)
{
	bound_capabilities(0); /* while this may be done */
	if (setgroups(0, NULL) || setresgid(gid, gid, gid) || setresuid(uid, uid, uid) ||
	    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return -errno;
	drop_capabilities();
	(void)syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING,
		      NULL); /* ENOSYS: there are no keys */
	return pv_be_seen(false);
}

/**
 * pv_be_seen() - Let others of this user look at this process and trace it, or not
 * @seen:	As if that user had started it; else its own files in /proc are root's, and it
 *		leaves no core file
 *
 * Processes that it forks are as it is.
 *
 * Return: 0; -errno
 */
int pv_be_seen(bool seen)
{
	return prctl(PR_SET_DUMPABLE, seen ? 1 : 0, 0, 0, 0) ? -errno : 0;
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

/*
 * What a program is refused that confines itself no further (pv_confine_program): to reach other
 * processes, keys of the user's, mounts, other namespaces, and to make processes.
 */
/* clang-format off */
static const uint16_t program_refused[] = {
	/* signals, memory and descriptors of other processes */
	SYS_tkill, SYS_rt_sigqueueinfo, SYS_rt_tgsigqueueinfo, SYS_pidfd_open,
	SYS_pidfd_send_signal, SYS_pidfd_getfd, SYS_ptrace, SYS_process_vm_readv,
	SYS_process_vm_writev, SYS_process_madvise, SYS_process_mrelease, SYS_kcmp,
	SYS_perf_event_open, SYS_bpf,
	/* how they run */
	SYS_setpriority, SYS_sched_setscheduler, SYS_sched_setparam, SYS_sched_setattr,
	SYS_ioprio_set, SYS_migrate_pages, SYS_move_pages,
	/* keys */
	SYS_keyctl, SYS_add_key, SYS_request_key,
	/* mounts and namespaces */
	SYS_mount, SYS_umount2, SYS_move_mount, SYS_open_tree, SYS_fsopen, SYS_fsmount,
	SYS_fsconfig, SYS_fspick, SYS_mount_setattr, SYS_pivot_root, SYS_unshare, SYS_setns,
	/* processes */
	SYS_fork, SYS_vfork,
};
/* clang-format on */
/* By these, the kernel sends signals to others when a descriptor becomes ready. */
static const uint32_t program_denied_ioctls[] = {FIOSETOWN, SIOCSPGRP};
static const uint32_t program_denied_fcntls[] = {F_SETOWN, F_SETOWN_EX, F_SETSIG};

/* Allow a call if the lower half of its first argument is one of @values. */
static size_t allow_of(struct sock_filter *f, size_t n, uint32_t call, const uint32_t *values,
		       size_t count, uint32_t otherwise)
{
	f[n++] = unless(call, (uint8_t)(2 + 2 * count));
	f[n++] = load(offsetof(struct seccomp_data, args[0]));
	for (size_t i = 0; i < count; i++) {
		f[n++] = unless(values[i], 1);
		f[n++] = answer(SECCOMP_RET_ALLOW);
	}
	f[n++] = answer(otherwise);
	return n;
}

/**
 * pv_confine_program() - Leave the program that this process executes next itself and its files
 * @keep:	Mask of CAP_* that it gets if its user is root
 *
 * The program, of as many threads as it likes, gets EPERM for what reaches other processes
 * (program_refused), and can make none. The caller must be the only thread of its process.
 *
 * Return: 0, also if this kernel has no filters of system calls; -errno
 */
int pv_confine_program(uint64_t keep)
{
	/* Its id stays when it executes the program. */
	const uint32_t self[] = {(uint32_t)getpid(), 0};
	const uint32_t refused = SECCOMP_RET_ERRNO | EPERM;
	const size_t fcntls = sizeof(program_denied_fcntls) / sizeof(program_denied_fcntls[0]);
	const size_t ioctls = sizeof(program_denied_ioctls) / sizeof(program_denied_ioctls[0]);
	struct sock_filter f[64 + 2 * CALLS_MAX];
	size_t n;
	int error;

	bound_capabilities(keep);
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return -errno;
	n = filter_head(f);
	/* The numbers of x32 are calls by other names. */
	f[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, X32_CALLS, 0, 1);
	f[n++] = answer(SECCOMP_RET_ERRNO | ENOSYS);
	n = refuse_calls(f, n, program_refused,
			 sizeof(program_refused) / sizeof(program_refused[0]), EPERM);
	n = allow_but(f, n, SYS_ioctl, program_denied_ioctls, ioctls, SECCOMP_RET_ERRNO | EPERM);
	n = allow_but(f, n, SYS_fcntl, program_denied_fcntls, fcntls, SECCOMP_RET_ERRNO | EPERM);
	n = allow_of(f, n, SYS_kill, self, 1, refused); /* 0 is a group of processes */
	n = allow_of(f, n, SYS_tgkill, self, 1, refused);
	n = allow_of(f, n, SYS_prlimit64, self, 2, refused);
	n = allow_of(f, n, SYS_sched_setaffinity, self, 2, refused);
	/* Threads, but no processes. A filter cannot see the flags of clone3. */
	f[n++] = unless(SYS_clone3, 1);
	f[n++] = answer(SECCOMP_RET_ERRNO | ENOSYS);
	n = allow_if(f, n, SYS_clone, BPF_JSET, CLONE_THREAD);
	f[n - 1] = answer(SECCOMP_RET_ERRNO | EPERM);
	f[n++] = answer(SECCOMP_RET_ALLOW);
	error = filter_install(f, n, 0);
	return error == -ENOSYS || error == -EINVAL ? 0 : error;
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

/*
 * What a VMM needs once its guest runs: files and devices as far as Landlock lets it have them, no
 * socket that is not there, no process, no program. The helper (pyvmm/helper.py) does the rest.
 */
/* clang-format off */
static const uint16_t machine_calls[] = {
	/* descriptors */
	SYS_read, SYS_write, SYS_readv, SYS_writev, SYS_pread64, SYS_pwrite64, SYS_preadv,
	SYS_pwritev, SYS_preadv2, SYS_pwritev2, SYS_sendfile, SYS_close, SYS_fstat, SYS_fstatfs,
	SYS_lseek, SYS_ftruncate, SYS_fallocate, SYS_flock, SYS_dup, SYS_dup2, SYS_dup3, SYS_pipe2,
	SYS_poll, SYS_ppoll, SYS_select, SYS_pselect6, SYS_epoll_create1, SYS_epoll_ctl,
	SYS_epoll_wait, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_eventfd2, SYS_memfd_create,
	SYS_fsync,
	/* files */
	SYS_openat, SYS_newfstatat, SYS_stat, SYS_lstat, SYS_statx, SYS_access, SYS_faccessat,
	SYS_faccessat2, SYS_readlink, SYS_readlinkat, SYS_getdents64, SYS_getcwd, SYS_chdir,
	SYS_fchdir, SYS_statfs,
	/* sockets that are there */
	SYS_sendmsg, SYS_recvmsg, SYS_sendto, SYS_recvfrom, SYS_shutdown, SYS_getsockopt,
	SYS_setsockopt, SYS_getsockname, SYS_getpeername, SYS_accept, SYS_accept4,
	/* memory */
	SYS_mmap, SYS_munmap, SYS_mprotect, SYS_mremap, SYS_madvise, SYS_msync, SYS_mincore,
	SYS_brk,
	/* itself */
	SYS_getpid, SYS_getppid, SYS_gettid, SYS_getuid, SYS_geteuid, SYS_getgid, SYS_getegid,
	SYS_getpgrp, SYS_getpgid, SYS_getsid, SYS_umask, SYS_getcpu, SYS_uname, SYS_sysinfo,
	SYS_getrusage, SYS_getrandom, SYS_times,
	/* threads, children that end, signals, time */
	SYS_set_robust_list, SYS_get_robust_list, SYS_rseq, SYS_futex, SYS_futex_waitv,
	SYS_futex_wake, SYS_futex_wait, SYS_futex_requeue, SYS_membarrier, SYS_seccomp,
	SYS_sched_yield,
	SYS_sched_setaffinity, SYS_sched_getaffinity, SYS_wait4, SYS_waitid, SYS_pidfd_open,
	SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_rt_sigtimedwait,
	SYS_sigaltstack, SYS_restart_syscall, SYS_clock_gettime, SYS_clock_getres,
	SYS_clock_nanosleep, SYS_nanosleep, SYS_gettimeofday, SYS_time, SYS_timer_create,
	SYS_timer_settime, SYS_timer_delete, SYS_setitimer, SYS_exit, SYS_exit_group,
};
/*
 * What a vCPU's thread needs besides KVM_RUN: to answer in Python whatever the guest accesses. It
 * writes to eventfds and pipes, waits for locks, allocates memory, reads statistics, and asks
 * rtnetlink and sockets that are connected for counters. Whatever else, it asks another thread for
 * (pyvmm/threads.py).
 */
static const uint16_t vcpu_calls[] = {
	/* descriptors that are there */
	SYS_read, SYS_write, SYS_readv, SYS_writev, SYS_pread64, SYS_preadv, SYS_preadv2,
	SYS_pwrite64, SYS_pwritev2,
	SYS_sendto, SYS_recvfrom, SYS_poll, SYS_ppoll, SYS_eventfd2, SYS_close, SYS_fstat,
	SYS_lseek, SYS_getsockopt, SYS_getsockname, SYS_getpeername,
	/* memory, without PROT_EXEC: see pv_confine_vcpu() */
	SYS_munmap, SYS_mremap, SYS_madvise, SYS_brk,
	/* threads, signals, time */
	SYS_futex, SYS_futex_waitv, SYS_futex_wake, SYS_futex_wait, SYS_futex_requeue,
	SYS_set_robust_list, SYS_rseq, SYS_membarrier, SYS_gettid, SYS_getpid, SYS_sched_yield,
	SYS_getcpu, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sigaltstack, SYS_restart_syscall,
	SYS_clock_gettime, SYS_clock_getres, SYS_clock_nanosleep, SYS_nanosleep, SYS_gettimeofday,
	SYS_time, SYS_getrusage, SYS_getrandom, SYS_exit, SYS_exit_group,
	/* a write that may take no longer than a timer lets it (event.h) */
	SYS_timer_create, SYS_timer_settime, SYS_timer_delete,
	/* objects of Python's that are freed in whichever thread: of children that have ended */
	SYS_wait4, SYS_waitid,
	/* how many processors there are, for heaps; see process_calls */
	SYS_sched_getaffinity,
};
/* Refused without harm: what looks at files by their names, as fstat() of older C libraries. */
static const uint16_t vcpu_refused[] = {
	SYS_newfstatat, SYS_stat, SYS_lstat, SYS_statx, SYS_access, SYS_faccessat, SYS_faccessat2,
	SYS_readlink, SYS_readlinkat, SYS_getcwd,
};
static const uint32_t vcpu_ioctls[] = {
	KVM_RUN,
	/* of the VM: interrupts, kicks, statistics */
	KVM_IRQ_LINE, KVM_SIGNAL_MSI, KVM_SET_GSI_ROUTING, KVM_IRQFD, KVM_IOEVENTFD,
	KVM_GET_STATS_FD, KVM_CHECK_EXTENSION, KVM_KVMCLOCK_CTRL,
	/* of the vCPU: where it was */
	KVM_GET_REGS, KVM_GET_SREGS, KVM_GET_MP_STATE,
	/* what Python asks of a descriptor */
	FIOCLEX, FIONBIO, FIONREAD,
	/* the modes of a terminal, which last_words() gives back; whether there is one */
	TCSETS, TCSETS2, TCGETS,
};
/* Refused without harm: what Python tries for its caches, and what is tried for tidiness. */
static const uint16_t machine_refused[] = {
	SYS_mkdir, SYS_rename, SYS_unlink, SYS_rmdir, SYS_chmod, SYS_fchmod, SYS_utimensat,
};
/* What `pyvmm backend` needs besides process_calls: it listens, and waits for its helper's end. */
static const uint16_t backend_calls[] = {SYS_accept4, SYS_wait4, SYS_geteuid, SYS_flock};
static const uint32_t backend_ioctls[] = {
	FIOCLEX, FIONBIO, FIONREAD,
	/* of taps */
	TUNGETIFF, TUNSETVNETHDRSZ, TUNSETSNDBUF, TUNSETOFFLOAD, TUNSETQUEUE, TUNSETTXFILTER,
	TUNATTACHFILTER, TUNDETACHFILTER, TUNSETSTEERINGEBPF, TUNSETCARRIER,
};
/*
 * Input that a terminal would take from its user, or from the screen; and signals to other
 * processes, by a descriptor that becomes ready, as below.
 */
static const uint32_t machine_denied_ioctls[] = {TIOCSTI, TIOCLINUX, FIOSETOWN, SIOCSPGRP};
static const uint32_t machine_denied_fcntls[] = {F_SETOWN, F_SETOWN_EX, F_SETSIG};
/* clang-format on */

/*
 * Landlock and capabilities belong to a thread, and a new thread has those of the thread that makes
 * it. So each thread that is there gives them up itself, in the handler of a signal.
 */
static struct {
	int ruleset;
	struct __user_cap_data_struct keep[2];
	sem_t done;
	int asked;		  /* atomic: how many threads have done so */
	int threads[THREADS_MAX]; /* atomic: which ones */
	int error;		  /* atomic: of whichever thread */
} sandbox;

/**
 * pv_confine_signal() - The signal at which a thread gives up files and capabilities
 *
 * Return: its number, which no thread may block
 */
int pv_confine_signal(void)
{
	return SIGRTMIN + 5;
}

static void confine_caller(void)
{
	struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
	int error = 0;

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		error = errno;
	for (int cap = 0; cap < 64; cap++)
		prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);
	prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	if (syscall(SYS_capset, &head, sandbox.keep))
		error = errno;
	if (sandbox.ruleset >= 0 && syscall(SYS_landlock_restrict_self, sandbox.ruleset, 0))
		error = errno;
	if (error)
		__atomic_store_n(&sandbox.error, error, __ATOMIC_RELEASE);
}

static void on_confine(int sig)
{
	int saved = errno, place;

	(void)sig;
	confine_caller();
	place = __atomic_fetch_add(&sandbox.asked, 1, __ATOMIC_ACQ_REL);
	if (place < THREADS_MAX)
		__atomic_store_n(&sandbox.threads[place], gettid(), __ATOMIC_RELEASE);
	sem_post(&sandbox.done);
	errno = saved;
}

/* Whether a thread has confined itself, or has ended before. */
static bool settled(int tid)
{
	int count = __atomic_load_n(&sandbox.asked, __ATOMIC_ACQUIRE);

	for (int i = 0; i < count && i < THREADS_MAX; i++)
		if (__atomic_load_n(&sandbox.threads[i], __ATOMIC_ACQUIRE) == tid)
			return true;
	return syscall(SYS_tgkill, getpid(), tid, 0) && errno == ESRCH;
}

/* Wait for threads to settle; 0, or -ETIMEDOUT after 10 s. */
static int wait_for(const int *tids, size_t count)
{
	struct timespec now, until;

	for (int slices = 0; slices < 100;) {
		size_t left = 0;

		for (size_t i = 0; i < count; i++)
			left += !settled(tids[i]);
		if (!left)
			return 0;
		clock_gettime(CLOCK_REALTIME, &now);
		until = now;
		until.tv_nsec += 100000000;
		if (until.tv_nsec >= 1000000000) {
			until.tv_nsec -= 1000000000;
			until.tv_sec++;
		}
		/* A thread that ends before it gets the signal posts nothing. */
		if (sem_timedwait(&sandbox.done, &until) && errno == ETIMEDOUT)
			slices++;
	}
	return -ETIMEDOUT;
}

/*
 * Have the other threads that are not in @known confine themselves, and note them there. Returns
 * how many there were, or -errno.
 */
static int confine_new(int *known, size_t *count, size_t room)
{
	DIR *tasks = opendir("/proc/self/task");
	const size_t first = *count;
	struct dirent *task;
	int error;

	if (!tasks)
		return -errno;
	while ((task = readdir(tasks))) {
		int tid = atoi(task->d_name);
		size_t i = 0;

		while (i < *count && known[i] != tid)
			i++;
		if (tid <= 0 || tid == gettid() || i < *count)
			continue;
		if (*count == room) {
			closedir(tasks);
			return -E2BIG;
		}
		known[(*count)++] = tid;
		(void)syscall(SYS_tgkill, getpid(), tid, pv_confine_signal());
	}
	closedir(tasks);
	error = wait_for(known + first, *count - first);
	return error ? error : (int)(*count - first);
}

/*
 * Have the other threads confine themselves; 0 or -errno. A thread that one of them makes meanwhile
 * is found the next time, until there is no new one.
 */
static int confine_others(void)
{
	struct sigaction sa = {.sa_handler = on_confine, .sa_flags = SA_RESTART};
	int known[THREADS_MAX], found;
	size_t count = 0;

	sem_init(&sandbox.done, 0, 0);
	sigaction(pv_confine_signal(), &sa, NULL);
	do
		found = confine_new(known, &count, sizeof(known) / sizeof(known[0]));
	while (found > 0);
	/* The handler stays: a thread that was about to end may still have the signal. */
	return found;
}

/**
 * pv_landlock_abi() - Which Landlock this kernel has
 *
 * Return: the version of its ABI; 0 if there is none
 */
int pv_landlock_abi(void)
{
	long abi = syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);

	return abi < 1 ? 0 : (int)abi;
}

/**
 * pv_has_seccomp() - Whether this kernel has filters of system calls that report a call
 *
 * Return: false also in a build with sanitizers, whose runtimes make calls of their own
 */
bool pv_has_seccomp(void)
{
#ifdef SANITIZED
	return false;
#else
	uint32_t action = SECCOMP_RET_TRAP;

	return !syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &action);
#endif
}

/*
 * Have all threads give up capabilities but @keep, and what @ruleset takes away, which may be -1;
 * closes it. Returns 0 or -errno.
 */
static int confine_threads(int ruleset, uint64_t keep)
{
	int error;

	sandbox.ruleset = ruleset;
	sandbox.keep[0].effective = sandbox.keep[0].permitted = (uint32_t)keep;
	sandbox.keep[1].effective = sandbox.keep[1].permitted = (uint32_t)(keep >> 32);
	sandbox.error = 0;
	error = confine_others();
	confine_caller();
	if (ruleset >= 0)
		close(ruleset);
	return error ? error : -sandbox.error;
}

/*
 * End a filter that reports what it does not allow, and install it for all threads. Returns 0 or
 * -errno.
 */
static int confine_calls(struct sock_filter *f, size_t n, int event, int status, int patience)
{
	struct sock_fprog prog = {.filter = f};
	int error = pv_confine_init();

	if (error)
		return error;
	process.event = event;
	process.status = status;
	process.patience = patience;
	process.terminal = !tcgetattr(0, &process.modes);
	process.armed = true;
	/* Threads, but no processes. A filter cannot see the flags of clone3. */
	f[n++] = unless(SYS_clone3, 1);
	f[n++] = answer(SECCOMP_RET_ERRNO | ENOSYS);
	n = trap_unless(f, n, SYS_clone, BPF_JSET, CLONE_THREAD);
	n = trap_unless(f, n, SYS_tgkill, BPF_JEQ, (uint32_t)getpid());
	n = trap_unless(f, n, SYS_kill, BPF_JEQ, (uint32_t)getpid());
	/* Of this process only. A VMM also pins the kernel's threads, by its list. */
	n = trap_unless(f, n, SYS_prlimit64, BPF_JEQ, 0);
	n = trap_unless(f, n, SYS_sched_setaffinity, BPF_JEQ, 0);
	/* The name of a thread, and PR_SET_NO_NEW_PRIVS before a thread's own filter. */
	n = trap_unless(f, n, SYS_prctl, BPF_JGE, PR_SET_NAME);
	f[n++] = answer(SECCOMP_RET_TRAP);
	prog.len = (uint16_t)n;
	error = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC,
			     &prog);
	if (error)
		return error < 0 ? -errno : -EBUSY; /* a thread has another filter */
	return 0;
}

/*
 * Allow pairs of Unix sockets of these types. Others, such as SOCK_DGRAM, could send to any name in
 * the file system.
 */
static size_t allow_pairs(struct sock_filter *f, size_t n)
{
	f[n++] = unless(SYS_socketpair, 8);
	f[n++] = load(offsetof(struct seccomp_data, args[0]));
	f[n++] = unless(AF_UNIX, 5);
	f[n++] = load(offsetof(struct seccomp_data, args[1]));
	f[n++] = (struct sock_filter)BPF_STMT(BPF_ALU | BPF_AND | BPF_K, SOCK_TYPE_MASK);
	f[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SOCK_STREAM, 1, 0);
	f[n++] = unless(SOCK_SEQPACKET, 1);
	f[n++] = answer(SECCOMP_RET_ALLOW);
	f[n++] = answer(SECCOMP_RET_TRAP);
	return n;
}

/**
 * pv_confine_machine() - Leave this process, a VMM whose machine has been made, what it needs
 * @files:	Files and directories that it may read
 * @devices:	Devices that it may open; a path that is not there does not matter
 * @keep:	Capabilities that it keeps, a bit each
 * @event:	An eventfd that is told when a thread has asked for a call that none may make; lent
 *		for the life of the process. See pv_machine_stopped().
 * @status:	The exit status if the process does not end in order
 * @patience:	within so many seconds after that
 *
 * All threads are confined, and those to come.
 *
 * Return: PV_CONFINED_* bits, where the kernel knows these means; -errno if the process cannot be
 * confined: then it may be in part
 */
int pv_confine_machine(const char *const *files, size_t file_count, const char *const *devices,
		       size_t device_count, uint64_t keep, int event, int status, int patience)
{
	const uint64_t read = LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR;
	uint64_t device = LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_WRITE_FILE;
	struct sock_filter f[128 + 2 * (CALLS_MAX + IOCTLS_MAX)];
	int ruleset = make_ruleset(false, true), error;
	size_t n;

	_Static_assert(sizeof(machine_calls) / sizeof(machine_calls[0]) <= CALLS_MAX, "CALLS_MAX");
	if (pv_landlock_abi() >= 5)
		device |= 1ull << 15; /* LANDLOCK_ACCESS_FS_IOCTL_DEV */
	for (size_t i = 0; ruleset >= 0 && i < file_count; i++)
		allow_path(ruleset, files[i], read);
	for (size_t i = 0; ruleset >= 0 && i < device_count; i++)
		allow_path(ruleset, devices[i], device);
	read_ahead();
	error = confine_threads(ruleset, keep);
	if (error)
		return error;
	n = filter_head(f);
	n = allow_calls(f, n, machine_calls, sizeof(machine_calls) / sizeof(machine_calls[0]));
	n = refuse_calls(f, n, machine_refused,
			 sizeof(machine_refused) / sizeof(machine_refused[0]), EACCES);
	n = allow_but(f, n, SYS_ioctl, machine_denied_ioctls,
		      sizeof(machine_denied_ioctls) / sizeof(machine_denied_ioctls[0]),
		      SECCOMP_RET_TRAP);
	n = allow_but(f, n, SYS_fcntl, machine_denied_fcntls,
		      sizeof(machine_denied_fcntls) / sizeof(machine_denied_fcntls[0]),
		      SECCOMP_RET_TRAP);
	n = allow_pairs(f, n);
	error = confine_calls(f, n, event, status, patience);
	if (error)
		return error;
	process.machine = true;
	return ruleset >= 0 ? PV_CONFINED_FILES | PV_CONFINED_CALLS : PV_CONFINED_CALLS;
}

/* Allow a call unless its third argument has one of these bits: how memory is protected. */
static size_t allow_without(struct sock_filter *f, size_t n, uint32_t call, uint32_t bits)
{
	f[n++] = unless(call, 4);
	f[n++] = load(offsetof(struct seccomp_data, args[2]));
	f[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, bits, 0, 1);
	f[n++] = answer(SECCOMP_RET_TRAP);
	f[n++] = answer(SECCOMP_RET_ALLOW);
	return n;
}

/**
 * pv_confine_vcpu() - Leave the calling thread, a vCPU's, what vCPUs need, for good
 *
 * A call that is not allowed stops the thread, as one that the process may not make.
 *
 * Return: 1 if that is in force; 0 if the process is not confined by pv_confine_machine(), and the
 * thread is as before; -errno
 */
int pv_confine_vcpu(void)
{
	struct sock_filter f[128 + 2 * (CALLS_MAX + IOCTLS_MAX)];
	const size_t ioctls = sizeof(vcpu_ioctls) / sizeof(vcpu_ioctls[0]);
	static const uint32_t names[] = {PR_SET_NAME, PR_GET_NAME};
	size_t n = filter_head(f);
	int error;

	if (!process.machine)
		return 0;
	/* First: KVM_RUN is what the thread calls most. */
	f[n++] = unless(SYS_ioctl, (uint8_t)(2 + 2 * ioctls));
	f[n++] = load(offsetof(struct seccomp_data, args[1]));
	n = allow_requests(f, n, vcpu_ioctls, ioctls);
	f[n++] = answer(SECCOMP_RET_TRAP);
	n = allow_calls(f, n, vcpu_calls, sizeof(vcpu_calls) / sizeof(vcpu_calls[0]));
	n = refuse_calls(f, n, vcpu_refused, sizeof(vcpu_refused) / sizeof(vcpu_refused[0]),
			 EACCES);
	n = refuse_calls(f, n, machine_refused,
			 sizeof(machine_refused) / sizeof(machine_refused[0]), EACCES);
	n = allow_but(f, n, SYS_fcntl, machine_denied_fcntls,
		      sizeof(machine_denied_fcntls) / sizeof(machine_denied_fcntls[0]),
		      SECCOMP_RET_TRAP);
	n = allow_without(f, n, SYS_mmap, PROT_EXEC);
	n = allow_without(f, n, SYS_mprotect, PROT_EXEC);
	/* To kick the other vCPUs, and to give the thread its name. */
	n = trap_unless(f, n, SYS_tgkill, BPF_JEQ, (uint32_t)getpid());
	/* The C library may want to name memory, too (PR_SET_VMA). */
	n = allow_of(f, n, SYS_prctl, names, sizeof(names) / sizeof(names[0]),
		     SECCOMP_RET_ERRNO | EINVAL);
	f[n++] = answer(SECCOMP_RET_TRAP);
	error = filter_install(f, n, 0);
	return error ? error : 1;
}

/**
 * pv_confine_backend() - Leave this process, a vhost-user back-end, only what it needs
 * @event:	As for pv_confine_machine(), and so are @status and @patience
 *
 * As pv_confine_process(), but it also accepts connections, has taps of its own, and reports what
 * it may not do.
 *
 * Return: as pv_confine_machine()
 */
int pv_confine_backend(int event, int status, int patience)
{
	struct sock_filter f[128 + 2 * (2 * CALLS_MAX + IOCTLS_MAX)];
	const size_t ioctls = sizeof(backend_ioctls) / sizeof(backend_ioctls[0]);
	int ruleset = make_ruleset(false, false), error;
	size_t n;

	mallopt(M_ARENA_MAX, 1); /* to trim another arena, the C library opens a file */
	load_unwinder();
	error = confine_threads(ruleset, 0);
	if (error)
		return error;
	n = filter_head(f);
	n = allow_calls(f, n, process_calls, sizeof(process_calls) / sizeof(process_calls[0]));
	n = allow_calls(f, n, backend_calls, sizeof(backend_calls) / sizeof(backend_calls[0]));
	n = refuse_calls(f, n, refused_calls, sizeof(refused_calls) / sizeof(refused_calls[0]),
			 EACCES);
	f[n++] = unless(SYS_ioctl, (uint8_t)(2 + 2 * ioctls));
	f[n++] = load(offsetof(struct seccomp_data, args[1]));
	n = allow_requests(f, n, backend_ioctls, ioctls);
	f[n++] = answer(SECCOMP_RET_TRAP);
	error = confine_calls(f, n, event, status, patience);
	if (error)
		return error;
	return ruleset >= 0 ? PV_CONFINED_FILES | PV_CONFINED_CALLS : PV_CONFINED_CALLS;
}

/**
 * pv_machine_stopped() - What has stopped a thread of the confined process
 * @thread:	Room for 16 bytes: gets the thread's name
 *
 * Return: the number of the system call; -1: none was stopped
 */
int pv_machine_stopped(char *thread)
{
	if (!__atomic_load_n(&process.stopped, __ATOMIC_ACQUIRE))
		return -1;
	memcpy(thread, process.thread, sizeof(process.thread));
	return process.call;
}

/**
 * pv_machine_hold() - Whether the calling thread now does what may take long and needs no other
 * @held:	Then the handler of a stopped thread waits; its patience begins anew with false
 *
 * The handler does not wait for the calling thread if that one is stopped itself.
 */
void pv_machine_hold(bool held)
{
	__atomic_store_n(&process.holder, held ? gettid() : 0, __ATOMIC_RELEASE);
}

/**
 * pv_spawn_sibling() - Run a program in a new child of this process's parent
 * @argv:	The program's path and arguments, with a NULL at the end
 * @from:	Descriptors that the child gets
 * @to:		Their numbers in the child, at least 3
 * @count:	How many
 *
 * The child has a session of its own, and /dev/null in the place of standard input and output. All
 * signals have their default actions.
 *
 * Return: the child's id, or -errno
 */
int pv_spawn_sibling(char *const *argv, const int *from, const int *to, size_t count)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC), room = null + 1;
	long pid;

	for (size_t i = 0; i < count; i++) { /* behind every number that is used */
		room = from[i] >= room ? from[i] + 1 : room;
		room = to[i] >= room ? to[i] + 1 : room;
	}
	if (null < 0)
		return -errno;
	/* CLONE_VFORK without CLONE_VM: the parent goes on when the program runs or has failed. */
	pid = syscall(SYS_clone, CLONE_PARENT | CLONE_VFORK | SIGCHLD, NULL, NULL, NULL, NULL);
	if (pid) {
		int error = pid < 0 ? -errno : 0;

		close(null);
		return error ? error : (int)pid;
	}
	for (int sig = 1; sig < _NSIG; sig++)
		signal(sig, SIG_DFL);
	setsid();
	dup2(null, 0);
	dup2(null, 1);
	for (size_t i = 0; i < count; i++)
		if (dup3(from[i], room + (int)i, O_CLOEXEC) < 0)
			_exit(127);
	for (size_t i = 0; i < count; i++)
		if (dup2(room + (int)i, to[i]) < 0)
			_exit(127);
	execv(argv[0], argv);
	_exit(127);
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
		{SYS_open, "open"},
		{SYS_openat, "openat"},
		{SYS_socket, "socket"},
		{SYS_connect, "connect"},
		{SYS_execve, "execve"},
		{SYS_execveat, "execveat"},
		{SYS_fork, "fork"},
		{SYS_vfork, "vfork"},
		{SYS_clone, "clone"},
		{SYS_clone3, "clone3"},
		{SYS_ptrace, "ptrace"},
		{SYS_mmap, "mmap"},
		{SYS_mprotect, "mprotect"},
		{SYS_ioctl, "ioctl"},
		{SYS_kill, "kill"},
		{SYS_tgkill, "tgkill"},
		{SYS_mount, "mount"},
		{SYS_bpf, "bpf"},
		{SYS_unshare, "unshare"},
		{SYS_setns, "setns"},
		{SYS_prctl, "prctl"},
		{SYS_bind, "bind"},
		{SYS_sendmsg, "sendmsg"},
		{SYS_setuid, "setuid"},
		{SYS_socketpair, "socketpair"},
	};

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		if (names[i].call == call)
			return names[i].name;
	return NULL;
}
