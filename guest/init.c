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
 *   pyvmm.net=NIC,ADDR/PREFIX[,ADDR/PREFIX]...[,gw=ADDR][,mtu=N][,peer=ADDR]
 *                               NIC is a MAC address, a name such as eth0, or an interface index
 *   pyvmm.cmd=BASE64URL         argv; a NUL ends each argument. Without it, the command is in the
 *                               file /etc/pyvmm.cmd; without that, it is a shell
 *   pyvmm.stdin=port            the command's input comes by the guest port
 *   pyvmm.stdin=console         the command's input is the raw console, in which DLE EOT ends the
 *                               input and DLE DLE stands for one DLE
 *   pyvmm.hostname=NAME  pyvmm.term=TERM  pyvmm.tty=COLSxROWS  pyvmm.port=0|1  pyvmm.verbose
 *   pyvmm.panic=init
 *   pyvmm.agent                 run no command of its own, but take requests of the VMM
 *                               (pyvmm_port.h)
 *
 * No error here is fatal: init reports each failure in one line on the console and goes on to the
 * command.
 *
 * With a command and the guest port (pyvmm_port.h), the command's stdout and stderr are pipes. Init
 * relays them to the port, so that they are binary-safe and separate from kernel messages. Without
 * the port (on another VMM), they are the console, and the line "pyvmm-init: status N" reports the
 * status.
 *
 * The power button (ACPI, kernel driver "button") ends the command by SIGTERM, and by SIGKILL after
 * BUTTON_MS, and then powers off. A shell on the console ends at once.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
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
#define COMMAND_FILE "/etc/pyvmm.cmd"
#define PAGE_SIZE    4096
#define DLE	     0x10
#define EOT	     0x04

static bool have_port;
static char *page;   /* the page of GUEST_PAGE; NULL: output goes by bytes */
static bool answers; /* whether the VMM answers each GUEST_WRITE */
static bool verbose;
static char *command; /* argv; a NUL ends each argument, and one more the whole */
static size_t command_size;
static char **argv_out;
static bool stdin_console, stdin_port;
static bool agent_wanted;
static bool pressed; /* whether the power button has been pressed */
static const char *hostname = "guest";
static const char *term = "vt100";
static const char *panic_how = "";
static const char *window = "";
static char **nic_specs;
static size_t nic_count;
static const char *peer;

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
 * Name a page of this process to the VMM. The page must keep its physical address. It is mapped
 * shared so that fork() does not copy it, and a pipe that nobody reads holds a reference to it so
 * that the kernel does not move it.
 */
static void share_page(void)
{
	char *p = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	struct iovec piece = {.iov_base = p, .iov_len = PAGE_SIZE};
	uint64_t entry = 0;
	int ends[2], map;

	if (p == MAP_FAILED || pipe2(ends, O_CLOEXEC))
		return;
	*p = 0;
	if (vmsplice(ends[1], &piece, 1, 0) != PAGE_SIZE)
		return;
	/*
	 * Documentation/admin-guide/mm/pagemap.rst: bit 63 says that the page is present, bits
	 * 0..54 are its frame number.
	 */
	map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (map < 0)
		return;
	if (pread(map, &entry, sizeof(entry), (off_t)((uintptr_t)p / PAGE_SIZE * sizeof(entry))) ==
		    sizeof(entry) &&
	    entry >> 63 && (entry &= (1ULL << 55) - 1) && entry < 1 << 24) {
		page = p;
		tell(GUEST_PAGE, (unsigned int)entry);
		answers = *(unsigned int *)page == GUEST_ANSWERS;
	}
	close(map);
}

/*
 * Load the modules that /etc/modules lists by their paths below /lib/modules/RELEASE. The list has
 * each module after the modules that it needs.
 */
