/* SPDX-License-Identifier: MIT */
/*
 * A minimal virtio-net driver for the bare-metal guests (virtio 1.2: 2.7 split virtqueues, 4.1
 * virtio over PCI, 4.2 virtio over MMIO, 5.1 network device). It has one card, one queue pair and
 * one descriptor per packet. All its parts are accessible, so that a guest can misuse them.
 *
 * The card is the window that virtio_mmio.device=4K@ADDRESS:GSI on the command line names, as for
 * Linux, or else the first one on the PCI bus.
 */
#ifndef PYVMM_VIRTNET_H
#define PYVMM_VIRTNET_H

#include "arp.h"
#include "guest.h"

/* The registers that both transports have; of 64-bit registers, each half. */
enum net_register {
	NET_DEVICE_FEATURE_SELECT,
	NET_DEVICE_FEATURE,
	NET_DRIVER_FEATURE_SELECT,
	NET_DRIVER_FEATURE,
	NET_STATUS,
	NET_QUEUE_SELECT,
	NET_QUEUE_SIZE_MAX, /* over PCI the same register as the size */
	NET_QUEUE_SIZE,
	NET_QUEUE_ENABLE,
	NET_QUEUE_DESC,
	NET_QUEUE_DESC_HIGH,
	NET_QUEUE_DRIVER,
	NET_QUEUE_DRIVER_HIGH,
	NET_QUEUE_DEVICE,
	NET_QUEUE_DEVICE_HIGH,
};

/* Over PCI only. */
#define COMMON_MSIX_CONFIG	 16
#define COMMON_QUEUE_MSIX_VECTOR 26
#define COMMON_QUEUE_NOTIFY_OFF	 30

/* Over MMIO only (4.2.2). */
#define MMIO_MAGIC_VALUE      0x000
#define MMIO_VERSION	      0x004
#define MMIO_DEVICE_ID	      0x008
#define MMIO_QUEUE_NOTIFY     0x050
#define MMIO_INTERRUPT_STATUS 0x060
#define MMIO_INTERRUPT_ACK    0x064
#define MMIO_CONFIG	      0x100

#define STATUS_ACKNOWLEDGE 1
#define STATUS_DRIVER	   2
#define STATUS_DRIVER_OK   4
#define STATUS_FEATURES_OK 8
#define STATUS_NEEDS_RESET 64

#define F_NET_MAC	(1ull << 5)
#define F_INDIRECT_DESC (1ull << 28)
#define F_VERSION_1	(1ull << 32)
#define F_RING_PACKED	(1ull << 34)

#define NO_VECTOR     0xffff
#define VECTOR_QUEUE  0x50 /* the vector of MSI-X entry 0, or of INTx */
#define VECTOR_CONFIG 0x51 /* the vector of MSI-X entry 1 */

#define QUEUE_SIZE    16
#define BUFFER	      2048
#define NET_HEADER    12 /* with VERSION_1, the header always has num_buffers */
#define DESC_NEXT     1
#define DESC_WRITE    2
#define DESC_INDIRECT 4
#define DESC_AVAIL    0x80 /* of a packed virtqueue in its first lap (2.8.1) */
#define AVAIL_NO_IRQ  1
#define USED_NO_KICK  1

enum { CAP_COMMON = 1, CAP_NOTIFY, CAP_ISR, CAP_DEVICE, CAP_COUNT };
enum net_irq { IRQ_MSIX, IRQ_INTX, IRQ_POLL };
/*
 * How the driver takes its steps (3.1.1): one after another; ACKNOWLEDGE and DRIVER in one write;
 * each without the bits of the earlier ones, which is wrong; with the queues before FEATURES_OK,
 * which is wrong, too.
 */
enum net_steps { STEPS_BOOK, STEPS_JOINED, STEPS_BARE, STEPS_QUEUES_FIRST };

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
	/*
	 * The driver's own data: how far it has read the used ring, the queue's index, and the
	 * address of its kick register.
	 */
	uint16_t seen, number;
	uint64_t notify;
	uint8_t buffer[QUEUE_SIZE][BUFFER];
};

struct virtnet {
	uint64_t window; /* guest-physical; 0 for a card on the PCI bus */
	unsigned int slot;
	uint64_t bars[6], caps[CAP_COUNT]; /* guest-physical */
	uint32_t notify_multiplier;
	unsigned int msix; /* the offset of the MSI-X capability; 0 for none */
	uint64_t msix_table;
	enum net_irq irq;
	enum net_steps steps;
	uint8_t mac[6];
	unsigned int kicks;
	volatile unsigned int queue_interrupts, config_interrupts;
};

extern struct virtnet net;
extern struct queue receive, transmit;

/*
 * Find the card and set up interrupts; on the PCI bus, place its BARs and read its capabilities. If
 * there is no card, fail(). Over MMIO there is no MSI-X: IRQ_MSIX means the interrupt line there.
 */
void net_probe(enum net_irq irq);
/* Switch bus mastering (bit 2 of the command register). net_probe() has switched it on. */
void net_master(bool on);
/*
 * Reset the card, negotiate exactly these features and read the MAC. If the card does not offer or
 * accept the features, fail().
 */
void net_negotiate(uint64_t features);
/* Empty both queues and tell the device their addresses. */
void net_queues(void);
/* Empty one queue and give the device these addresses for it; number is the queue's index. */
void net_queue_at(struct queue *q, uint16_t number, uint64_t desc, uint64_t driver,
		  uint64_t device);
/* Set DRIVER_OK, then offer all receive buffers. */
void net_go(void);
/* Write 0 to the status and wait until it reads as 0. */
void net_reset(void);
uint8_t net_status(void);
/* Access a register, with its width. */
uint32_t net_read(enum net_register reg);
void net_write(enum net_register reg, uint32_t value);

/* Offer buffer i of the queue, without a kick. */
void queue_offer(struct queue *q, uint16_t i, uint32_t length, uint16_t flags);
/* Make the descriptor head available without checking it. */
void queue_publish(struct queue *q, uint16_t head);
void queue_kick(struct queue *q);
/* Kick whether the device wants it or not. */
void queue_notify(struct queue *q);
/* Take the next used buffer and its length; returns false if there is none. */
bool queue_used(struct queue *q, uint16_t *i, uint32_t *length);

/*
 * Ask by ARP (RFC 826) who has the IP address target; own is this guest's address. Send one frame
 * and wait for the answer.
 */
void arp_ask(const uint8_t *own, const uint8_t *target);
/* The two parts of arp_ask(): kick and go on; wait for an answer. */
void arp_send(const uint8_t *own, const uint8_t *target);
/* Make the request available without a kick. */
void arp_offer(const uint8_t *own, const uint8_t *target);
void arp_wait(const uint8_t *target);

#endif
