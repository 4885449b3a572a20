// SPDX-License-Identifier: MIT
/*
 * UDP datagrams with sequence numbers: sends them in a guest, accounts for them at a tap, or the
 * other way round.
 *
 *   seqnet send IF COUNT PAUSE_US    datagrams 0..COUNT-1 (0: until SIGTERM), a pause after each;
 *                                    prints how many
 *   seqnet count IF                  until SIGTERM; prints what came: each number once and in
 *                                    order, or not
 *
 * They are sent as frames, past the IP stack. One that the driver did not take is sent again under
 * its number: the queueing discipline, which may drop, is left out (PACKET_QDISC_BYPASS), and a
 * stopped queue is an error here (ENOBUFS). What counts has a large buffer and says whether it
 * overflowed. So what is missing was lost below the sender's driver and above the counter's socket.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define PORT	 7099
#define MAGIC	 0x7365716e
#define LENGTH	 256
#define NUMBERS	 (1u << 30)
#define LIST_MAX 64

struct __attribute__((packed)) frame {
	struct ether_header eth;
	struct iphdr ip;
	struct udphdr udp;
	uint32_t magic;
	uint64_t number;
	uint8_t rest[LENGTH - 54];
};
_Static_assert(sizeof(struct frame) == LENGTH, "no holes");

static volatile sig_atomic_t done;

static void on_signal(int signo)
{
	(void)signo;
	done = 1;
}

static _Noreturn void die(const char *what)
{
	perror(what);
	exit(1);
}

static int open_socket(const char *name)
{
	int fd = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_IP));
	struct sockaddr_ll at = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP)};

	at.sll_ifindex = (int)if_nametoindex(name);
	if (fd < 0 || !at.sll_ifindex || bind(fd, (struct sockaddr *)&at, sizeof(at)))
		die(name);
	return fd;
}

static uint16_t ip_checksum(struct iphdr ip)
{
	uint16_t words[10];
	uint32_t sum = 0;

	memcpy(words, &ip, sizeof(words));
	for (int i = 0; i < 10; i++)
		sum += words[i];
	sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t) ~(sum + (sum >> 16));
}

static int send_frames(const char *name, uint64_t count, unsigned int pause_us)
{
	struct frame f = {
		.eth = {.ether_shost = {2, 0, 0, 0, 0, 9}, .ether_type = htons(ETH_P_IP)}};
	int fd = open_socket(name);
	uint64_t n, retries = 0;

	/* To all: nobody answers that the port is closed. */
	memset(f.eth.ether_dhost, 0xff, sizeof(f.eth.ether_dhost));
	f.ip = (struct iphdr){.version = 4, .ihl = 5, .ttl = 1, .protocol = IPPROTO_UDP};
	f.ip.tot_len = htons(LENGTH - sizeof(f.eth));
	f.ip.saddr = htonl(0xc0a86402);
	f.ip.daddr = INADDR_BROADCAST;
	f.ip.check = ip_checksum(f.ip);
	f.udp.source = f.udp.dest = htons(PORT);
	f.udp.len = htons(LENGTH - sizeof(f.eth) - sizeof(f.ip));
	f.magic = MAGIC;
	if (setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &(int){1}, sizeof(int)))
		die("PACKET_QDISC_BYPASS");
	for (n = 0; !done && (!count || n < count); n++) {
		f.number = n;
		while (send(fd, &f, sizeof(f), 0) < 0) {
			if (errno != ENOBUFS && errno != EAGAIN && errno != EINTR &&
			    errno != ENETDOWN)
				die("send");
			if (done)
				goto out;
			retries++;
			usleep(200);
		}
		if (pause_us)
			usleep(pause_us);
	}
out:
	printf("{\"sent\": %" PRIu64 ", \"retries\": %" PRIu64 "}\n", n, retries);
	return 0;
}

static int count_frames(const char *name)
{
	int fd = open_socket(name);
	uint8_t *seen = calloc(NUMBERS / 8, 1);
	uint64_t received = 0, repeated = 0, late = 0, next = 0, missing = 0;
	uint64_t list[LIST_MAX];
	uint32_t listed = 0;
	struct tpacket_stats stats;
	socklen_t size = sizeof(stats);
	struct frame f;

	if (!seen || setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &(int){256 << 20}, sizeof(int)))
		die("SO_RCVBUFFORCE");
	printf("ready\n");
	fflush(stdout);
	for (;;) {
		/* After the signal: what is there already. */
		ssize_t got = recv(fd, &f, sizeof(f), done ? MSG_DONTWAIT : 0);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			break;
		if (got != sizeof(f) || f.magic != MAGIC || f.number >= NUMBERS)
			continue;
		received++;
		if (seen[f.number / 8] >> f.number % 8 & 1)
			repeated++;
		else if (f.number < next)
			late++;
		seen[f.number / 8] |= (uint8_t)(1u << f.number % 8);
		if (f.number >= next)
			next = f.number + 1;
	}
	for (uint64_t n = 0; n < next; n++) {
		if (seen[n / 8] >> n % 8 & 1)
			continue;
		missing++;
		if (listed < LIST_MAX)
			list[listed++] = n;
	}
	if (getsockopt(fd, SOL_PACKET, PACKET_STATISTICS, &stats, &size))
		die("PACKET_STATISTICS");
	printf("{\"received\": %" PRIu64 ", \"next\": %" PRIu64 ", \"missing\": %" PRIu64
	       ", \"repeated\": %" PRIu64 ", \"late\": %" PRIu64 ", \"overflow\": %u, \"list\": [",
	       received, next, missing, repeated, late, stats.tp_drops);
	for (uint32_t i = 0; i < listed; i++)
		printf("%s%" PRIu64, i ? ", " : "", list[i]);
	printf("]}\n");
	return 0;
}

int main(int argc, char **argv)
{
	struct sigaction action = {.sa_handler = on_signal};

	/* Without SA_RESTART: a waiting call ends. */
	sigaction(SIGTERM, &action, NULL);
	if (argc == 5 && !strcmp(argv[1], "send"))
		return send_frames(argv[2], strtoull(argv[3], NULL, 10),
				   (unsigned int)atoi(argv[4]));
	if (argc == 3 && !strcmp(argv[1], "count"))
		return count_frames(argv[2]);
	fprintf(stderr, "usage: seqnet send IF COUNT PAUSE_US | seqnet count IF\n");
	return 2;
}
