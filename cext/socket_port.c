/* SPDX-License-Identifier: MIT */
#include "socket_port.h"

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define HEADER	  12 /* struct virtio_net_hdr_v1 */
#define LENGTH	  4
#define ETH_MIN	  14
#define FRAME_MAX (65535 + 14 + 4) /* 64 KiB, Ethernet header and a VLAN tag */
/* Of a stream, so much is read at once: more than the largest frame with its length. */
#define ROOM (128u << 10)
/* What one direction may do before the other has its turn. */
#define TURN 64

/* What a turn has come to. */
enum turn {
	TURN_DONE, /* there is nothing more to read */
	TURN_FULL, /* the other side takes no more */
	TURN_MORE, /* there may be more */
};

/* Bytes that were read and not passed on yet: from at to end. */
struct flow {
	size_t at, end;
	bool full; /* the other side took no more */
	uint8_t bytes[ROOM];
};

struct pv_socket_port {
	struct pv_thread thread;
	struct pv_socket_config cfg;
	enum pv_socket_end end; /* atomic; value is written before */
	uint32_t value;
	uint64_t dropped; /* atomic */
	struct flow out;  /* from the worker: a frame, with its length if the peer is a stream */
	struct flow in;	  /* from the peer */
};

static void finish(struct pv_socket_port *p, enum pv_socket_end end, uint32_t value)
{
	if (p->end != PV_SOCKET_SERVES)
		return;
	p->value = value;
	/* Release: whoever sees the end sees the value. */
	__atomic_store_n(&p->end, end, __ATOMIC_RELEASE);
}

static bool is_stream(const struct pv_socket_port *p)
{
	return p->cfg.type == SOCK_STREAM;
}

static void drop(struct pv_socket_port *p)
{
	__atomic_store_n(&p->dropped, p->dropped + 1, __ATOMIC_RELAXED);
}

/* Receive one packet, or bytes of a stream. Returns their number, or -errno. */
static ssize_t receive(int fd, struct iovec *iov, size_t count, int flags)
{
	struct msghdr msg = {.msg_iov = iov, .msg_iovlen = count};
	ssize_t len = recvmsg(fd, &msg, MSG_DONTWAIT | flags);

	return len < 0 ? -errno : len;
}

/* Send one packet, or bytes of a stream. Returns their number, or -errno. */
static ssize_t transmit(int fd, struct iovec *iov, size_t count)
{
	struct msghdr msg = {.msg_iov = iov, .msg_iovlen = count};
	ssize_t len = sendmsg(fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);

	return len < 0 ? -errno : len;
}

static bool later(ssize_t error)
{
	return error == -EAGAIN || error == -EINTR;
}

/* Whether a packet never goes, while others may. */
static bool hopeless(ssize_t error)
{
	return error == -EMSGSIZE || error == -ENOBUFS;
}

/* The peer's socket has failed. */
static void peer_failed(struct pv_socket_port *p, ssize_t error)
{
	bool closed = error == -EPIPE || error == -ECONNRESET || error == -ECONNREFUSED ||
		      error == -ENOTCONN;

	finish(p, closed ? PV_SOCKET_CLOSED : PV_SOCKET_ERROR, (uint32_t)-error);
}

/* Take a frame from the worker. Returns whether there was one. */
static bool take(struct pv_socket_port *p)
{
	struct flow *out = &p->out;
	size_t first = is_stream(p) ? LENGTH : 0;
	uint8_t header[HEADER];
	struct iovec iov[] = {{header, HEADER}, {out->bytes + LENGTH, FRAME_MAX}};
	ssize_t len = receive(p->cfg.inner, iov, 2, MSG_TRUNC);
	uint32_t length;

	if (later(len))
		return false;
	if (len <= 0) {
		finish(p, PV_SOCKET_LEFT, 0);
		return false;
	}
	if (len < HEADER + ETH_MIN || len > HEADER + FRAME_MAX) {
		drop(p);
		return true;
	}
	length = htonl((uint32_t)len - HEADER);
	memcpy(out->bytes, &length, LENGTH);
	out->at = LENGTH - first;
	out->end = LENGTH + (size_t)len - HEADER;
	return true;
}

