// SPDX-License-Identifier: MIT
/*
 * The guest's init: it mounts file systems, loads modules, configures the network, runs one
 * command, reports its exit status to the VMM and powers off. It is one static program because
 * every fork and exec is slow in an emulated guest.
 *
 * Theory of operation
 * -------------------
 * The kernel command line tells init what to do (docs/images.md has the list):
 *
 *   pyvmm.net=NIC,ADDR/PREFIX[,ADDR/PREFIX]...[,gw=ADDR][,mtu=N][,peer=ADDR][,dns=ADDR]
 *                               NIC is a MAC address, a name such as eth0, or an interface index
 *   pyvmm.cmd=BASE64URL         argv; a NUL ends each argument. Without it, the command is in the
 *                               file /etc/pyvmm.cmd; without that, it is a shell
 *   pyvmm.stdin=port            the command's input comes by the guest port
 *   pyvmm.stdin=console         the command's input is the raw console, in which DLE EOT ends the
 *                               input and DLE DLE stands for one DLE
 *   pyvmm.hostname=NAME  pyvmm.term=TERM  pyvmm.tty=COLSxROWS  pyvmm.port=0|1  pyvmm.verbose
 *   pyvmm.panic=init
 *   pyvmm.agent                 run no command of its own, but wait for sessions
 *
 * What the kernel command line has no room for is in files, which the VMM packs behind the initrd:
 * the command; the directories of the host to mount (SHARES_FILE), of which one may become the
 * root; the directory in which the command begins (PLACE_FILE); the user who runs it (USER_FILE);
 * the root's own init (INIT_FILE).
 *
 * If the root has an init of its own, this program becomes that init once everything is mounted. It
 * comes back as another process then: systemd runs it as the unit UNIT, which runs the command and
 * takes sessions in the same way as process 1 does otherwise. Beside any other init it only takes
 * sessions, in a process that it leaves behind.
 *
 * No error here is fatal: init reports each failure in one line on the console and goes on to the
 * command.
 *
 * With a command and the guest port (pyvmm_port.h), the command's stdout and stderr are pipes. Init
 * relays them to the port, so that they are binary-safe and separate from kernel messages. Without
 * the port (on another VMM), they are the console, and the line "pyvmm-init: status N" reports the
 * status.
 *
 * If the VMM has a channel (pyvmm_port.h), it starts further commands at any time: sessions. Init
 * carries their streams in the same loop, and never waits for any of them.
 *
 * The power button (ACPI, kernel driver "button") ends the command by SIGTERM, and by SIGKILL after
 * BUTTON_MS, and then powers off. A shell on the console ends at once.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/genetlink.h>
#include <linux/if_addr.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "pyvmm_port.h"

#define NET_WAIT_MS 5000
/* After the command's end, init waits so long for more output of processes that it left behind. */
#define DRAIN_MS     1000
#define BUTTON_MS    3000 /* after the power button, the command has so long to end itself */
#define HANGUP_MS    1000 /* a session's command that nobody waits for has so long after SIGHUP */
#define SHARES_FILE  "/etc/pyvmm.shares"
#define READ_AHEAD   "512" /* KiB that the kernel reads at a time from a directory of the host */
#define INIT_FILE    "/etc/pyvmm.init"
#define COMMAND_FILE "pyvmm.cmd" /* this and the next two are in /etc; for the unit, UNIT_NEEDS */
#define PLACE_FILE   "pyvmm.place"
#define USER_FILE    "pyvmm.user"
#define UNIT	     "pyvmm-command.service" /* of systemd, which runs the command */
#define UNITS	     "/run/systemd/system"
#define UNIT_NEEDS   "/run/pyvmm" /* the directory of what the unit needs */
#define VIRTIO_BLOCK "0x0002\n"	  /* the id of disks, in sysfs */
#define PAGE_SIZE    4096
#define CHANNEL_SIZE (CHANNEL_PAGES * PAGE_SIZE)
#define DLE	     0x10
#define EOT	     0x04

static bool have_port;
static char *page;    /* the page of GUEST_PAGE; NULL: output goes by bytes */
static bool answers;  /* whether the VMM answers each GUEST_WRITE */
static char *channel; /* the pages of GUEST_CHANNEL; NULL: the VMM has no channel */
static int bell = -1; /* the serial port on which the VMM rings */
static bool verbose;
static char *command; /* argv; a NUL ends each argument, and one more the whole */
static size_t command_size;
static char **argv_out;
static bool stdin_console, stdin_port;
static bool agent_wanted;
static bool rooted;  /* whether the root is a tree of the host's */
static bool pressed; /* whether the power button has been pressed */
static const char *hostname = "guest";
static const char *term = "vt100";
static const char *panic_how = "";
static const char *window = "";
static char **nic_specs;
static size_t nic_count;
static const char *peer;
static const char *directory = "/root"; /* in which the command begins */
static char *command_user = "";		/* who runs the command: USER_FILE; empty: root */
static char *tree_init = "";		/* the root's own init: INIT_FILE; empty: none */
static bool tree_systemd;		/* whether that is systemd */
static bool in_unit;			/* whether this is the unit, which systemd has started */
static bool beside;			/* whether another program is process 1 */

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Write one line to the console. */
static void say(const char *format, ...)
{
	char line[512];
	va_list args;
	int n = snprintf(line, sizeof(line), "pyvmm-init: ");

	va_start(args, format);
	vsnprintf(line + n, sizeof(line) - (size_t)n - 1, format, args);
	va_end(args);
	strcat(line, "\n");
	if (write(STDERR_FILENO, line, strlen(line)) < 0)
		return; /* without a console, nobody can be told */
}

static void tell(unsigned int opcode, unsigned int value)
{
	if (have_port)
		pyvmm_control(opcode, value);
}

static long now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Change the size of @old, which may be NULL. Without memory, init cannot do anything any more. */
static void *resize(void *old, size_t size)
{
	void *p = realloc(old, size);

	if (!p) {
		say("out of memory");
		_exit(1); /* at which the kernel panics */
	}
	return p;
}

/* Write all of @data to @fd, which may be a pipe; returns false after an error. */
static bool write_all(int fd, const char *data, size_t size)
{
	while (size) {
		ssize_t n = write(fd, data, size);

		if (n < 0) {
			struct pollfd p = {.fd = fd, .events = POLLOUT};

			if (errno == EAGAIN && poll(&p, 1, -1) > 0)
				continue;
			if (errno == EINTR)
				continue;
			return false;
		}
		data += n;
		size -= (size_t)n;
	}
	return true;
}

/*
 * Read all of @path and add a NUL. Returns the text, to be freed, and its length without the NUL in
 * @length, which may be NULL. If the file cannot be read, the text is empty.
 */
static char *read_file(const char *path, size_t *length)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	size_t have = 0, room = 4096;
	char *data = resize(NULL, room);

	for (ssize_t n = 1; fd >= 0 && n > 0;) {
		if (room - have < 2)
			data = resize(data, room *= 2);
		n = read(fd, data + have, room - have - 1);
		have += n > 0 ? (size_t)n : 0;
	}
	if (fd >= 0)
		close(fd);
	data[have] = 0;
	if (length)
		*length = have;
	return data;
}

/* Read the file @name of those that the VMM has packed, as read_file() does. */
static char *read_packed(const char *name, size_t *length)
{
	char path[64];

	snprintf(path, sizeof(path), "%s/%s", in_unit ? UNIT_NEEDS : "/etc", name);
	return read_file(path, length);
}

/* --- set-up --- */

static void mount_all(void)
{
	static const struct {
		const char *type, *path, *data;
	} mounts[] = {
		{"proc", "/proc", NULL},	  {"sysfs", "/sys", NULL},
		{"devtmpfs", "/dev", "mode=755"}, {"devpts", "/dev/pts", "mode=620,ptmxmode=666"},
		{"tmpfs", "/tmp", "mode=1777"},	  {"tmpfs", "/run", "mode=755"},
	};
	static const char *const links[][2] = {
		{"/proc/self/fd", "/dev/fd"},
		{"fd/0", "/dev/stdin"},
		{"fd/1", "/dev/stdout"},
		{"fd/2", "/dev/stderr"},
	};

	for (size_t i = 0; i < sizeof(mounts) / sizeof(*mounts); i++) {
		mkdir(mounts[i].path, 0755);
		if (mount(mounts[i].type, mounts[i].path, mounts[i].type, MS_NOSUID,
			  mounts[i].data) &&
		    errno != EBUSY)
			say("cannot mount %s: %s", mounts[i].path, strerror(errno));
	}
	for (size_t i = 0; i < sizeof(links) / sizeof(*links); i++)
		if (symlink(links[i][0], links[i][1]) && errno != EEXIST)
			say("cannot make %s: %s", links[i][1], strerror(errno));
}

/* Use the guest port if this machine has one. @choice is the value of pyvmm.port, or NULL. */
static void open_port(const char *choice)
{
	if (choice && *choice == '0')
		return;
	if (ioperm(PORT_GUEST_CONTROL, PORT_GUEST_COUNT, 1)) {
		say("no guest port: ioperm: %s", strerror(errno));
		return;
	}
	have_port = choice || pyvmm_present();
	if (!have_port)
		ioperm(PORT_GUEST_CONTROL, PORT_GUEST_COUNT, 0);
}

/*
 * Make @count pages that can be named to the VMM, and put their page frame numbers into @frames;
 * returns NULL if this is impossible. The pages must keep their physical addresses. They are mapped
 * shared so that fork() does not copy them, and a pipe that nobody reads holds references to them
 * so that the kernel does not move them.
 */
