/* SPDX-License-Identifier: MIT */
/*
 * Numbered datagrams and a checksummed TCP stream, for counting what a network loses or repeats.
 * Runs at both ends, in a guest as well: link it statically.
 *
 * flow udp-send ADDRESS PORT RATE SIZE: RATE datagrams per second of SIZE bytes, numbered from 0
 *
 * flow udp-receive PORT
 *
 * flow tcp-send ADDRESS PORT KBYTES: that much per second
 *
 * flow tcp-receive PORT
 *
 * SIGTERM ends all but tcp-receive, which ends with its stream. Then one line tells what happened.
 * A datagram counts as sent when send(2) has taken it; a blocking socket waits while the device
 * takes none.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define TICK_NS	  2000000
#define SIZE_MAX_ 1472
#define SEQ_MAX	  (64u << 20) /* 18 hours of 1000 a second */

static volatile sig_atomic_t stop;

static void on_term(int number)
{
	(void)number;
	stop = 1;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

static int open_socket(int type, const char *address, const char *port)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
	int one = 1, big = 64 << 20, fd = socket(AF_INET, type, 0);

	if (fd < 0)
		die("socket");
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (address) {
		if (inet_pton(AF_INET, address, &to.sin_addr) != 1)
			die(address);
		while (connect(fd, (struct sockaddr *)&to, sizeof(to))) {
			if (errno != ECONNREFUSED || stop)
				die("connect");
			usleep(100000);
			close(fd);
			fd = socket(AF_INET, type, 0);
		}
		return fd;
	}
	/* What arrives and is not read in time must not count as lost by the network. */
	if (type == SOCK_DGRAM && setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &big, sizeof(big)))
		die("SO_RCVBUFFORCE");
	if (bind(fd, (struct sockaddr *)&to, sizeof(to)))
		die("bind");
	return fd;
}

/* Sleep until the next tick. Returns how much is due by now at a rate per second. */
static uint64_t due(uint64_t start, uint64_t rate)
{
	nanosleep(&(struct timespec){.tv_nsec = TICK_NS}, NULL);
	return (now_ns() - start) / 1000 * rate / 1000000;
}

static int udp_send(const char *address, const char *port, uint64_t rate, size_t size)
{
	static uint8_t data[SIZE_MAX_];
	uint64_t seq = 0, refused = 0, start = now_ns();
	int fd = open_socket(SOCK_DGRAM, address, port);

	if (size < sizeof(seq) || size > sizeof(data))
		return 2;
	/*
	 * What is sent is to be in the device's hands, not in a queue before it: after a pause
	 * CoDel drops from a long queue that drains slowly, and that would count as lost.
	 */
	setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &(int){4096}, sizeof(int));
	while (!stop) {
		uint64_t until = due(start, rate);

		/* Not all at once what a pause has left undone. */
		if (until > seq + rate / 20 + 1) {
			start += (until - seq - rate / 20) * 1000000000 / rate;
			until = seq + rate / 20;
		}
		while (seq < until && !stop) {
			memcpy(data, &seq, sizeof(seq));
			if (send(fd, data, size, 0) == (ssize_t)size)
				seq++;
			else if (errno != EINTR &&
				 errno != ECONNREFUSED) /* an answer to an earlier one */
				refused++, usleep(1000);
		}
	}
	printf("sent=%llu refused=%llu\n", (unsigned long long)seq, (unsigned long long)refused);
	return 0;
}