static void load_modules(void)
{
	char *list = read_file("/etc/modules", NULL);
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
		command = read_file(COMMAND_FILE, &command_size);
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

/* Configure one interface by @spec, a value of pyvmm.net; returns whether the interface exists. */
static bool configure_nic(char *spec, long deadline)
{
	char *save, *name = strtok_r(spec, ",", &save), *gateway = NULL;
	char **addresses = resize(NULL, (strlen(spec) / 2 + 1) * sizeof(*addresses));
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

static void set_environment(void)
{
	clearenv();
	/* Busybox' applets are in /bin; what somebody adds to the image comes before them. */
	setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
	setenv("HOME", "/root", 1);
	setenv("TERM", term, 1);
	if (peer)
		setenv("PYVMM_PEER", peer, 1);
}

/* Become the command, in the child process. */
static void __attribute__((noreturn)) become(int in, int out, int err, int tty)
{
	sigset_t none;
	int error;

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
	if (chdir("/root"))
		say("cannot enter /root: %s", strerror(errno));
	execvp(argv_out[0], argv_out);
	error = errno;
	say("cannot run '%.200s': %s", argv_out[0], strerror(error));
	_exit(error == ENOENT || error == ENOTDIR ? 127 : 126);
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
	int bell;	 /* the serial port that tells of new input */
	bool waiting;	 /* the VMM has nothing, and will ring */
	size_t at, have; /* the part of bytes that the command has not got yet */
	char bytes[PAGE_SIZE]; /* a copy, because output uses the page as well */
} feed = {.pipe = -1, .bell = -1};

static void end_input(void)
{
	close(feed.pipe);
	feed.pipe = -1;
}

/* Open a serial port on which the VMM rings; -1 if there is none. */
static int open_bell(void)
{
	int bell = open("/dev/ttyS1", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
	struct termios mode;

	if (bell >= 0 && tcgetattr(bell, &mode)) {
		close(bell);
		return -1;
	}
	if (bell >= 0) {
		cfmakeraw(&mode);
		tcsetattr(bell, TCSANOW, &mode);
	}
	return bell;
}

static void silence(int bell)
{
	char bytes[64];

	while (read(bell, bytes, sizeof(bytes)) > 0)
		;
}

/* Begin the command's input; returns the end that the command reads. */
static int start_input(void)
{
	int ends[2];

	if (!page || (feed.bell = open_bell()) < 0 || pipe2(ends, O_CLOEXEC)) {
		say("no input for the command: %s", page ? strerror(errno) : "the VMM has no port");
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
		if (pid != child)
			continue;
		ended = true;
		*status = WIFSIGNALED(raw) ? 128 + WTERMSIG(raw) : WEXITSTATUS(raw);
	}
	return ended;
}

static void agent_interrupted(int bell, pid_t child);

/*
 * Relay output and reap children until @child has ended and all of its output has been relayed;
 * returns its status. @out and @err are closed then. @bell is the agent's serial port, or -1
 * without an agent.
 *
 * Processes that the command has left behind may hold the pipes open for ever. After the command's
 * end, init therefore waits for DRAIN_MS for more output, but only while there is nothing to read:
 * however long the VMM takes for the output, every byte in the pipes reaches it.
 */
static int supervise(pid_t child, int signals, int out, int err, int buttons, int bell)
{
	struct pollfd fds[] = {{.fd = signals, .events = POLLIN}, {.fd = out, .events = POLLIN},
			       {.fd = err, .events = POLLIN},	  {.fd = buttons, .events = POLLIN},
			       {.fd = bell, .events = POLLIN},	  {.fd = -1},
			       {.fd = -1, .events = POLLIN}};
	long deadline = 0, patience = 0;
	int status = 0;

	for (;;) {
		long wait = -1;

		if (patience && now_ms() >= patience) {
			kill(-1, SIGKILL);
			patience = 0;
		}
		if (deadline || patience) {
			wait = (deadline && (!patience || deadline < patience) ? deadline
									       : patience) -
			       now_ms();
			wait = wait < 0 ? 0 : wait;
		}

		if (deadline && fds[1].fd < 0 && fds[2].fd < 0)
			break;
		fetch_input();
		fds[5].fd = feed.pipe;
		fds[5].events = feed.have ? POLLOUT : 0;
		fds[6].fd = feed.pipe >= 0 && feed.waiting ? feed.bell : -1;
		if (poll(fds, 7, (int)wait) < 0)
			continue;
		if (deadline && !fds[1].revents && !fds[2].revents && now_ms() >= deadline)
			break;
		if (fds[3].revents && power_button(buttons)) {
			if (out < 0) /* an interactive shell, which ignores SIGTERM */
				leave(RB_POWER_OFF);
			kill(-1, SIGTERM);
			kill(-1, SIGCONT);
			patience = patience ? patience : now_ms() + BUTTON_MS;
			pressed = true;
		}
		if (fds[4].revents)
			agent_interrupted(bell, child);
		if (fds[6].revents) {
			silence(feed.bell);
			feed.waiting = false;
		}
		if (fds[5].revents)
			pass_input(fds[5].revents);
		if (fds[0].revents) {
			struct signalfd_siginfo info;

			if (read(signals, &info, sizeof(info)) == sizeof(info)) {
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
		/* A closed pipe ends whoever writes to it by SIGPIPE. */
		if (fds[1].revents && !relay(out, PORT_GUEST_STDOUT)) {
			close(out);
			fds[1].fd = -1;
		}
		if (fds[2].revents && !relay(err, PORT_GUEST_STDERR)) {
			close(err);
			fds[2].fd = -1;
		}
		if (deadline && (fds[1].revents || fds[2].revents))
			deadline = now_ms() + DRAIN_MS;
	}
	for (int i = 1; i <= 2; i++)
		if (fds[i].fd >= 0)
			close(fds[i].fd);
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
		argv_out[0] = access("/bin/ash", X_OK) ? sh : ash;
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
			become(tty, tty, tty, tty);
		become(in, out[1] >= 0 ? out[1] : STDERR_FILENO,
		       err[1] >= 0 ? err[1] : STDERR_FILENO, -1);
	}
	close(in);
	close(out[1]);
	close(err[1]);
	status = supervise(child, signals, out[0], err[0], open_buttons(), -1);
	if (!have_port)
		say("status %d", status);
	return status;
}

/* --- the agent --- */

static char agent_in[sizeof(struct pyvmm_request) + REQUEST_ARGV_MAX + REQUEST_INPUT_MAX];
static size_t agent_have;
static unsigned int agent_id; /* the id of the running command */

/* Take all that the VMM has to send. */
static void agent_pull(int bell)
{
	unsigned int n;

	silence(bell);
	do {
		n = inl(PORT_GUEST_REQUEST);
		if (n > PAGE_SIZE || n > sizeof(agent_in) - agent_have) {
			say("a request that makes no sense is dropped");
			agent_have = 0;
			return;
		}
		memcpy(agent_in + agent_have, page, n);
		agent_have += n;
	} while (n == PAGE_SIZE);
}

/* Look at the next request; returns whether it has arrived completely. */
static bool agent_next(struct pyvmm_request *r)
{
	if (agent_have < sizeof(*r))
		return false;
	memcpy(r, agent_in, sizeof(*r));
	if (r->argv_size > REQUEST_ARGV_MAX || r->input_size > REQUEST_INPUT_MAX) {
		say("a request of %u and %u bytes is dropped", r->argv_size, r->input_size);
		agent_have = 0;
		return false;
	}
	return agent_have >= sizeof(*r) + r->argv_size + r->input_size;
}

static void agent_drop(const struct pyvmm_request *r)
{
	size_t size = sizeof(*r) + r->argv_size + r->input_size;

	agent_have -= size;
	memmove(agent_in, agent_in + size, agent_have);
}

/*
 * Handle the requests that come while @child runs, up to the next REQUEST_RUN. The child leads a
 * session; its process group is killed together with it.
 */
static void agent_interrupted(int bell, pid_t child)
{
	struct pyvmm_request r;

	agent_pull(bell);
	while (agent_next(&r) && r.type != REQUEST_RUN) {
		if (r.type == REQUEST_KILL && r.id == agent_id) {
			kill(-child, SIGKILL);
			kill(child, SIGKILL);
		} else if (r.type == REQUEST_LEAVE) {
			leave(RB_POWER_OFF);
		}
		agent_drop(&r);
	}
}

/* Run the command of @r to its end; returns its status. */
static int agent_run(const struct pyvmm_request *r, int signals, int buttons, int bell)
{
	const char *argv = agent_in + sizeof(*r), *input = argv + r->argv_size;
	int in = memfd_create("input", MFD_CLOEXEC);
	int out[2], err[2];
	pid_t child;

	command = resize(command, r->argv_size + 1);
	memcpy(command, argv, r->argv_size);
	command_size = r->argv_size;
	command[command_size] = 0;
	if (in < 0 || !write_all(in, input, r->input_size) || lseek(in, 0, SEEK_SET)) {
		say("no input for a command: %s", strerror(errno));
		return 126;
	}
	agent_drop(r);
	if (!split_command() || pipe2(out, O_CLOEXEC)) {
		close(in);
		return 126;
	}
	if (pipe2(err, O_CLOEXEC)) {
		close(in);
		close(out[0]);
		close(out[1]);
		return 126;
	}
	child = fork();
	if (!child)
		become(in, out[1], err[1], -1);
	close(in);
	close(out[1]);
	close(err[1]);
	if (child < 0) {
		say("fork: %s", strerror(errno));
		close(out[0]);
		close(err[0]);
		return 126;
	}
	return supervise(child, signals, out[0], err[0], buttons, bell);
}

static void __attribute__((noreturn)) agent(int signals)
{
	int bell = open_bell();
	int buttons = open_buttons();
	struct pollfd fds[] = {{.fd = bell, .events = POLLIN},
			       {.fd = signals, .events = POLLIN},
			       {.fd = buttons, .events = POLLIN}};
	struct pyvmm_request r;
	int status;

	if (bell < 0) {
		say("no agent: /dev/ttyS1: %s", strerror(errno));
		leave(RB_POWER_OFF);
	}
	if (have_port)
		share_page();
	if (!page) {
		say("no agent: the VMM has no port, or no page of ours");
		leave(RB_POWER_OFF);
	}
	tell(GUEST_AGENT, 0);
	for (;;) {
		struct signalfd_siginfo info;

		agent_pull(bell);
		while (agent_next(&r)) {
			if (r.type == REQUEST_LEAVE) {
				tell(GUEST_STATUS, 0);
				leave(RB_POWER_OFF);
			}
			if (r.type != REQUEST_RUN) { /* the command to kill has ended already */
				agent_drop(&r);
				continue;
			}
			agent_id = r.id;
			status = agent_run(&r, signals, buttons, bell);
			tell(GUEST_RESULT, (r.id & 0xffff) << 8 | ((unsigned int)status & 0xff));
		}
		if (pressed)
			leave(RB_POWER_OFF);
		poll(fds, 3, -1);
		if (fds[2].revents && power_button(buttons))
			leave(RB_POWER_OFF);
		if (fds[1].revents && read(signals, &info, sizeof(info)) == sizeof(info)) {
			if (info.ssi_signo == SIGUSR2 || info.ssi_signo == SIGUSR1)
				leave(RB_POWER_OFF);
			if (info.ssi_signo == SIGTERM)
				leave(RB_AUTOBOOT);
			reap(0, &status);
		}
	}
}

int main(void)
{
	struct timespec boot;
	const char *port;
	sigset_t set;
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
	port = parse_cmdline();
	open_port(port);
	tell(GUEST_INIT, 0);
	if (verbose)
		say("start at %ld.%06ld s", (long)boot.tv_sec, boot.tv_nsec / 1000);
	if (!strcmp(panic_how, "init"))
		return 1;

	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGUSR2);
	sigaddset(&set, SIGTERM);
	sigprocmask(SIG_BLOCK, &set, NULL);
	signals = signalfd(-1, &set, SFD_CLOEXEC);

	if (sethostname(hostname, strlen(hostname)))
		say("cannot set host name '%s': %s", hostname, strerror(errno));
	load_modules();
	configure_network();
	set_environment();
	if (agent_wanted)
		agent(signals);
	tell(GUEST_STATUS, (unsigned int)run(signals));
	leave(RB_POWER_OFF);
}
