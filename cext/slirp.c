/* SPDX-License-Identifier: MIT */
#include "slirp.h"

#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define LIBRARY	  "libslirp.so.0"
#define HEADER	  12
#define FRAME_MAX (65535 + 14 + 4)
#define ETH_MIN	  14
/* Frames that are taken before the stack's sockets are looked at again. */
#define BURST 64
/* After so many rounds in which no frame moves, the next ones wait. */
#define IDLE_MAX 64
#define IDLE_MS	 10

/* What follows is the library's interface (slirp/libslirp.h), as of version 1 of its settings. */

struct slirp_config {
	uint32_t version;
	int restricted;
	bool in_enabled;
	struct in_addr vnetwork;
	struct in_addr vnetmask;
	struct in_addr vhost;
	bool in6_enabled;
	struct in6_addr vprefix_addr6;
	uint8_t vprefix_len;
	struct in6_addr vhost6;
	const char *vhostname;
	const char *tftp_server_name;
	const char *tftp_path;
	const char *bootfile;
	struct in_addr vdhcp_start;
	struct in_addr vnameserver;
	struct in6_addr vnameserver6;
	const char **vdnssearch;
	const char *vdomainname;
	size_t if_mtu;
	size_t if_mru;
	bool disable_host_loopback;
	bool enable_emu;
};

struct slirp_callbacks {
	ssize_t (*send_packet)(const void *frame, size_t len, void *opaque);
	void (*guest_error)(const char *msg, void *opaque);
	int64_t (*clock_get_ns)(void *opaque);
	void *(*timer_new)(void (*fire)(void *opaque), void *cb_opaque, void *opaque);
	void (*timer_free)(void *timer, void *opaque);
	void (*timer_mod)(void *timer, int64_t expire_time, void *opaque);
	void (*register_poll_fd)(int fd, void *opaque);
	void (*unregister_poll_fd)(int fd, void *opaque);
	void (*notify)(void *opaque);
};

enum { SLIRP_IN = 1, SLIRP_OUT = 2, SLIRP_PRI = 4, SLIRP_ERR = 8, SLIRP_HUP = 16 };

struct library {
	void *(*new)(const struct slirp_config *, const struct slirp_callbacks *, void *);
	void (*pollfds_fill)(void *, uint32_t *, int (*)(int, int, void *), void *);
	void (*pollfds_poll)(void *, int, int (*)(int, void *), void *);
	void (*input)(void *, const uint8_t *, int);
	int (*add_hostfwd)(void *, int, struct in_addr, int, struct in_addr, int);
};

struct pv_slirp {
	struct library lib;
	void *handle;
	void *slirp;
	int fd, tap;
	bool gone;	    /* the card has closed its end */
	bool moved;	    /* a frame, in this round */
	struct pollfd *fds; /* the card's first */
	size_t count, room;
	uint8_t frame[HEADER + FRAME_MAX];
};

static ssize_t send_packet(const void *frame, size_t len, void *opaque)
{
	struct pv_slirp *s = opaque;
	uint8_t header[HEADER] = {0};
	struct iovec iov[] = {{header, sizeof(header)}, {(void *)(uintptr_t)frame, len}};
	struct msghdr msg = {.msg_iov = iov, .msg_iovlen = 2};
	ssize_t sent;

	do
		sent = s->tap < 0 ? sendmsg(s->fd, &msg, MSG_NOSIGNAL) : writev(s->tap, iov, 2);
	while (sent < 0 && errno == EINTR);
	if (sent < 0 && s->tap < 0) /* a tap that is down drops frames */
		s->gone = true;
	s->moved = true;
	return sent < 0 ? -1 : (ssize_t)len;
}

static void guest_error(const char *msg, void *opaque)
{
	(void)msg, (void)opaque; /* the guest's own affair */
}

static int64_t clock_get_ns(void *opaque)
{
	struct timespec now;

	(void)opaque;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ll + now.tv_nsec;
}