static int udp_receive(const char *port)
{
	uint8_t *seen = calloc(SEQ_MAX / 8, 1);
	uint64_t received = 0, repeated = 0, disordered = 0, next = 0, bad = 0, missing = 0,
		 first = 0, late = 0;
	int fd = open_socket(SOCK_DGRAM, NULL, port);
	uint32_t overflows = 0;

	if (!seen)
		die("calloc");
	/* So that a signal between looking at stop and sleeping is seen, too. */
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &(struct timeval){.tv_usec = 200000},
		   sizeof(struct timeval));
	if (setsockopt(fd, SOL_SOCKET, SO_RXQ_OVFL, &(int){1}, sizeof(int)))
		die("SO_RXQ_OVFL");
	while (!stop) {
		uint8_t data[SIZE_MAX_];
		union {
			char room[CMSG_SPACE(sizeof(uint32_t))];
			struct cmsghdr align;
		} control;
		struct iovec iov = {data, sizeof(data)};
		struct msghdr m = {.msg_iov = &iov,
				   .msg_iovlen = 1,
				   .msg_control = &control,
				   .msg_controllen = sizeof(control)};
		ssize_t n = recvmsg(fd, &m, 0);
		uint64_t seq;

		if (n < 0)
			continue;
		for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c))
			if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SO_RXQ_OVFL)
				memcpy(&overflows, CMSG_DATA(c), sizeof(overflows));
		if (n < (ssize_t)sizeof(seq)) {
			bad++;
			continue;
		}
		memcpy(&seq, data, sizeof(seq));
		if (seq >= SEQ_MAX) {
			bad++;
			continue;
		}
		received++;
		if (seen[seq / 8] >> (seq % 8) & 1)
			repeated++;
		seen[seq / 8] |= (uint8_t)(1 << (seq % 8));
		if (seq < next) {
			if (!disordered++)
				late = seq;
		} else {
			next = seq + 1;
		}
	}
	for (uint64_t i = 0; i < next; i++) {
		if (seen[i / 8] >> (i % 8) & 1)
			continue;
		if (!missing++)
			first = i;
	}
	printf("received=%llu repeated=%llu missing=%llu first-missing=%llu disordered=%llu "
	       "first-disordered=%llu last=%llu bad=%llu overflows=%u\n",
	       (unsigned long long)received, (unsigned long long)repeated,
	       (unsigned long long)missing, (unsigned long long)first,
	       (unsigned long long)disordered, (unsigned long long)late, (unsigned long long)next,
	       (unsigned long long)bad, overflows);
	return 0;
}

/* The stream's bytes, the same at each run, and a checksum over them (FNV-1a). */
static uint64_t checksum(uint64_t sum, const uint8_t *data, size_t n)
{
	for (size_t i = 0; i < n; i++)
		sum = (sum ^ data[i]) * 0x100000001b3ull;
	return sum;
}

static int tcp_send(const char *address, const char *port, uint64_t kbytes)
{
	uint64_t state = 88172645463325252ull, sum = 0xcbf29ce484222325ull, sent = 0,
		 start = now_ns();
	int fd = open_socket(SOCK_STREAM, address, port);
	uint64_t block[512];

	while (!stop) {
		uint64_t until = due(start, kbytes * 1024);

		while (sent + sizeof(block) <= until && !stop) {
			size_t at = 0;

			for (size_t i = 0; i < 512; i++) {
				state ^= state << 13;
				state ^= state >> 7;
				state ^= state << 17;
				block[i] = state;
			}
			while (at < sizeof(block)) {
				ssize_t n = send(fd, (uint8_t *)block + at, sizeof(block) - at,
						 MSG_NOSIGNAL);

				if (n < 0 && errno != EINTR)
					die("send");
				at += n < 0 ? 0 : (size_t)n;
			}
			sum = checksum(sum, (uint8_t *)block, sizeof(block));
			sent += sizeof(block);
		}
	}
	shutdown(fd, SHUT_WR);
	(void)!read(fd, block, 1); /* the other end has all */
	printf("bytes=%llu sum=%016llx\n", (unsigned long long)sent, (unsigned long long)sum);
	return 0;
}

static int tcp_receive(const char *port)
{
	static uint8_t data[1 << 16];
	uint64_t sum = 0xcbf29ce484222325ull, received = 0;
	int listener = open_socket(SOCK_STREAM, NULL, port), fd;
	ssize_t n;

	if (listen(listener, 1))
		die("listen");
	fd = accept(listener, NULL, NULL);
	if (fd < 0)
		die("accept");
	while ((n = recv(fd, data, sizeof(data), 0)) > 0) {
		sum = checksum(sum, data, (size_t)n);
		received += (uint64_t)n;
	}
	if (n < 0)
		die("recv");
	printf("bytes=%llu sum=%016llx\n", (unsigned long long)received, (unsigned long long)sum);
	return 0;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	struct sigaction action = {.sa_handler = on_term}; /* without SA_RESTART */

	sigaction(SIGTERM, &action, NULL);
	if (!strcmp(what, "udp-send") && argc == 6)
		return udp_send(argv[2], argv[3], strtoull(argv[4], NULL, 10),
				strtoul(argv[5], NULL, 10));
	if (!strcmp(what, "udp-receive") && argc == 3)
		return udp_receive(argv[2]);
	if (!strcmp(what, "tcp-send") && argc == 5)
		return tcp_send(argv[2], argv[3], strtoull(argv[4], NULL, 10));
	if (!strcmp(what, "tcp-receive") && argc == 3)
		return tcp_receive(argv[2]);
	fprintf(stderr, "usage: flow udp-send|udp-receive|tcp-send|tcp-receive ...\n");
	return 2;
}
