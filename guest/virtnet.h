/* SPDX-License-Identifier: MIT */
/*
 * A minimal virtio-net driver (virtio 1.2: 2.7 split virtqueues, 4.1 over PCI, 5.1 network device)
 * for the bare-metal guests: one card, one queue pair, one descriptor a packet. Its parts are open,
 * so that a guest can misuse them.
 */
#ifndef PYVMM_VIRTNET_H
#define PYVMM_VIRTNET_H

#include "guest.h"

#define COMMON_DEVICE_FEATURE_SELECT 0
#define COMMON_DEVICE_FEATURE	     4
#define COMMON_DRIVER_FEATURE_SELECT 8
#define COMMON_DRIVER_FEATURE	     12
#define COMMON_MSIX_CONFIG	     16
#define COMMON_STATUS		     20
#define COMMON_QUEUE_SELECT	     22
#define COMMON_QUEUE_SIZE	     24
#define COMMON_QUEUE_MSIX_VECTOR     26
#define COMMON_QUEUE_ENABLE	     28
#define COMMON_QUEUE_NOTIFY_OFF	     30
#define COMMON_QUEUE_DESC	     32
#define COMMON_QUEUE_DRIVER	     40
#define COMMON_QUEUE_DEVICE	     48

#define STATUS_ACKNOWLEDGE 1
#define STATUS_DRIVER	   2
#define STATUS_DRIVER_OK   4
#define STATUS_FEATURES_OK 8
#define STATUS_NEEDS_RESET 64

#define F_NET_MAC	(1ull << 5)
#define F_INDIRECT_DESC (1ull << 28)
#define F_VERSION_1	(1ull << 32)

#define NO_VECTOR     0xffff
#define VECTOR_QUEUE  0x50 /* MSI-X entry 0, or INTx */
#define VECTOR_CONFIG 0x51 /* MSI-X entry 1 */

#define QUEUE_SIZE    16
#define BUFFER	      2048
#define NET_HEADER    12 /* VERSION_1: with num_buffers */
#define DESC_NEXT     1
#define DESC_WRITE    2
#define DESC_INDIRECT 4
#define AVAIL_NO_IRQ  1
#define USED_NO_KICK  1

enum { CAP_COMMON = 1, CAP_NOTIFY, CAP_ISR, CAP_DEVICE, CAP_COUNT };
enum net_irq { IRQ_MSIX, IRQ_INTX, IRQ_POLL };

struct descriptor {
	uint64_t address;
	uint32_t length;
	uint16_t flags, next;
};

struct queue {
	struct descriptor desc[QUEUE_SIZE] __attribute__((aligned(16)));
	struct {
		uint16_t flags, index, ring[QUEUE_SIZE], used_event;
	} avail;
	struct {
		uint16_t flags, index;
		struct {
			uint32_t id, length;
		} ring[QUEUE_SIZE];
		uint16_t avail_event;
	} used __attribute__((aligned(4)));
	/* Ours. */
	uint16_t seen, number;
	uint64_t notify;
	uint8_t buffer[QUEUE_SIZE][BUFFER];
};

struct virtnet {
	unsigned int slot;
	uint64_t bars[6], caps[CAP_COUNT]; /* guest-physical */
	uint32_t notify_multiplier;
	unsigned int msix; /* offset of the capability; 0: none */
	uint64_t msix_table;
	enum net_irq irq;
	uint8_t mac[6];
	unsigned int kicks;
	volatile unsigned int queue_interrupts, config_interrupts;
};

extern struct virtnet net;
extern struct queue receive, transmit;

/*
 * Find the first card, place its BARs, read its capabilities, set up interrupts. Fails where there
 * is no card.
 */
void net_probe(enum net_irq irq);
/*
 * Reset, negotiate exactly these features, read the MAC. Fails where they are not offered or not
 * accepted.
 */
void net_negotiate(uint64_t features);
/* Empty both queues and tell the device where they are. */
void net_queues(void);
/* One queue at any addresses; number is its index. */
void net_queue_at(struct queue *q, uint16_t number, uint64_t desc, uint64_t driver,
		  uint64_t device);
/* DRIVER_OK, then offer all of the receive buffers. */
void net_go(void);
/* Status 0, and wait until it is. */
void net_reset(void);
uint8_t net_status(void);

/* Offer buffer i of the queue, without a kick. */
void queue_offer(struct queue *q, uint16_t i, uint32_t length, uint16_t flags);
/* Make head available, whatever it is. */
void queue_publish(struct queue *q, uint16_t head);
void queue_kick(struct queue *q);
/* The next used buffer and its length, or false. */
bool queue_used(struct queue *q, uint16_t *i, uint32_t *length);

/*
 * Ask by ARP (RFC 826) who has target; own is our address. Sends one frame and waits for the
 * answer.
 */
void arp_ask(const uint8_t *own, const uint8_t *target);
/* A.B.C.D into four bytes. */
void parse_ip(const char *text, uint8_t *ip);

#endif