/* Give the peer what was taken from the worker. Returns whether it was taken to the last byte. */
static bool give(struct pv_socket_port *p)
{
	struct flow *out = &p->out;
	struct iovec iov = {out->bytes + out->at, out->end - out->at};
	ssize_t len = transmit(p->cfg.fd, &iov, 1);

	if (hopeless(len) && is_stream(p) && out->at) {
		/* The peer has the frame's first part, and would take the next one for the rest. */
		finish(p, PV_SOCKET_ERROR, (uint32_t)-len);
	} else if (hopeless(len)) {
		drop(p);
		out->at = out->end;
	} else if (len >= 0) {
		out->at += (size_t)len;
	} else if (!later(len)) {
		peer_failed(p, len);
	}
	return out->at == out->end;
}

static enum turn turn_out(struct pv_socket_port *p)
{
	struct flow *out = &p->out;

	for (int i = 0; i < TURN && p->end == PV_SOCKET_SERVES; i++) {
		if (out->at < out->end && !give(p))
			return TURN_FULL;
		if (!take(p))
			return TURN_DONE;
	}
	return TURN_MORE;
}

/* Pass a frame on to the worker. Returns whether it was taken. */
static bool pass(struct pv_socket_port *p, uint8_t *frame, size_t len)
{
	uint8_t header[HEADER] = {0};
	struct iovec iov[] = {{header, HEADER}, {frame, len}};
	ssize_t sent;

	if (len < ETH_MIN) {
		drop(p);
		return true;
	}
	sent = transmit(p->cfg.inner, iov, 2);
	if (later(sent))
		return false;
	if (hopeless(sent))
		drop(p);
	else if (sent < 0)
		finish(p, PV_SOCKET_LEFT, 0);
	return true;
}

/* The length of the next frame of the stream; 0 if it is not there to its last byte. */
static size_t next_frame(struct pv_socket_port *p)
{
	struct flow *in = &p->in;
	uint32_t length;

	if (in->end - in->at < LENGTH)
		return 0;
	memcpy(&length, in->bytes + in->at, LENGTH);
	length = ntohl(length);
	if (!length || length > FRAME_MAX) {
		finish(p, PV_SOCKET_LENGTH, length);
		return 0;
	}
	return in->end - in->at - LENGTH >= length ? length : 0;
}

/* Pass on all frames that are there. Returns whether the worker has taken them. */
static bool pass_all(struct pv_socket_port *p)
{
	struct flow *in = &p->in;
	size_t len;

	if (!is_stream(p)) {
		if (in->at < in->end && !pass(p, in->bytes, in->end))
			return false;
		in->at = in->end;
		return true;
	}
	while (p->end == PV_SOCKET_SERVES && (len = next_frame(p))) {
		if (!pass(p, in->bytes + in->at + LENGTH, len))
			return false;
		in->at += LENGTH + len;
	}
	memmove(in->bytes, in->bytes + in->at, in->end - in->at);
	in->end -= in->at;
	in->at = 0;
	return true;
}

/* Read from the peer. Returns whether there was something. */
static bool fetch(struct pv_socket_port *p)
{
	struct flow *in = &p->in;
	size_t from = is_stream(p) ? in->end : 0;
	struct iovec iov = {in->bytes + from, ROOM - from};
	ssize_t len = receive(p->cfg.fd, &iov, 1, is_stream(p) ? 0 : MSG_TRUNC);

	if (later(len))
		return false;
	if (len < 0) {
		peer_failed(p, len);
		return false;
	}
	/* Of a datagram socket, that is an empty packet, and no frame. */
	if (!len && p->cfg.type != SOCK_DGRAM) {
		finish(p, PV_SOCKET_CLOSED, 0);
		return false;
	}
	if (is_stream(p)) {
		in->end += (size_t)len;
		return true;
	}
	in->at = 0;
	in->end = (size_t)len <= FRAME_MAX ? (size_t)len : 0;
	if (!in->end)
		drop(p);
	return true;
}

static enum turn turn_in(struct pv_socket_port *p)
{
	for (int i = 0; i < TURN && p->end == PV_SOCKET_SERVES; i++) {
		if (!pass_all(p))
			return TURN_FULL;
		if (p->end != PV_SOCKET_SERVES || !fetch(p))
			return TURN_DONE;
	}
	return TURN_MORE;
}