/* Only router advertisements have a timer, and there is no IPv6. */
static void *timer_new(void (*fire)(void *opaque), void *cb_opaque, void *opaque)
{
	(void)fire, (void)cb_opaque, (void)opaque;
	return NULL;
}

static void timer_free(void *timer, void *opaque)
{
	(void)timer, (void)opaque;
}

static void timer_mod(void *timer, int64_t expire_time, void *opaque)
{
	(void)timer, (void)expire_time, (void)opaque;
}

/* Every round asks the stack anew what to wait for. */
static void poll_fd(int fd, void *opaque)
{
	(void)fd, (void)opaque;
}

static void notify(void *opaque)
{
	(void)opaque;
}

static const struct slirp_callbacks callbacks = {
	.send_packet = send_packet,
	.guest_error = guest_error,
	.clock_get_ns = clock_get_ns,
	.timer_new = timer_new,
	.timer_free = timer_free,
	.timer_mod = timer_mod,
	.register_poll_fd = poll_fd,
	.unregister_poll_fd = poll_fd,
	.notify = notify,
};

static int add_poll(int fd, int events, void *opaque)
{
	struct pv_slirp *s = opaque;
	short wanted = 0;

	if (s->count == s->room) {
		size_t room = 2 * s->room;
		struct pollfd *fds = realloc(s->fds, room * sizeof(*fds));

		if (!fds)
			return -1; /* the stack takes that for a socket without events */
		s->fds = fds;
		s->room = room;
	}
	wanted |= events & SLIRP_IN ? POLLIN : 0;
	wanted |= events & SLIRP_OUT ? POLLOUT : 0;
	wanted |= events & SLIRP_PRI ? POLLPRI : 0;
	s->fds[s->count] = (struct pollfd){.fd = fd, .events = wanted};
	return (int)s->count++;
}

static int get_revents(int index, void *opaque)
{
	struct pv_slirp *s = opaque;
	short there = index > 0 && (size_t)index < s->count ? s->fds[index].revents : 0;
	int events = 0;

	events |= there & POLLIN ? SLIRP_IN : 0;
	events |= there & POLLOUT ? SLIRP_OUT : 0;
	events |= there & POLLPRI ? SLIRP_PRI : 0;
	events |= there & POLLERR ? SLIRP_ERR : 0;
	events |= there & POLLHUP ? SLIRP_HUP : 0;
	return events;
}

static void *symbol(struct pv_slirp *s, const char *name, bool *missing)
{
	void *found = dlsym(s->handle, name);

	*missing |= !found;
	return found;
}

static int look_up(struct pv_slirp *s)
{
	bool missing = false;

	s->handle = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
	if (!s->handle)
		return -1;
	s->lib.new = symbol(s, "slirp_new", &missing);
	s->lib.pollfds_fill = symbol(s, "slirp_pollfds_fill", &missing);
	s->lib.pollfds_poll = symbol(s, "slirp_pollfds_poll", &missing);
	s->lib.input = symbol(s, "slirp_input", &missing);
	s->lib.add_hostfwd = symbol(s, "slirp_add_hostfwd", &missing);
	return missing ? -1 : 0;
}

/**
 * pv_slirp_new() - Make a stack for one card
 * @config:	Its network
 * @why:	Gets, on failure, what is wrong; at most @size bytes with the final NUL
 * @size:	Bytes of @why
 *
 * Return: the stack, which lives as long as the process; NULL if the library is missing, or out of
 * memory
 */
struct pv_slirp *pv_slirp_new(const struct pv_slirp_config *config, char *why, size_t size)
{
	struct pv_slirp *s = calloc(1, sizeof(*s));
	struct slirp_config c = {
		.version = 1,
		.in_enabled = true,
		.vnetwork = {config->network},
		.vnetmask = {config->netmask},
		.vhost = {config->host},
		.vdhcp_start = {config->guest},
		.vnameserver = {config->nameserver},
		.if_mtu = config->mtu,
		.if_mru = config->mtu,
		.disable_host_loopback = !config->loopback,
	};