static char *share(size_t count, uint32_t *frames)
{
	char *p = mmap(NULL, count * PAGE_SIZE, PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	struct iovec piece = {.iov_base = p, .iov_len = count * PAGE_SIZE};
	uint64_t entries[CHANNEL_PAGES] = {0};
	int ends[2], map;

	if (p == MAP_FAILED || pipe2(ends, O_CLOEXEC))
		return NULL;
	memset(p, 0, count * PAGE_SIZE);
	if (vmsplice(ends[1], &piece, 1, 0) != (ssize_t)piece.iov_len)
		return NULL;
	/*
	 * Documentation/admin-guide/mm/pagemap.rst: bit 63 says that the page is present, bits
	 * 0..54 are its frame number.
	 */
	map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (map < 0)
		return NULL;
	if (pread(map, entries, count * sizeof(*entries),
		  (off_t)((uintptr_t)p / PAGE_SIZE * sizeof(*entries))) < 0)
		p = NULL;
	close(map);
	for (size_t i = 0; i < count; i++) {
		uint64_t frame = entries[i] & ((1ULL << 55) - 1);

		if (!(entries[i] >> 63) || !frame || frame >= 1 << 24)
			return NULL;
		frames[i] = (uint32_t)frame;
	}
	return p;
}

/* Name a page to the VMM for the output and the input of the command. */
static void share_page(void)
{
	uint32_t frame;

	page = share(1, &frame);
	if (!page)
		return;
	tell(GUEST_PAGE, frame);
	answers = *(volatile unsigned int *)page == GUEST_ANSWERS;
}

/*
 * Load the modules that the file @file lists by their paths below /lib/modules/RELEASE. The list
 * has each module after the modules that it needs.
 */
static void load_modules(const char *file)
{
	char *list = read_file(file, NULL);
	struct utsname uts;
	char path[PATH_MAX], *save;

	uname(&uts);
	for (char *name = strtok_r(list, "\n", &save); name; name = strtok_r(NULL, "\n", &save)) {
		int fd;

		snprintf(path, sizeof(path), "/lib/modules/%s/%s", uts.release, name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0) {
			say("module %s: %s", path, strerror(errno));
			continue;
		}
		if (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST)
			say("module %s: %s", path, strerror(errno));
		close(fd);
	}
	free(list);
}

/* Whether there is a virtio device of the kind @id, as sysfs spells it with a newline. */
static bool has_device(const char *id)
{
	DIR *devices = opendir("/sys/bus/virtio/devices");
	bool found = false;

	for (struct dirent *entry; !found && devices && (entry = readdir(devices));) {
		char path[PATH_MAX], *text;

		snprintf(path, sizeof(path), "/sys/bus/virtio/devices/%.64s/device", entry->d_name);
		text = read_file(path, NULL);
		found = !strcmp(text, id);
		free(text);
	}
	if (devices)
		closedir(devices);
	return found;
}

/* --- directories of the host --- */

/*
 * Make the directory @path, which is absolute, and those above it; returns 0 or an errno. Those
 * above are looked at only if they are missing: in a tree of the host's, each look is a request.
 */
static int make_directories(char *path)
{
	char *slash = strrchr(path, '/');
	struct stat s;

	if (!mkdir(path, 0755))
		return 0;
	if (errno == ENOENT && slash > path) {
		int error;

		*slash = 0;
		error = make_directories(path);
		*slash = '/';
		if (error || !mkdir(path, 0755))
			return error;
		if (errno != EEXIST)
			return errno; /* else it ends in a slash or a dot, or somebody was faster */
	}
	if (stat(path, &s))
		return errno;
	return S_ISDIR(s.st_mode) ? 0 : ENOTDIR;
}

/*
 * Have the kernel read more at a time from the file system at @path: it has 128 KiB for all disks,
 * and a request to virtiofsd costs as much as the data of one.
 */
static void read_ahead(const char *path)
{
	char name[64];
	struct stat s;
	int fd;

	if (stat(path, &s))
		return;
	snprintf(name, sizeof(name), "/sys/class/bdi/%u:%u/read_ahead_kb", major(s.st_dev),
		 minor(s.st_dev));
	fd = open(name, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return; /* it reads less, then */
	write_all(fd, READ_AHEAD, strlen(READ_AHEAD));
	close(fd);
}

static void no_share(unsigned int number, const char *path, int error)
{
	say("cannot mount %.200s: %s", path, strerror(error));
	tell(GUEST_NO_SHARE, number << 16 | (unsigned int)error);
}

/*
 * Make the file system with tag @tag the root: read-only, below an overlay in memory, which takes
 * what the guest writes. The file systems of mount_all() move there: /proc first, by which the
 * others are named once this process is in the tree, where the tree's links lead where they should.
 * Returns 0 or an errno, with @number set to SHARE_OVERLAY if the overlay has failed.
 */
static int enter_root(const char *tag, unsigned int *number)
{
	static const char *const moved[] = {"/sys", "/dev", "/tmp", "/run"};
	int open_at[sizeof(moved) / sizeof(*moved)], modules;
	struct utsname uts;
	char from[32], to[128];

	mkdir("/.pyvmm", 0700);
	mkdir("/.pyvmm/lower", 0755);
	mkdir("/.pyvmm/upper", 0755);
	mkdir("/.pyvmm/root", 0755);
	if (mount(tag, "/.pyvmm/lower", "virtiofs", MS_RDONLY, NULL))
		return errno;
	read_ahead("/.pyvmm/lower");
	*number = SHARE_OVERLAY;
	if (mount("tmpfs", "/.pyvmm/upper", "tmpfs", 0, "mode=755") ||
	    mkdir("/.pyvmm/upper/u", 0755) || mkdir("/.pyvmm/upper/w", 0755) ||
	    mount("overlay", "/.pyvmm/root", "overlay", 0,
		  "lowerdir=/.pyvmm/lower,upperdir=/.pyvmm/upper/u,workdir=/.pyvmm/upper/w"))
		return errno;
	uname(&uts);
	snprintf(to, sizeof(to), "/lib/modules/%s", uts.release);
	modules = open(to, O_PATH | O_DIRECTORY | O_CLOEXEC);
	for (size_t i = 0; i < sizeof(moved) / sizeof(*moved); i++)
		open_at[i] = open(moved[i], O_PATH | O_DIRECTORY | O_CLOEXEC);
	mkdir("/.pyvmm/root/proc", 0755);
	if (mount("/proc", "/.pyvmm/root/proc", NULL, MS_MOVE, NULL) || chdir("/.pyvmm/root") ||
	    mount(".", "/", NULL, MS_MOVE, NULL) || chroot("."))
		return errno;
	if (modules >= 0) {
		snprintf(from, sizeof(from), "/proc/self/fd/%d", modules);
		if (!make_directories(to))
			mount(from, to, NULL, MS_BIND, NULL); /* without it, modprobe finds none */
		close(modules);
	}
	for (size_t i = 0; i < sizeof(moved) / sizeof(*moved); i++) {
		snprintf(from, sizeof(from), "/proc/self/fd/%d", open_at[i]);
		mkdir(moved[i], 0755);
		if (mount(from, moved[i], NULL, MS_MOVE, NULL))
			return errno;
		close(open_at[i]);
	}
	rooted = true;
	mkdir("/dev/shm", 0755);
	if (mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"))
		say("cannot mount /dev/shm: %s", strerror(errno));
	return 0;
}

/*
 * Mount the file systems that SHARES_FILE lists: for each the tag, the path and one of "ro", "rw"
 * and "root", with a NUL after each word. The VMM learns whether that has succeeded. The root comes
 * first.
 */
static void mount_shares(void)
{
	size_t size;
	char *list = read_file(SHARES_FILE, &size), *at = list;
	unsigned int number = 0, mounted = 0;

	if (size)
		load_modules("/etc/modules.shares");
	for (; at < list + size; number++) {
		char *tag = at, *path = tag + strlen(tag) + 1, *options;
		unsigned long flags = MS_NOSUID | MS_NODEV;
		unsigned int which = number;
		int error = EINVAL;

		if (path < list + size) {
			options = path + strlen(path) + 1;
			at = options < list + size ? options + strlen(options) + 1 : list + size;
			if (options < list + size && !strcmp(options, "ro"))
				flags |= MS_RDONLY;
			if (options < list + size && !strcmp(options, "root"))
				error = enter_root(tag, &which);
			else if (!(error = make_directories(path))) {
				if (mount(tag, path, "virtiofs", flags, NULL))
					error = errno;
				else
					read_ahead(path);
			}
		} else {
			at = list + size;
			path = list;
		}
		if (error)
			no_share(which, path, error);
		else
			mounted++;
	}
	if (size)
		tell(GUEST_SHARES, mounted);
	free(list);
}

static int base64_value(char c)
{
	if (c >= 'A' && c <= 'Z')
		return c - 'A';
	if (c >= 'a' && c <= 'z')
		return c - 'a' + 26;
	if (c >= '0' && c <= '9')
		return c - '0' + 52;
	return c == '-' ? 62 : c == '_' ? 63 : -1;
}

/*
 * Decode base64url (RFC 4648, section 5) without its padding to @out, which has room for it;
 * returns the length.
 */
static size_t base64_decode(const char *in, char *out)
{
	unsigned int bits = 0, have = 0;
	size_t n = 0;

	for (; *in && *in != '='; in++) {
		int v = base64_value(*in);

		if (v < 0) {
			say("pyvmm.cmd is not base64url at '%.8s'", in);
			return 0;
		}
		bits = (bits << 6 | (unsigned int)v) & 0xffffff;
		have += 6;
		if (have >= 8) {
			have -= 8;
			out[n++] = (char)(bits >> have & 0xff);
		}
	}
	return n;
}

/* Split @command at its NULs into argv_out; returns argc. */
static size_t split_command(void)
{
	size_t argc = 0, room = 0;

	/* The NUL behind the command ends its last argument if nothing else does. */
	for (size_t at = 0; at < command_size; at += strlen(command + at) + 1) {
		if (argc == room)
			argv_out = resize(argv_out, ((room += 64) + 1) * sizeof(*argv_out));
		argv_out[argc++] = command + at;
	}
	argv_out =
		resize(argv_out, (argc + 2) * sizeof(*argv_out)); /* a shell may take the first */
	argv_out[argc] = argv_out[argc + 1] = NULL;
	return argc;
}

/* The text after @key= in @word; "" if @word is just @key; NULL if it is another word. */
static char *value_of(char *word, const char *key)
{
	size_t n = strlen(key);

	if (strncmp(word, key, n))
		return NULL;
	return word[n] == '=' ? word + n + 1 : word[n] ? NULL : word + n;
}

/*
 * Take the pyvmm.* words from /proc/cmdline. As for the kernel, double quotes group. Returns the
 * value of pyvmm.port, or NULL.
 */
static const char *parse_cmdline(void)
{
	const char *port = NULL;
	char *p = read_file("/proc/cmdline", NULL),
	     *v; /* its words are used as long as init runs */
	bool cmd_given = false;

	while (*p) {
		char *word, *to;
		bool quoted = false, more;

		p += strspn(p, " \n");
		for (word = to = p; *p && (quoted || (*p != ' ' && *p != '\n')); p++) {
			if (*p == '"')
				quoted = !quoted;
			else
				*to++ = *p;
		}
		more = *p;
		*to = 0;
		if (more)
			p++;
		if ((v = value_of(word, "pyvmm.cmd"))) {
			command = resize(command, strlen(v) + 1);
			command_size = base64_decode(v, command);
			command[command_size] = 0;
			cmd_given = true;
		} else if ((v = value_of(word, "pyvmm.net"))) {
			nic_specs = resize(nic_specs, (nic_count + 1) * sizeof(*nic_specs));
			nic_specs[nic_count++] = v;
		} else if ((v = value_of(word, "pyvmm.hostname"))) {
			hostname = v;
		} else if ((v = value_of(word, "pyvmm.term"))) {
			term = v;
		} else if ((v = value_of(word, "pyvmm.tty"))) {
			window = v;
		} else if ((v = value_of(word, "pyvmm.stdin"))) {
			stdin_console = !strcmp(v, "console");
			stdin_port = !strcmp(v, "port");
		} else if ((v = value_of(word, "pyvmm.port"))) {
			port = v;
		} else if ((v = value_of(word, "pyvmm.panic"))) {
			panic_how = v;
		} else if (value_of(word, "pyvmm.agent")) {
			agent_wanted = true;
		} else if (value_of(word, "pyvmm.verbose")) {
			verbose = true;
		}
	}
	if (!cmd_given)
		command = read_packed(COMMAND_FILE, &command_size);
	return port;
}

/* --- network: rtnetlink, because forking `ip` would be slow --- */

static int nl_fd = -1;
static unsigned int nl_seq;

struct request {
	struct nlmsghdr h;
	union {
		struct ifinfomsg link;
		struct ifaddrmsg addr;
		struct rtmsg route;
	} u;
	char attrs[128];
};

static void request_init(struct request *r, int type, int flags, size_t body)
{
	memset(r, 0, sizeof(*r));
	r->h.nlmsg_type = (unsigned short)type;
	r->h.nlmsg_flags = (unsigned short)(NLM_F_REQUEST | NLM_F_ACK | flags);
	r->h.nlmsg_len = (unsigned int)NLMSG_LENGTH(body);
}

static void request_attr(struct request *r, int type, const void *data, size_t size)
{
	struct rtattr *a = (struct rtattr *)((char *)r + NLMSG_ALIGN(r->h.nlmsg_len));

	a->rta_type = (unsigned short)type;
	a->rta_len = (unsigned short)RTA_LENGTH(size);
	memcpy(RTA_DATA(a), data, size);
	r->h.nlmsg_len = (unsigned int)(NLMSG_ALIGN(r->h.nlmsg_len) + RTA_ALIGN(a->rta_len));
}

/* Send @r and wait for its acknowledgement; returns 0 or an errno. */
static int request_do(struct request *r)
{
	char answer[4096];

	r->h.nlmsg_seq = ++nl_seq;
	if (send(nl_fd, r, r->h.nlmsg_len, 0) < 0)
		return errno;
	for (;;) {
		ssize_t n = recv(nl_fd, answer, sizeof(answer), 0);
		struct nlmsghdr *h = (struct nlmsghdr *)answer;

		if (n < 0)
			return errno;
		if (n >= (ssize_t)NLMSG_LENGTH(sizeof(struct nlmsgerr)) &&
		    h->nlmsg_type == NLMSG_ERROR && h->nlmsg_seq == nl_seq)
			return -((struct nlmsgerr *)NLMSG_DATA(h))->error;
	}
}

/* Set the interface @index up, and set its MTU if @mtu is not 0; returns 0 or an errno. */
static int link_up(int index, unsigned int mtu)
{
	struct request r;

	request_init(&r, RTM_NEWLINK, 0, sizeof(r.u.link));
	r.u.link.ifi_index = index;
	r.u.link.ifi_flags = IFF_UP;
	r.u.link.ifi_change = IFF_UP;
	if (mtu)
		request_attr(&r, IFLA_MTU, &mtu, sizeof(mtu));
	return request_do(&r);
}

/* Convert @text to a binary @address; returns its length, 4 or 16, or 0 if @text is no address. */
static size_t parse_address(const char *text, void *address)
{
	if (inet_pton(AF_INET, text, address) == 1)
		return 4;
	return inet_pton(AF_INET6, text, address) == 1 ? 16 : 0;
}

static int address_add(int index, const void *address, size_t size, unsigned int prefix)
{
	struct request r;

	request_init(&r, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, sizeof(r.u.addr));
	r.u.addr.ifa_family = size == 4 ? AF_INET : AF_INET6;
	r.u.addr.ifa_prefixlen = (unsigned char)prefix;
	r.u.addr.ifa_index = (unsigned int)index;
	/* Without duplicate address detection, the address can be used at once. */
	r.u.addr.ifa_flags = size == 4 ? 0 : IFA_F_NODAD;
	request_attr(&r, IFA_LOCAL, address, size);
	request_attr(&r, IFA_ADDRESS, address, size);
	if (size == 4 && prefix < 31) {
		unsigned int broadcast;

		memcpy(&broadcast, address, 4);
		broadcast |= htonl(0xffffffff >> prefix);
		request_attr(&r, IFA_BROADCAST, &broadcast, 4);
	}
	return request_do(&r);
}

static int route_default(int index, const void *gateway, size_t size)
{
	struct request r;

	request_init(&r, RTM_NEWROUTE, NLM_F_CREATE, sizeof(r.u.route));
	r.u.route.rtm_family = size == 4 ? AF_INET : AF_INET6;
	r.u.route.rtm_table = RT_TABLE_MAIN;
	r.u.route.rtm_protocol = RTPROT_BOOT;
	r.u.route.rtm_scope = RT_SCOPE_UNIVERSE;
	r.u.route.rtm_type = RTN_UNICAST;
	request_attr(&r, RTA_GATEWAY, gateway, size);
	request_attr(&r, RTA_OIF, &index, sizeof(index));
	return request_do(&r);
}

static bool parse_mac(const char *text, unsigned char mac[6])
{
	int used = 0;

	return sscanf(text, "%2hhx:%2hhx:%2hhx:%2hhx:%2hhx:%2hhx%n", mac, mac + 1, mac + 2, mac + 3,
		      mac + 4, mac + 5, &used) == 6 &&
	       !text[used];
}

/*
 * The index of the interface @name, which is a MAC address, an interface name or an index. 0 if
 * there is no such interface (yet).
 */
static int find_link(const char *name)
{
	struct if_nameindex *all;
	unsigned char mac[6];
	int found = 0;

	if (!parse_mac(name, mac)) {
		char *end, buffer[IF_NAMESIZE];
		unsigned long index = strtoul(name, &end, 10);

		if (*name && !*end)
			return if_indextoname((unsigned int)index, buffer) ? (int)index : 0;
		return (int)if_nametoindex(name);
	}
	all = if_nameindex();
	for (struct if_nameindex *i = all; i && i->if_index && !found; i++) {
		struct ifreq request = {0};

		snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", i->if_name);
		if (!ioctl(nl_fd, SIOCGIFHWADDR, &request) &&
		    !memcmp(request.ifr_hwaddr.sa_data, mac, 6))
			found = (int)i->if_index;
	}
	if_freenameindex(all);
	return found;
}

/* Have programs ask @address for names, too. */
static void name_server(const char *address)
{
	static bool ours;
	FILE *f;

	/* The host's file may be a link into its /run, and names servers of the host's network. */
	if (rooted && !ours)
		unlink("/etc/resolv.conf"); /* in the overlay only */
	ours = true;
	f = fopen("/etc/resolv.conf", "ae");
	if (f)
		fprintf(f, "nameserver %s\n", address);
	if (!f || fclose(f)) /* which writes the line */
		say("cannot write /etc/resolv.conf: %s", strerror(errno));
}

/* Configure one interface by @spec, a value of pyvmm.net; returns whether the interface exists. */
static bool configure_nic(char *spec, long deadline)
{
	/* Before strtok_r() cuts the text: of two bytes at most one begins an address. */
	char **addresses = resize(NULL, (strlen(spec) / 2 + 1) * sizeof(*addresses));
	char *save, *name = strtok_r(spec, ",", &save), *gateway = NULL;
	unsigned int count = 0, mtu = 0;
	unsigned char binary[16];
	int index, error;
	size_t size;

	if (!name) {
		say("pyvmm.net is empty");
		free(addresses);
		return false;
	}
	for (char *word; (word = strtok_r(NULL, ",", &save));) {
		if (!strncmp(word, "gw=", 3))
			gateway = word + 3;
		else if (!strncmp(word, "mtu=", 4))
			mtu = (unsigned int)strtoul(word + 4, NULL, 10);
		else if (!strncmp(word, "dns=", 4))
			name_server(word + 4);
		else if (!strncmp(word, "peer=", 5))
			peer = peer ? peer : word + 5;
		else
			addresses[count++] = word;
	}
	while (!(index = find_link(name)) && now_ms() < deadline)
		usleep(2000);
	if (!index) {
		say("no network interface %s after %d ms", name, NET_WAIT_MS);
		free(addresses);
		return false;
	}
	error = link_up(index, mtu);
	if (error) {
		say("cannot set up %s with MTU %u: %s", name, mtu, strerror(error));
		if (mtu)
			link_up(index, 0);
	}
	for (unsigned int i = 0; i < count; i++) {
		char *slash = strchr(addresses[i], '/');
		unsigned long prefix = 0;

		if (slash) {
			*slash = 0;
			prefix = strtoul(slash + 1, NULL, 10);
		}
		size = parse_address(addresses[i], binary);
		if (!size || (slash && prefix > size * 8)) {
			say("'%s' is not an address", addresses[i]);
			continue;
		}
		error = address_add(index, binary, size, (unsigned int)(slash ? prefix : size * 8));
		if (error)
			say("cannot add %s to %s: %s", addresses[i], name, strerror(error));
	}
	free(addresses);
	if (gateway) {
		peer = peer ? peer : gateway;
		size = parse_address(gateway, binary);
		error = size ? route_default(index, binary, size) : EINVAL;
		if (error && error != EEXIST) /* an earlier interface has the default route */
			say("cannot route by %s: %s", gateway, strerror(error));
	}
	return true;
}

static void configure_network(void)
{
	long deadline = now_ms() + NET_WAIT_MS;
	unsigned int up = 0;

	nl_fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
	if (nl_fd < 0) {
		say("no rtnetlink: %s", strerror(errno));
		return;
	}
	link_up(1, 0); /* lo always has index 1 */
	for (size_t i = 0; i < nic_count; i++)
		up += configure_nic(nic_specs[i], deadline);
	close(nl_fd);
	if (nic_count)
		tell(GUEST_NET_UP, up);
}

/* --- the power button --- */

/* Find the attribute @type in the @size bytes at @a; NULL if there is none. */
static struct nlattr *attribute(void *a, size_t size, int type)
{
	while (size >= sizeof(struct nlattr)) {
		struct nlattr *one = a;
		size_t length = (one->nla_len + 3U) & ~3U;

		if (one->nla_len < sizeof(struct nlattr) || one->nla_len > size)
			break;
		if ((one->nla_type & NLA_TYPE_MASK) == type)
			return one;
		if (length >= size)
			break;
		a = (char *)a + length;
		size -= length;
	}
	return NULL;
}

static void *payload(struct nlattr *a, size_t *size)
{
	*size = a->nla_len - sizeof(struct nlattr);
	return (char *)a + sizeof(struct nlattr);
}

/*
 * The id of multicast group @name in the answer to CTRL_CMD_GETFAMILY, which has @size bytes; 0 if
 * there is none.
 */
static unsigned int find_group(struct nlmsghdr *h, size_t size, const char *name)
{
	struct nlattr *groups, *one;
	size_t left;
	char *at;

	if (size < NLMSG_LENGTH(GENL_HDRLEN) || h->nlmsg_type != GENL_ID_CTRL)
		return 0;
	groups = attribute((char *)NLMSG_DATA(h) + GENL_HDRLEN, size - NLMSG_LENGTH(GENL_HDRLEN),
			   CTRL_ATTR_MCAST_GROUPS);
	if (!groups)
		return 0;
	at = payload(groups, &left);
	while (left >= sizeof(struct nlattr) &&
	       (one = (struct nlattr *)at)->nla_len >= sizeof(struct nlattr) &&
	       one->nla_len <= left) {
		size_t inner, step = (one->nla_len + 3U) & ~3U;
		void *attrs = payload(one, &inner);
		struct nlattr *label = attribute(attrs, inner, CTRL_ATTR_MCAST_GRP_NAME);
		struct nlattr *id = attribute(attrs, inner, CTRL_ATTR_MCAST_GRP_ID);
		unsigned int value;

		if (label && id && !strcmp((char *)label + sizeof(struct nlattr), name)) {
			memcpy(&value, (char *)id + sizeof(struct nlattr), sizeof(value));
			return value;
		}
		if (step >= left)
			break;
		at += step;
		left -= step;
	}
	return 0;
}

/*
 * Open a socket on which the kernel reports ACPI events (drivers/acpi/event.c); -1 if the kernel
 * does not report them.
 */
static int open_buttons(void)
{
	struct {
		struct nlmsghdr h;
		struct genlmsghdr g;
		struct nlattr a;
		char name[12];
	} ask = {.h = {.nlmsg_len = sizeof(ask),
		       .nlmsg_type = GENL_ID_CTRL,
		       .nlmsg_flags = NLM_F_REQUEST},
		 .g = {.cmd = CTRL_CMD_GETFAMILY, .version = 1},
		 .a = {.nla_len = sizeof(struct nlattr) + 11, .nla_type = CTRL_ATTR_FAMILY_NAME},
		 .name = "acpi_event"};
	char answer[4096];
	unsigned int group;
	ssize_t n;
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_GENERIC);

	if (fd < 0)
		return -1;
	if (send(fd, &ask, sizeof(ask), 0) == (ssize_t)sizeof(ask) &&
	    (n = recv(fd, answer, sizeof(answer), 0)) > 0 &&
	    (group = find_group((struct nlmsghdr *)answer, (size_t)n, "acpi_mc_group")) &&
	    !setsockopt(fd, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group, sizeof(group)) &&
	    !fcntl(fd, F_SETFL, O_NONBLOCK))
		return fd;
	close(fd);
	return -1;
}

/*
 * Read one event; returns whether it is the power button. struct acpi_genl_event begins with the
 * device's class.
 */
static bool power_button(int fd)
{
	char message[4096];
	ssize_t n = recv(fd, message, sizeof(message) - 1, 0);
	struct nlattr *event;

	if (n < (ssize_t)NLMSG_LENGTH(GENL_HDRLEN))
		return false;
	message[n] = 0;
	event = attribute((char *)NLMSG_DATA((struct nlmsghdr *)message) + GENL_HDRLEN,
			  (size_t)n - NLMSG_LENGTH(GENL_HDRLEN), 1);
	return event && !strncmp((char *)event + sizeof(struct nlattr), "button/power", 12);
}

/* --- the command --- */

/*
 * Open the terminal behind /dev/console, the last one that the kernel lists. Job control does not
 * work on /dev/console itself.
 */
static int open_tty(void)
{
	char *names = read_file("/sys/class/tty/console/active", NULL), *last;
	char path[PATH_MAX];

	names[strcspn(names, "\n")] = 0;
	last = strrchr(names, ' ');
	snprintf(path, sizeof(path), "/dev/%s", last ? last + 1 : names);
	free(names);
	return open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
}

static void set_window(int tty)
{
	struct winsize size = {0};

	if (sscanf(window, "%hux%hu", &size.ws_col, &size.ws_row) == 2)
		ioctl(tty, TIOCSWINSZ, &size);
}

/*
 * Find the line of @key, a name or a number, in the text @at of /etc/passwd or /etc/group. Returns
 * whether there is one; its first @count fields are in @fields then.
 */
static bool find_account(char *at, const char *key, char **fields, size_t count)
{
	char *line;

	while ((line = strsep(&at, "\n"))) {
		size_t n = 0;

		while (n < count && (fields[n] = strsep(&line, ":")))
			n++;
		if (n == count && (!strcmp(fields[0], key) || !strcmp(fields[2], key)))
			return true;
	}
	memset(fields, 0, count * sizeof(*fields));
	return false;
}

/* The shell of the command's user, in a root of the host's. */
static char *own_shell(void)
{
	static char sh[] = "/bin/sh";
	char *fields[7], *shell = NULL, *save, *text;

	if (*command_user) {
		text = strdup(command_user);
		for (char *line = strtok_r(text, "\n", &save); line;
		     line = strtok_r(NULL, "\n", &save))
			shell = line;
	} else if (find_account(read_file("/etc/passwd", NULL), "root", fields, 7)) {
		shell = fields[6];
	}
	return shell && !access(shell, X_OK) ? shell : sh;
}

static void set_environment(void)
{
	clearenv();
	/* Busybox' applets are in /bin; what somebody adds to the image comes before them. */
	setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
	setenv("HOME", "/root", 1);
	setenv("TERM", term, 1);
	if (rooted) { /* a distribution's programs want more than busybox does */
		setenv("USER", "root", 1);
		setenv("LOGNAME", "root", 1);
		setenv("SHELL", own_shell(), 1);
		/* Not LANG, with which each program reads a dozen files more, to no effect. */
		setenv("LC_CTYPE", "C.UTF-8", 1);
	}
	if (peer)
		setenv("PYVMM_PEER", peer, 1);
}

/* Let @uid open /dev/stdin, /dev/stdout and /dev/stderr, where they are pipes. */
static void give_streams(uid_t uid)
{
	struct stat s;

	for (int i = 0; i < 3; i++)
		if (!fstat(i, &s) && S_ISFIFO(s.st_mode))
			fchown(i, uid, (gid_t)-1);
}

/*
 * Become user @uid with these groups, the first of which is @gid, and with the environment of a
 * login; @shell may be unknown (NULL). If that fails, the command does not run.
 */
static void become_id(uid_t uid, gid_t gid, const gid_t *groups, size_t count, const char *name,
		      const char *home, const char *shell)
{
	give_streams(uid);
	if (setgroups(count, groups) || setgid(gid) || setuid(uid)) {
		say("cannot become user '%.200s': %s", name, strerror(errno));
		_exit(126);
	}
	setenv("USER", name, 1);
	setenv("LOGNAME", name, 1);
	setenv("HOME", home, 1);
	if (shell)
		setenv("SHELL", shell, 1);
}

/*
 * Become the user of the command, as USER_FILE says: "UID GID GROUP,... NAME HOME SHELL", in lines.
 * If that fails, the command does not run.
 */
static void become_command_user(void)
{
	char *lines[6], *save, *text = strdup(command_user);
	gid_t *groups = NULL;
	size_t count = 0;

	if (!text || !*text)
		return;
	for (int i = 0; i < 6; i++)
		if (!(lines[i] = strtok_r(i ? NULL : text, "\n", &save))) {
			say("%s is incomplete", USER_FILE);
			_exit(126);
		}
	for (char *group = strtok_r(lines[2], ",", &save); group;
	     group = strtok_r(NULL, ",", &save)) {
		groups = resize(groups, (count + 1) * sizeof(*groups));
		groups[count++] = (gid_t)strtoul(group, NULL, 10);
	}
	become_id((uid_t)strtoul(lines[0], NULL, 10), (gid_t)strtoul(lines[1], NULL, 10), groups,
		  count, lines[3], lines[4], lines[5]);
}

/* Take over the descriptors of a command, in the child process. */
static void take(int in, int out, int err, int tty)
{
	sigset_t none;

	if (have_port)
		ioperm(PORT_GUEST_CONTROL, PORT_GUEST_COUNT, 0);
	setsid();
	if (tty >= 0)
		ioctl(tty, TIOCSCTTY, 1);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	/* All these descriptors are above 2, see main(). */
	dup2(in, STDIN_FILENO);
	dup2(out, STDOUT_FILENO);
	dup2(err, STDERR_FILENO);
}

/* Become the program of @argv. */
static void __attribute__((noreturn)) become(char **argv)
{
	int error;

	execvp(argv[0], argv);
	error = errno;
	say("cannot run '%.200s': %s", argv[0], strerror(error));
	_exit(error == ENOENT || error == ENOTDIR ? 127 : 126);
}

/* Run the command, in the child process. */
static void __attribute__((noreturn)) run_command(int in, int out, int err, int tty)
{
	take(in, out, err, tty);
	become_command_user();
	if (chdir(directory) && chdir(getenv("HOME")) && chdir("/"))
		say("cannot enter %.200s: %s", directory, strerror(errno));
	become(argv_out);
}

/*
 * Pass the console's input to the command: raw bytes, in which DLE EOT is the end and DLE DLE
 * stands for one DLE. This is a process of its own, so that a command that does not read its input
 * cannot stop the relay of its output.
 */
static void __attribute__((noreturn)) feed_stdin(int tty, int out)
{
	char in[1024], text[1024];
	bool escaped = false;

	for (;;) {
		ssize_t n = read(tty, in, sizeof(in));
		size_t have = 0;

		if (n <= 0)
			_exit(0);
		for (ssize_t i = 0; i < n; i++) {
			if (!escaped && in[i] == DLE) {
				escaped = true;
				continue;
			}
			if (escaped && in[i] == EOT) {
				write_all(out, text, have);
				_exit(0);
			}
			escaped = false;
			text[have++] = in[i];
		}
		if (!write_all(out, text, have))
			_exit(0);
	}
}

static pid_t start_feeder(int tty, int *command_in)
{
	struct termios mode;
	int ends[2];
	pid_t pid;

	if (pipe2(ends, O_CLOEXEC)) {
		say("pipe: %s", strerror(errno));
		return -1;
	}
	if (!tcgetattr(tty, &mode)) {
		cfmakeraw(&mode);
		tcsetattr(tty, TCSANOW, &mode);
	}
	pid = fork();
	if (!pid) {
		signal(SIGPIPE, SIG_DFL);
		close(ends[0]);
		feed_stdin(tty, ends[1]);
	}
	close(ends[1]);
	*command_in = ends[0];
	return pid;
}

/*
 * Relay one piece of output from @fd to the port; returns false at the end of the output, or if
 * nobody reads it any more.
 */
static bool relay(int fd, unsigned short port)
{
	static char bytes[PAGE_SIZE];
	char *piece = page ? page : bytes;
	ssize_t n = read(fd, piece, PAGE_SIZE);

	if (n < 0)
		return errno == EAGAIN || errno == EINTR;
	if (n > 0 && page)
		pyvmm_control(GUEST_WRITE,
			      (unsigned int)n | (port == PORT_GUEST_STDERR ? 1U << 16 : 0));
	if (n > 0 && page && answers)
		return !(*(volatile unsigned int *)page &
			 (port == PORT_GUEST_STDERR ? GONE_STDERR : GONE_STDOUT));
	if (n > 0 && !page)
		pyvmm_write(port, piece, (size_t)n);
	return n > 0;
}

/* The command's standard input on its way from the port to the command. */
static struct {
	int pipe;	 /* the write end, which does not block; -1 if there is no input any more */
	bool waiting;	 /* the VMM has nothing, and will ring */
	size_t at, have; /* the part of bytes that the command has not got yet */
	char bytes[PAGE_SIZE]; /* a copy, because output uses the page as well */
} feed = {.pipe = -1};

static void end_input(void)
{
	close(feed.pipe);
	feed.pipe = -1;
}

/* Open the serial port on which the VMM rings. */
static void open_bell(void)
{
	struct termios mode;

	bell = open("/dev/ttyS1", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
	if (bell >= 0 && tcgetattr(bell, &mode)) {
		close(bell);
		bell = -1;
	}
	if (bell >= 0) {
		cfmakeraw(&mode);
		tcsetattr(bell, TCSANOW, &mode);
	}
}

/* Read what the bell says. Returns whether the channel has frames; there may be input as well. */
static bool silence(void)
{
	char bytes[64];
	bool frames = false;
	ssize_t n;

	while ((n = read(bell, bytes, sizeof(bytes))) > 0) {
		for (ssize_t i = 0; i < n; i++) {
			frames = frames || bytes[i] == BELL_CHANNEL;
			feed.waiting = feed.waiting && bytes[i] != BELL_INPUT;
		}
	}
	return frames;
}

/* Begin the command's input; returns the end that the command reads. */
static int start_input(void)
{
	int ends[2];

	if (!page || bell < 0 || pipe2(ends, O_CLOEXEC)) {
		say("no input for the command: %s", !page      ? "the VMM has no port"
						    : bell < 0 ? "no /dev/ttyS1"
							       : strerror(errno));
		return open("/dev/null", O_RDONLY | O_CLOEXEC);
	}
	fcntl(ends[1], F_SETFL, O_NONBLOCK);
	feed.pipe = ends[1];
	return ends[0];
}

/* Fetch the next input if the command has got the last one. */
static void fetch_input(void)
{
	unsigned int n;

	if (feed.pipe < 0 || feed.have || feed.waiting)
		return;
	n = inl(PORT_GUEST_INPUT);
	if (n > PAGE_SIZE) { /* INPUT_ENDS */
		end_input();
		return;
	}
	memcpy(feed.bytes, page, n);
	feed.at = 0;
	feed.have = n;
	feed.waiting = !n;
}

/* Pass input on as the command takes it. @events: what poll() says of the pipe. */
static void pass_input(short events)
{
	ssize_t n = 0;

	if (events & POLLOUT)
		n = write(feed.pipe, feed.bytes + feed.at, feed.have);
	if (n < 0 ? errno != EAGAIN : events & POLLERR) { /* the command has closed its input */
		end_input();
		return;
	}
	if (n > 0) {
		feed.at += (size_t)n;
		feed.have -= (size_t)n;
	}
}

static void __attribute__((noreturn)) leave(int how)
{
	if (how == RB_POWER_OFF)
		tell(GUEST_POWEROFF, 0);
	if (in_unit)
		_exit(0); /* at which systemd powers off */
	sync();
	/* Without ACPI the kernel can only halt, but the machine has the register all the same. */
	if (how == RB_POWER_OFF && have_port && access("/sys/firmware/acpi", F_OK) &&
	    !ioperm(PORT_ACPI_SLEEP_CONTROL, 1, 1))
		outb(ACPI_POWER_OFF, PORT_ACPI_SLEEP_CONTROL);
	reboot(how);
	say("reboot: %s", strerror(errno));
	for (;;)
		pause();
}

/* --- sessions: commands that the VMM starts (pyvmm_port.h) --- */

struct session {
	struct session *next;
	unsigned int id;
	char *described; /* what FRAME_OPEN has brought so far; a NUL follows */
	size_t described_size;
	pid_t pid; /* 0: the command has not been started, or has ended */
	bool over; /* the command has ended, with this status */
	int status;
	bool closed; /* nobody waits for the command any more */
	bool tty;
	bool has_input;
	int in, streams[2]; /* our ends of the pipes, or descriptors of the terminal; or -1 */
	char *input;	    /* input that the command has not taken yet; CHANNEL_WINDOW bytes */
	size_t at, have;
	bool input_ends;
	bool midline;		/* what the command's input has got ends within a line */
	bool quiet;		/* poll() has just found no output */
	unsigned int taken;	/* input for which the VMM has got no credit yet */
	unsigned int credit[2]; /* for standard output and standard error */
	long drained;		/* when to wait no longer for more output; 0: not yet known */
	long hanged;		/* when to end the command by SIGKILL; 0: never */
};

static struct session *sessions;
static size_t session_count;
static size_t frames_size; /* bytes of frames in the channel's pages that are for the VMM */

static void flush_frames(void)
{
	if (frames_size)
		outl((unsigned int)frames_size, PORT_GUEST_CHANNEL);
	frames_size = 0;
}

/* Begin a frame whose payload has at most @room bytes; returns where the payload goes. */
static char *begin_frame(size_t room)
{
	if (frames_size + sizeof(struct pyvmm_frame) + room > CHANNEL_SIZE)
		flush_frames();
	return channel + frames_size + sizeof(struct pyvmm_frame);
}

static void end_frame(const struct session *s, unsigned int type, size_t size)
{
	struct pyvmm_frame f = {type, s->id, (unsigned int)size};

	memcpy(channel + frames_size, &f, sizeof(f));
	frames_size += sizeof(f) + size;
}

static void send_frame(const struct session *s, unsigned int type, const void *data, size_t size)
{
	memcpy(begin_frame(size), data, size);
	end_frame(s, type, size);
}

/* Send what init has to say about a session as its command's standard error. */
static void complain(struct session *s, const char *what)
{
	char line[300];
	int n = snprintf(line, sizeof(line), "pyvmm-init: %s: %s\n", what, strerror(errno));

	if (!s->closed)
		send_frame(s, FRAME_ERROR, line, (size_t)n);
}

/* Add the groups of which @name is a member; returns their number. */
static size_t find_groups(const char *name, gid_t *groups, size_t room)
{
	char *at = read_file("/etc/group", NULL), *line;
	size_t n = 0;

	while ((line = strsep(&at, "\n")) && n < room) {
		char *fields[4], *member;

		for (size_t i = 0; i < 4; i++)
			fields[i] = strsep(&line, ":");
		while (fields[3] && n < room && (member = strsep(&fields[3], ",")))
			if (!strcmp(member, name))
				groups[n++] = (gid_t)strtoul(fields[2], NULL, 10);
	}
	return n;
}

static bool is_number(const char *text)
{
	return *text && !text[strspn(text, "0123456789")];
}

/*
 * Become USER[:GROUP], with the environment of a login; in the child process. Returns the directory
 * to begin in, and the user's shell in @shell, NULL if it is unknown.
 */
static const char *become_user(char *user, int tty, const char **shell)
{
	char *group = strchr(user, ':');
	char *fields[7] = {0};
	gid_t groups[65], gid = 0;
	size_t count = 1;
	uid_t uid;

	if (group)
		*group++ = 0;
	if (find_account(read_file("/etc/passwd", NULL), user, fields, 7)) {
		uid = (uid_t)strtoul(fields[2], NULL, 10);
		gid = (gid_t)strtoul(fields[3], NULL, 10);
		count += find_groups(fields[0], groups + 1, 64);
	} else if (is_number(user) || !strcmp(user, "root")) {
		uid = (uid_t)strtoul(user, NULL, 10);
	} else {
		say("no user '%.100s' in the guest's /etc/passwd", user);
		_exit(126);
	}
	if (group) {
		char *found[3];

		count = 1;
		if (find_account(read_file("/etc/group", NULL), group, found, 3))
			group = found[2];
		if (!is_number(group)) {
			say("no group '%.100s' in the guest's /etc/group", group);
			_exit(126);
		}
		gid = (gid_t)strtoul(group, NULL, 10);
	}
	groups[0] = gid;
	if (tty >= 0)
		fchown(tty, uid, (gid_t)-1);
	*shell = fields[6] && *fields[6] ? fields[6] : NULL;
	become_id(uid, gid, groups, count, fields[0] ? fields[0] : user,
		  fields[5] ? fields[5]
		  : uid	    ? "/"
			    : "/root",
		  *shell);
	return getenv("HOME");
}

/* Run the command of @s, in the child process. */
static void __attribute__((noreturn)) run_session(struct session *s, int in, int out, int err)
{
	char *end = s->described + s->described_size, *chosen = NULL, *user = NULL, **argv;
	const char *home = directory, *shell = NULL;
	char *fields[7];
	size_t argc = 0;

	take(in, out, err, s->tty ? out : -1);
	argv = resize(NULL, (s->described_size + 3) * sizeof(*argv));
	for (char *at = s->described; at < end; at += strlen(at) + 1) {
		if (*at == 'a')
			argv[argc++] = at + 1;
		else if (*at == 'd')
			chosen = at + 1;
		else if (*at == 'u')
			user = at + 1;
	}
	if (user)
		home = become_user(user, s->tty ? STDIN_FILENO : -1, &shell);
	else if (!argc && find_account(read_file("/etc/passwd", NULL), "root", fields, 7))
		shell = fields[6];
	if (shell)
		setenv("SHELL", shell, 1);
	for (char *at = s->described; at < end; at += strlen(at) + 1)
		if (*at == 'e' && at[1])
			putenv(at + 1);
	if (!argc) {
		if (!shell || access(shell, X_OK))
			shell = access("/bin/ash", X_OK) ? "sh" : "ash";
		argv[argc++] = strdup(shell);
	}
	argv[argc] = NULL;
	if (chosen && chdir(chosen)) {
		say("cannot enter '%.200s': %s", chosen, strerror(errno));
		_exit(126);
	}
	if (!chosen && chdir(home) && chdir("/root") && chdir("/"))
		say("cannot enter /: %s", strerror(errno));
	become(argv);
}

/* Make a terminal of @size ("COLSxROWS"); returns its slave, and the master in @master, or -1. */
static int make_terminal(const char *size, int *master)
{
	struct winsize cells = {0};
	int unlocked = 0, slave;

	*master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
	if (*master < 0)
		return -1;
	if (sscanf(size, "%hux%hu", &cells.ws_col, &cells.ws_row) == 2)
		ioctl(*master, TIOCSWINSZ, &cells);
	if (ioctl(*master, TIOCSPTLCK, &unlocked) ||
	    (slave = ioctl(*master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0) {
		close(*master);
		*master = -1;
		return -1;
	}
	return slave;
}

static void start_session(struct session *s)
{
	char *end = s->described + s->described_size, *size = NULL;
	int in[2] = {-1, -1}, out[2] = {-1, -1}, err[2] = {-1, -1};
	bool good;

	for (char *at = s->described; at < end; at += strlen(at) + 1) {
		if (*at == 't')
			size = at + 1;
		s->has_input = s->has_input || *at == 'i';
	}
	if (size) {
		out[1] = make_terminal(size, &out[0]);
		good = out[1] >= 0 && (in[1] = fcntl(out[0], F_DUPFD_CLOEXEC, 3)) >= 0;
		in[0] = err[1] = out[1];
		s->tty = true;
	} else {
		good = !pipe2(out, O_CLOEXEC) && !pipe2(err, O_CLOEXEC);
		if (s->has_input)
			good = good && !pipe2(in, O_CLOEXEC) && !fcntl(in[1], F_SETFL, O_NONBLOCK);
		else
			good = good && (in[0] = open("/dev/null", O_RDONLY | O_CLOEXEC)) >= 0;
	}
	s->pid = good ? fork() : -1;
	if (!s->pid)
		run_session(s, in[0], out[1], err[1]);
	if (s->pid < 0) {
		complain(s, size ? "no terminal for a command" : "cannot start a command");
		s->pid = 0;
		s->over = true;
		s->status = 126;
	}
	close(out[1]);
	if (!size) {
		close(in[0]);
		close(err[1]);
	}
	s->in = in[1];
	s->streams[0] = out[0];
	s->streams[1] = err[0];
	free(s->described);
	s->described = NULL;
}

static void end_session_input(struct session *s)
{
	close(s->in);
	s->in = -1;
	s->taken += (unsigned int)s->have;
	s->have = 0;
}

static void take_input(struct session *s, const char *data, size_t size)
{
	if (!size) {
		s->input_ends = true;
		return;
	}
	if (s->in < 0) { /* the command has closed its input: the rest is for nobody */
		s->taken += (unsigned int)size;
		return;
	}
	if (!s->input)
		s->input = resize(NULL, CHANNEL_WINDOW);
	if (size > CHANNEL_WINDOW - s->have)
		size = CHANNEL_WINDOW - s->have; /* the VMM does not do this */
	memmove(s->input, s->input + s->at, s->have);
	memcpy(s->input + s->have, data, size);
	s->at = 0;
	s->have += size;
}

/* Nobody waits for the command any more: hang up. */
static void close_session(struct session *s)
{
	s->closed = true;
	for (int i = 0; i < 2; i++) {
		close(s->streams[i]);
		s->streams[i] = -1;
	}
	if (s->in >= 0)
		end_session_input(s);
	if (s->pid) {
		if (kill(-s->pid, SIGHUP))
			kill(s->pid, SIGHUP);
		kill(-s->pid, SIGCONT);
		s->hanged = now_ms() + HANGUP_MS;
	} else {
		s->over = true;
	}
}

static void describe(struct session *s, const char *data, size_t size)
{
	s->described = resize(s->described, s->described_size + size + 1);
	memcpy(s->described + s->described_size, data, size);
	s->described_size += size;
	s->described[s->described_size] = 0;
}

static void take_frame(const struct pyvmm_frame *f, const char *data)
{
	struct session *s;
	uint32_t words[2] = {0};

	memcpy(words, data, f->size < sizeof(words) ? f->size : sizeof(words));
	if (f->type == FRAME_LEAVE) {
		if (agent_wanted)
			tell(GUEST_STATUS, 0);
		leave(RB_POWER_OFF);
	}
	for (s = sessions; s && s->id != f->session; s = s->next)
		;
	if (!s && f->type == FRAME_OPEN) {
		s = resize(NULL, sizeof(*s));
		*s = (struct session){.next = sessions,
				      .id = f->session,
				      .in = -1,
				      .streams = {-1, -1},
				      .credit = {CHANNEL_WINDOW, CHANNEL_WINDOW}};
		describe(s, "", 0);
		sessions = s;
		session_count++;
	}
	if (!s)
		return;
	switch (f->type) {
	case FRAME_OPEN:
		if (s->described)
			describe(s, data, f->size);
		break;
	case FRAME_START:
		if (s->described)
			start_session(s);
		break;
	case FRAME_INPUT:
		take_input(s, data, f->size);
		break;
	case FRAME_CREDIT:
		if (words[0] == FRAME_OUTPUT || words[0] == FRAME_ERROR)
			s->credit[words[0] - FRAME_OUTPUT] += words[1];
		if (s->over)
			s->drained = now_ms() + DRAIN_MS;
		break;
	case FRAME_OUTPUT: /* nobody reads this stream any more */
	case FRAME_ERROR:
		close(s->streams[f->type - FRAME_OUTPUT]);
		s->streams[f->type - FRAME_OUTPUT] = -1;
		if (s->tty && s->in >= 0)
			end_session_input(s);
		break;
	case FRAME_SIGNAL:
		/* A child that has just been made leads no group yet. */
		if (s->pid && words[0] < NSIG && kill(-s->pid, (int)words[0]))
			kill(s->pid, (int)words[0]);
		break;
	case FRAME_SIZE:
		if (s->tty && s->streams[0] >= 0) {
			struct winsize cells = {.ws_col = (unsigned short)words[0],
						.ws_row = (unsigned short)words[1]};

			ioctl(s->streams[0], TIOCSWINSZ, &cells);
		}
		break;
	case FRAME_CLOSE:
		close_session(s);
		break;
	}
}

/* Take all frames that the VMM has. */
static void fetch_frames(void)
{
	static char frames[CHANNEL_SIZE]; /* a copy, because what init sends uses the same pages */
	unsigned int n;

	flush_frames();
	while ((n = inl(PORT_GUEST_CHANNEL)) && n <= CHANNEL_SIZE) {
		struct pyvmm_frame f;

		memcpy(frames, channel, n);
		for (size_t at = 0; at + sizeof(f) <= n; at += f.size) {
			memcpy(&f, frames + at, sizeof(f));
			at += sizeof(f);
			if (f.size > n - at)
				break;
			take_frame(&f, frames + at);
		}
		flush_frames();
	}
}

/* Pass the input on as the command takes it. @events: what poll() says of its end. */
static void feed_session(struct session *s, short events)
{
	ssize_t n = 0;

	if (events & POLLOUT && s->have)
		n = write(s->in, s->input + s->at, s->have);
	/* A pipe or terminal that nobody reads any more: the command has closed its input. */
	if (n < 0 ? errno != EAGAIN : events & (POLLERR | POLLHUP)) {
		end_session_input(s);
	} else if (n > 0) {
		s->midline = s->input[s->at + (size_t)n - 1] != '\n';
		s->at += (size_t)n;
		s->have -= (size_t)n;
		s->taken += (unsigned int)n;
	}
}

/*
 * A terminal's input does not end, but programs read its end-of-file character so. Behind a part of
 * a line, the first one only lets them read that part. Returns false if the terminal has no room.
 */
static bool end_terminal_input(struct session *s)
{
	struct termios mode;

	if (tcgetattr(s->in, &mode))
		return true;
	while (write(s->in, &mode.c_cc[VEOF], 1) >= 0) {
		if (!s->midline || !(mode.c_lflag & ICANON))
			return true;
		s->midline = false;
	}
	return errno != EAGAIN;
}

/* What becomes of a session's input without poll(): its end, and credit for what has been taken. */
static void settle_input(struct session *s)
{
	if (s->input_ends && !s->have && s->in >= 0 && (!s->tty || end_terminal_input(s)))
		end_session_input(s);
	if (s->taken >= CHANNEL_WINDOW / 4) {
		uint32_t words[2] = {FRAME_INPUT, s->taken};

		send_frame(s, FRAME_CREDIT, words, sizeof(words));
		s->taken = 0;
	}
}

/* Relay one piece of output. @which: 0 is standard output, 1 is standard error. */
static void relay_session(struct session *s, int which)
{
	unsigned int type = which ? FRAME_ERROR : FRAME_OUTPUT;
	size_t room = CHANNEL_SIZE - frames_size;
	char *piece = begin_frame(room < 2 * PAGE_SIZE ? CHANNEL_SIZE / 2 : PAGE_SIZE);
	ssize_t n;

	room = CHANNEL_SIZE - frames_size - sizeof(struct pyvmm_frame);
	n = read(s->streams[which], piece, room < s->credit[which] ? room : s->credit[which]);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0) { /* a terminal that nobody has open any more gives EIO */
		n = 0;
		close(s->streams[which]);
		s->streams[which] = -1;
	}
	s->credit[which] -= (unsigned int)n;
	end_frame(s, type, (size_t)n);
	if (s->over)
		s->drained = now_ms() + DRAIN_MS;
}

/*
 * Say what poll() is to look at: three entries of @fds per session; returns their number. Sessions
 * that are closed have none: their number has no bound, and poll() refuses more entries than
 * RLIMIT_NOFILE.
 */
static size_t watch_sessions(struct pollfd *fds)
{
	struct pollfd *to = fds;

	for (struct session *s = sessions; s; s = s->next) {
		bool waits;

		if (s->closed)
			continue;
		settle_input(s);
		waits = s->have || s->input_ends; /* for room for input, or for its end */
		*to++ = (struct pollfd){.fd = s->tty && !waits ? -1 : s->in,
					.events = waits ? POLLOUT : 0};
		for (int i = 0; i < 2; i++)
			*to++ = (struct pollfd){.fd = s->credit[i] ? s->streams[i] : -1,
						.events = POLLIN};
	}
	return (size_t)(to - fds);
}

/* Do what poll() has found; @fds as in watch_sessions(). */
static void serve_sessions(const struct pollfd *fds)
{
	for (struct session *s = sessions; s; s = s->next) {
		if (s->closed)
			continue;
		if (fds[0].revents && s->in >= 0)
			feed_session(s, fds[0].revents);
		for (int i = 0; i < 2; i++)
			if (fds[1 + i].revents && s->streams[i] >= 0)
				relay_session(s, i);
		s->quiet = !fds[1].revents && !fds[2].revents;
		fds += 3;
	}
}

/*
 * When to wait no longer for more output of a session whose command has ended: processes that it
 * has left behind may hold the pipes open for ever. 0: there is no such time, because the VMM does
 * not take the output now; -1: all output has been relayed.
 */
static long drain_end(const struct session *s)
{
	long end = -1;

	for (int i = 0; i < 2; i++) {
		if (s->streams[i] >= 0 && !s->credit[i])
			return 0;
		if (s->streams[i] >= 0)
			end = s->drained;
	}
	return end;
}

/* Do what time brings: end the sessions that are over, and commands that nobody waits for. */
static void age_sessions(void)
{
	struct session **at = &sessions, *s;

	while ((s = *at)) {
		long end;

		if (s->hanged && s->pid && now_ms() >= s->hanged) {
			kill(-s->pid, SIGKILL);
			s->hanged = 0;
		}
		end = s->over ? drain_end(s) : 0;
		if (!end || end > now_ms() || (end > 0 && !s->quiet)) {
			at = &s->next;
			continue;
		}
		if (!s->closed)
			send_frame(s, FRAME_EXIT, &(uint32_t){(uint32_t)s->status}, 4);
		for (int i = 0; i < 2; i++)
			close(s->streams[i]);
		close(s->in);
		*at = s->next;
		session_count--;
		free(s->described);
		free(s->input);
		free(s);
	}
}

/* The earlier of two times, of which 0 is never. */
static long earlier(long a, long b)
{
	return !a || (b && b < a) ? b : a;
}

/* When age_sessions() has something to do; 0: never. */
static long next_age(void)
{
	long when = 0;

	for (struct session *s = sessions; s; s = s->next) {
		when = earlier(when, s->pid ? s->hanged : 0);
		when = earlier(when, s->over ? drain_end(s) : 0);
	}
	return when;
}

/* Begin to take sessions, if the VMM has a channel and there is a serial port for its bell. */
static void open_channel(void)
{
	uint32_t list[1 + CHANNEL_PAGES] = {CHANNEL_PAGES};
	char *p;

	if (!have_port || inl(PORT_GUEST_CHANNEL) == ~0U)
		return;
	if (bell < 0)
		open_bell();
	if (bell < 0 || !(p = share(CHANNEL_PAGES, list + 1)))
		return;
	memcpy(p, list, sizeof(list));
	tell(GUEST_CHANNEL, list[1]);
	if (*(volatile unsigned int *)p != GUEST_ANSWERS)
		return;
	channel = p;
	fetch_frames(); /* for those the bell may have rung too early */
}

static int status_of(int raw)
{
	return WIFSIGNALED(raw) ? 128 + WTERMSIG(raw) : WEXITSTATUS(raw);
}

/*
 * Reap all children that have ended. Returns whether @child is among them, with its status as a
 * shell gives it in @status.
 */
static bool reap(pid_t child, int *status)
{
	bool ended = false;
	int raw;
	pid_t pid;

	while ((pid = waitpid(-1, &raw, WNOHANG)) > 0) {
		if (pid == child) {
			ended = true;
			*status = status_of(raw);
		}
		for (struct session *s = sessions; s; s = s->next) {
			if (s->pid == pid) {
				s->pid = 0;
				s->over = true;
				s->status = status_of(raw);
				s->drained = now_ms() + DRAIN_MS;
			}
		}
	}
	return ended;
}

/*
 * Relay output and reap children until @child has ended and all of its output has been relayed;
 * returns its status. @out and @err are closed then. If @child is 0, there are only sessions, until
 * the VMM or somebody at the power button wants the end.
 *
 * Processes that the command has left behind may hold the pipes open for ever. After the command's
 * end, init therefore waits for DRAIN_MS for more output, but only while there is nothing to read:
 * however long the VMM takes for the output, every byte in the pipes reaches it.
 */
static int supervise(pid_t child, int signals, int out, int err)
{
	enum { SIGNALS, OUT, ERR, BUTTONS, BELL, INPUT, FIXED };
	int buttons = beside ? -1 : open_buttons();
	long deadline = 0, patience = 0, farewell = 0;
	struct pollfd *fds = NULL;
	bool has_output = out >= 0;
	int status = 0;

	for (;;) {
		long until, wait = -1;
		size_t entries;

		if (patience && now_ms() >= patience) {
			kill(-1, SIGKILL);
			patience = 0;
			farewell = now_ms() + DRAIN_MS;
		}
		age_sessions();
		if (deadline && out < 0 && err < 0)
			break;
		/* A session whose reader takes nothing does not hold the machine. */
		if (!child && pressed && (!sessions || (farewell && now_ms() >= farewell)))
			leave(RB_POWER_OFF);
		fetch_input();
		fds = resize(fds, (FIXED + 3 * session_count) * sizeof(*fds));
		fds[SIGNALS] = (struct pollfd){.fd = signals, .events = POLLIN};
		fds[OUT] = (struct pollfd){.fd = out, .events = POLLIN};
		fds[ERR] = (struct pollfd){.fd = err, .events = POLLIN};
		fds[BUTTONS] = (struct pollfd){.fd = buttons, .events = POLLIN};
		fds[BELL] = (struct pollfd){.fd = bell, .events = POLLIN};
		fds[INPUT] = (struct pollfd){.fd = feed.pipe, .events = feed.have ? POLLOUT : 0};
		entries = FIXED + watch_sessions(fds + FIXED);
		flush_frames();
		until = earlier(earlier(deadline, patience), next_age());
		until = earlier(until, child ? 0 : farewell);
		if (until)
			wait = until > now_ms() ? until - now_ms() : 0;
		if (poll(fds, entries, (int)wait) < 0)
			continue;
		if (deadline && !fds[OUT].revents && !fds[ERR].revents && now_ms() >= deadline)
			break;
		serve_sessions(fds + FIXED);
		flush_frames();
		if (fds[BUTTONS].revents && power_button(buttons)) {
			if (child && !has_output) /* an interactive shell, which ignores SIGTERM */
				leave(RB_POWER_OFF);
			kill(-1, SIGTERM);
			kill(-1, SIGCONT);
			patience = patience ? patience : now_ms() + BUTTON_MS;
			pressed = true;
		}
		if (fds[INPUT].revents)
			pass_input(fds[INPUT].revents);
		if (fds[SIGNALS].revents) {
			struct signalfd_siginfo info;

			/* Beside another init, SIGTERM is for the command, whose end is awaited. */
			if (read(signals, &info, sizeof(info)) == sizeof(info) && !beside) {
				/*
				 * Without -f, busybox's poweroff sends SIGUSR2, halt SIGUSR1 and
				 * reboot SIGTERM.
				 */
				if (info.ssi_signo == SIGUSR2 || info.ssi_signo == SIGUSR1)
					leave(RB_POWER_OFF);
				if (info.ssi_signo == SIGTERM)
					leave(RB_AUTOBOOT);
			}
			if (reap(child, &status))
				deadline = now_ms() + DRAIN_MS;
		}
		if (fds[BELL].revents && silence() && channel)
			fetch_frames();
		if (deadline && (fds[OUT].revents || fds[ERR].revents))
			deadline = now_ms() + DRAIN_MS;
		/* A closed pipe ends whoever writes to it by SIGPIPE. */
		if (fds[OUT].revents && !relay(out, PORT_GUEST_STDOUT)) {
			close(out);
			out = -1;
		}
		if (fds[ERR].revents && !relay(err, PORT_GUEST_STDERR)) {
			close(err);
			err = -1;
		}
	}
	free(fds);
	if (out >= 0)
		close(out);
	if (err >= 0)
		close(err);
	return status;
}

/* Run the command, or a shell on the console; returns its status. */
static int run(int signals)
{
	/* Only busybox' own shell can edit lines; sh may be another one. */
	static char ash[] = "ash", sh[] = "sh";
	int out[2] = {-1, -1}, err[2] = {-1, -1};
	int in = open("/dev/null", O_RDONLY | O_CLOEXEC);
	int tty = open_tty();
	bool interactive = split_command() == 0;
	pid_t child;
	int status;

	if (interactive) {
		argv_out[0] = rooted ? own_shell() : access("/bin/ash", X_OK) ? sh : ash;
		if (tty < 0)
			say("no terminal behind the console: %s", strerror(errno));
		else
			set_window(tty);
	} else if (stdin_console && tty >= 0) {
		start_feeder(tty, &in);
	}
	if (!interactive && have_port && (pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC)))
		say("pipe: %s", strerror(errno));
	if (out[0] >= 0)
		share_page();
	if (!interactive && stdin_port) {
		close(in);
		in = start_input();
	}
	tell(GUEST_COMMAND, 0);
	if (verbose)
		say("command %s", argv_out[0]);
	child = fork();
	if (child < 0) {
		say("fork: %s", strerror(errno));
		return 126;
	}
	if (!child) {
		if (interactive && tty >= 0)
			run_command(tty, tty, tty, tty);
		run_command(in, out[1] >= 0 ? out[1] : STDERR_FILENO,
			    err[1] >= 0 ? err[1] : STDERR_FILENO, -1);
	}
	close(in);
	close(out[1]);
	close(err[1]);
	status = supervise(child, signals, out[0], err[0]);
	if (!have_port)
		say("status %d", status);
	return status;
}

/* --- another init --- */

/* Write @size bytes to the new file @path. Returns whether that has succeeded. */
static bool write_file(const char *path, mode_t mode, const char *data, size_t size)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
	bool good = fd >= 0 && write_all(fd, data, size);

	if (fd >= 0 && close(fd))
		good = false;
	if (!good)
		say("cannot write %s: %s", path, strerror(errno));
	return good;
}

/* Have no getty wait at the console, on which nobody could log in. */
static void mask_getty(void)
{
	char *names = read_file("/sys/class/tty/console/active", NULL), *last;
	char path[PATH_MAX];

	names[strcspn(names, "\n")] = 0;
	last = strrchr(names, ' ');
	snprintf(path, sizeof(path), UNITS "/serial-getty@%s.service", last ? last + 1 : names);
	if (symlink("/dev/null", path))
		say("cannot make %s: %s", path, strerror(errno));
	free(names);
}

/*
 * Describe the unit for systemd, which looks for units of this boot in UNITS. The command runs when
 * the boot is over, also if parts of the boot have failed. When it has ended, systemd powers off.
 *
 * Returns whether that has succeeded. The console has an error.
 */
static bool make_unit(void)
{
	char path[] = UNITS "/default.target.wants", text[1024];
	size_t size;
	char *self = read_file("/proc/self/exe", &size);
	bool good;

	snprintf(
		text, sizeof(text),
		"[Unit]\n"
		"Description=Command of pyvmm run\n"
		"DefaultDependencies=no\n" /* a boot that fails in part does not stop the command */
		"After=default.target\n"
		"Conflicts=shutdown.target\n"
		"Before=shutdown.target\n"
		"SuccessAction=poweroff\n"
		"FailureAction=poweroff\n"
		"[Service]\n"
		"ExecStart=" UNIT_NEEDS "/init unit\n"
		"%s%.100s\n"
		"StandardOutput=tty\n"
		"StandardError=tty\n"
		"TasksMax=infinity\n"
		"SendSIGHUP=yes\n" /* for a shell on the console, which ignores SIGTERM */
		"TimeoutStopSec=10\n",
		peer ? "Environment=PYVMM_PEER=" : "", peer ? peer : "");
	good = !mkdir(UNIT_NEEDS, 0700) && write_file(UNIT_NEEDS "/init", 0700, self, size) &&
	       write_file(UNIT_NEEDS "/" COMMAND_FILE, 0600, command, command_size) &&
	       write_file(UNIT_NEEDS "/" PLACE_FILE, 0600, directory, strlen(directory)) &&
	       write_file(UNIT_NEEDS "/" USER_FILE, 0600, command_user, strlen(command_user)) &&
	       !make_directories(path) && write_file(UNITS "/" UNIT, 0644, text, strlen(text)) &&
	       !symlink("../" UNIT, UNITS "/default.target.wants/" UNIT);
	free(self);
	mask_getty();
	return good;
}

/*
 * Become the root's own init. @argv: the arguments of this one, of which the kernel has taken those
 * behind "--" from its command line. If that fails, the run ends as if a command had failed.
 */
static void __attribute__((noreturn)) become_tree_init(int signals, char **argv)
{
	sigset_t none;

	if (!tree_systemd) {
		if (!fork()) {
			setsid();
			beside = true;
			set_environment(); /* which the sessions inherit */
			open_channel();
			tell(GUEST_COMMAND,
			     0); /* which is the tree's init: no channel comes later */
			if (channel)
				supervise(0, signals, -1, -1);
			_exit(0);
		}
	} else if (!make_unit()) {
		say("cannot make the unit of the command");
		tell(GUEST_STATUS, 126);
		leave(RB_POWER_OFF);
	}
	if (have_port)
		ioperm(PORT_GUEST_CONTROL, PORT_GUEST_COUNT, 0);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	clearenv();
	setenv("TERM", term, 1);
	argv[0] = tree_init;
	execv(tree_init, argv);
	say("cannot run '%.200s': %s", tree_init, strerror(errno));
	if (have_port)
		ioperm(PORT_GUEST_CONTROL, PORT_GUEST_COUNT, 1);
	tell(GUEST_STATUS, 126);
	leave(RB_POWER_OFF);
}

/* --- main --- */

static int open_signals(void)
{
	sigset_t set;

	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGUSR2);
	sigaddset(&set, SIGTERM);
	sigprocmask(SIG_BLOCK, &set, NULL);
	return signalfd(-1, &set, SFD_CLOEXEC);
}

/* Read what the VMM says of the command and of the root, while it can be read. */
static void read_wishes(void)
{
	size_t size;

	directory = read_packed(PLACE_FILE, &size);
	if (!size)
		directory = "/root";
	command_user = read_packed(USER_FILE, NULL);
	tree_init = in_unit ? "" : read_file(INIT_FILE, &size);
	tree_systemd = *tree_init && strlen(tree_init) + 1 < size;
}

/*
 * Do what the machine's first process has to do. Returns a descriptor for signals; -1 if the kernel
 * is to panic.
 */
static int begin(char **argv)
{
	struct timespec boot;
	int fd, signals;

	clock_gettime(CLOCK_BOOTTIME, &boot);
	chmod("/", 0755); /* a root file system of type tmpfs begins as 01777 */
	mkdir("/dev", 0755);
	/*
	 * The kernel opens descriptors 0 to 2 on /dev/console if there is one. Open all that are
	 * missing on /dev/null.
	 */
	do {
		fd = open("/dev/null", O_RDWR);
		if (fd < 0) {
			mknod("/dev/null", S_IFCHR | 0666, makedev(1, 3));
			fd = open("/dev/null", O_RDWR);
		}
	} while (fd >= 0 && fd <= STDERR_FILENO);
	if (fd >= 0)
		close(fd);

	mount_all();
	open_port(parse_cmdline());
	tell(GUEST_INIT, 0);
	if (verbose)
		say("start at %ld.%06ld s", (long)boot.tv_sec, boot.tv_nsec / 1000);
	if (!strcmp(panic_how, "init"))
		return -1;

	signals = open_signals();
	if (sethostname(hostname, strlen(hostname)))
		say("cannot set host name '%s': %s", hostname, strerror(errno));
	load_modules("/etc/modules");
	if (has_device(VIRTIO_BLOCK))
		load_modules("/etc/modules.disks");
	read_wishes();
	mount_shares();
	configure_network();
	if (rooted && *tree_init)
		become_tree_init(signals, argv);
	return signals;
}

/* The same for the unit of systemd. */
static int begin_unit(void)
{
	const char *text = getenv("PYVMM_PEER");

	beside = rooted = true;
	peer = text ? strdup(text) : NULL;
	open_port(parse_cmdline());
	read_wishes();
	return open_signals();
}

int main(int argc, char **argv)
{
	int signals;

	in_unit = argc == 2 && getpid() != 1 && !strcmp(argv[1], "unit");
	signals = in_unit ? begin_unit() : begin(argv);
	if (signals < 0)
		return 1;
	set_environment();
	if (stdin_port)
		open_bell();
	open_channel();
	if (agent_wanted) {
		if (!channel) {
			say("no agent: no /dev/ttyS1, or the VMM has no channel");
			leave(RB_POWER_OFF);
		}
		tell(GUEST_AGENT, 0);
		supervise(0, signals, -1, -1);
	}
	tell(GUEST_STATUS, (unsigned int)run(signals));
	leave(RB_POWER_OFF);
}