/* Wait until one of the sockets is ready for what is to be done. */
static void wait_for(struct pv_socket_port *p, enum turn out, enum turn in)
{
	struct pollfd fds[] = {{.fd = p->cfg.fd}, {.fd = p->cfg.inner}};
	const struct timespec now = {0};

	fds[0].events = (short)((in == TURN_FULL ? 0 : POLLIN) | (out == TURN_FULL ? POLLOUT : 0));
	fds[1].events = (short)((out == TURN_FULL ? 0 : POLLIN) | (in == TURN_FULL ? POLLOUT : 0));
	/* What a peer that has gone has sent is still to be passed on: its end would be no news. */
	if (!fds[0].events)
		fds[0].fd = -1;
	if (ppoll(fds, 2, out == TURN_MORE || in == TURN_MORE ? &now : NULL, NULL) < 0 &&
	    errno != EINTR)
		finish(p, PV_SOCKET_ERROR, (uint32_t)errno);
	else if (fds[1].revents & (POLLHUP | POLLERR))
		finish(p, PV_SOCKET_LEFT, 0);
	else if (fds[0].revents & (POLLHUP | POLLERR) && !(fds[0].revents & POLLIN))
		finish(p, PV_SOCKET_CLOSED, 0);
}

/* What remains to the thread, beside what each such thread has: its work, and its CPU time. */
static const uint16_t calls[] = {
	SYS_recvmsg, SYS_sendmsg, SYS_shutdown, SYS_ppoll, SYS_clock_gettime,
};

static void stopped(void *arg, int call)
{
	struct pv_socket_port *p = arg;

	finish(p, PV_SOCKET_STOPPED, (uint32_t)call);
	shutdown(p->cfg.inner, SHUT_RDWR);
}

static void serve(void *arg)
{
	struct pv_socket_port *p = arg;

	pv_thread_confine(&p->thread, calls, sizeof(calls) / sizeof(calls[0]), stopped);
	while (p->end == PV_SOCKET_SERVES) {
		enum turn out = turn_out(p), in = turn_in(p);

		if (p->end == PV_SOCKET_SERVES)
			wait_for(p, out, in);
	}
	/* The worker takes what was passed on, then finds that its socket has come to an end. */
	shutdown(p->cfg.inner, SHUT_RDWR);
}

/**
 * pv_socket_port_new() - Begin to move frames
 * @cfg:	Copied; its descriptors are lent until pv_socket_port_free()
 * @error:	On failure: errno
 *
 * Return: the port, to be freed; NULL if there is no memory or no thread
 */
struct pv_socket_port *pv_socket_port_new(const struct pv_socket_config *cfg, int *error)
{
	struct pv_socket_port *p = calloc(1, sizeof(*p));

	*error = ENOMEM;
	if (!p)
		return NULL;
	p->cfg = *cfg;
	p->cfg.name[sizeof(p->cfg.name) - 1] = 0;
	*error = -pv_thread_start(&p->thread, p->cfg.name, -1, serve, p);
	if (*error) {
		free(p);
		return NULL;
	}
	pv_thread_go(&p->thread);
	pv_thread_await(&p->thread);
	return p;
}

/**
 * pv_socket_port_report() - How a port is
 * @p:		The port; from any thread
 * @out:	Filled in
 */
void pv_socket_port_report(const struct pv_socket_port *p, struct pv_socket_report *out)
{
	enum pv_socket_end end = __atomic_load_n(&p->end, __ATOMIC_ACQUIRE);

	*out = (struct pv_socket_report){
		.end = end,
		.value = end == PV_SOCKET_SERVES ? 0 : p->value,
		.dropped = __atomic_load_n(&p->dropped, __ATOMIC_RELAXED),
	};
}

/**
 * pv_socket_port_free() - Wait for the thread's end, and free the port
 * @p:		Its worker's end of the pair is closed; or NULL
 *
 * Nothing touches the descriptors any more.
 */
void pv_socket_port_free(struct pv_socket_port *p)
{
	if (!p)
		return;
	pv_thread_join(&p->thread);
	free(p);
}