	if (!s || !(s->fds = calloc(64, sizeof(*s->fds)))) {
		snprintf(why, size, "no memory");
	} else if (look_up(s)) {
		const char *error = dlerror();

		snprintf(why, size, "%s", error ? error : LIBRARY " is too old");
	} else {
		s->fd = config->fd;
		s->tap = config->tap;
		s->room = 64;
		s->slirp = s->lib.new(&c, &callbacks, s);
		if (s->slirp)
			return s;
		snprintf(why, size, "libslirp refuses this network");
	}
	if (s)
		free(s->fds);
	free(s);
	return NULL;
}

/**
 * pv_slirp_forward() - Let a port of the host lead to a port of the guest
 * @s:		The stack
 * @forward:	Which
 *
 * Return: 0 or -errno of bind(2)
 */
int pv_slirp_forward(struct pv_slirp *s, const struct pv_slirp_forward *forward)
{
	struct in_addr host = {forward->host}, guest = {forward->guest};

	errno = 0;
	if (s->lib.add_hostfwd(s->slirp, forward->udp, host, forward->host_port, guest,
			       forward->guest_port) < 0)
		return errno ? -errno : -EINVAL;
	return 0;
}

/**
 * pv_slirp_input() - Hand over a frame, as if it came from the card
 * @s:		The stack
 * @frame:	An Ethernet frame
 * @len:	Its bytes
 */
void pv_slirp_input(struct pv_slirp *s, const uint8_t *frame, int len)
{
	s->lib.input(s->slirp, frame, len);
}

/* Hand over the frames that the card has sent, a burst of them at most. */
static void take_frames(struct pv_slirp *s)
{
	for (int i = 0; i < BURST && !s->gone; i++) {
		int flags = MSG_DONTWAIT | MSG_TRUNC;
		ssize_t len = s->tap < 0 ? recv(s->fd, s->frame, sizeof(s->frame), flags)
					 : read(s->tap, s->frame, sizeof(s->frame));

		if (len < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (len <= 0) {
			s->gone = true;
			return;
		}
		s->moved = true;
		/* Too long a frame was cut off, and is dropped. */
		if (len >= HEADER + ETH_MIN && (size_t)len <= sizeof(s->frame))
			s->lib.input(s->slirp, s->frame + HEADER, (int)len - HEADER);
	}
}

/**
 * pv_slirp_serve() - Move packets until the card closes its end of the socket
 * @s:	The stack
 *
 * Return: 0, or -errno if it cannot wait any more
 */
int pv_slirp_serve(struct pv_slirp *s)
{
	unsigned int idle = 0;

	while (!s->gone) {
		uint32_t timeout = UINT32_MAX;
		int ready;

		s->fds[0] = (struct pollfd){.fd = s->fd, .events = POLLIN};
		s->count = 1;
		if (s->tap >= 0) {
			s->fds[0].fd = s->tap;
			s->fds[s->count++] = (struct pollfd){.fd = s->fd}; /* for its POLLHUP */
		}
		s->lib.pollfds_fill(s->slirp, &timeout, add_poll, s);
		/* A frame may free others that wait in the stack, which the next round sends. */
		if (s->moved)
			timeout = 0;
		s->moved = false;
		ready = poll(s->fds, s->count, timeout > INT_MAX ? -1 : (int)timeout);
		if (ready < 0 && errno != EINTR)
			return -errno;
		s->lib.pollfds_poll(s->slirp, ready < 0, get_revents, s);
		if (ready > 0 && s->fds[0].revents)
			take_frames(s);
		if (ready > 0 && s->tap >= 0 && s->fds[1].revents)
			s->gone = true;
		/* Without descriptors, the stack cannot take the connection that wakes it up. */
		idle = ready > 0 && !s->moved ? idle + 1 : 0;
		if (idle > IDLE_MAX)
			poll(NULL, 0, IDLE_MS);
	}
	return 0;
}
