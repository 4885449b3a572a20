/* SPDX-License-Identifier: MIT */
/*
 * The emulated data path of one queue pair: moves packets between a tap and two rings.
 *
 * Theory of operation
 *
 * One thread (thread.h) owns a worker from pv_net_worker_go() until pv_net_worker_join() and never
 * waits for Python. A round gives each direction one turn of bounded work (CVE-2019-3900); when
 * neither direction has more to do, the worker asks for kicks, looks again, and sleeps in epoll.
 *
 * Every descriptor of the epoll set but wake_fd is edge-triggered, so a kick costs no read to drain
 * it: a wake-up was measured at a third of what ppoll and read cost. The eventfds keep their count,
 * which is harmless for whoever takes them over: vhost does not drain them either.
 *
 * Transmit: writev straight from guest memory, header included, wherever the guest split it. After
 * a burst the worker sleeps up to 200 us, or 1 ms in bulk, before it asks for kicks again: see
 * linger().
 *
 * Receive: chains are taken ahead into a window big enough for the largest frame, and readv goes
 * straight into them. A tap does not tell how long the next frame is, so the last segment of each
 * readv is a scratch buffer: it catches what the window cannot hold, and keeps the usual readv
 * short (the whole window is used only while frames are long). What the scratch buffer caught is
 * copied to the rest of the window; if the guest has too few buffers, the frame is held for a while
 * until it adds some. Chains taken but not used are given back when the worker stops, so that
 * last_avail == used index. A frame that is held then is lost, unless the worker was told to
 * finish: then it first waits for the buffers, as long as a frame may wait while the worker runs.
 *
 * With captures (capture.h), each packet that is handed over is copied to their rings after writev,
 * and before the chains of a received frame are used. Without one, that costs a load and a branch
 * per packet. A capture may come and go at any time: a worker that is about to use captures says
 * so first, and whoever takes one away waits until the worker has done with its packet.
 *
 * With faults on demand (impair.h), what the rules want to be lost, changed or put off goes by
 * memory of the worker's own between ring and fd: a frame of the guest's is copied after its chain
 * was taken, and the chain is used at once; a frame for the guest is read into the scratch buffer.
 * Time of what waits ends the worker's sleep. Counters of packets, and captures, are the ring's:
 * they show what the guest has sent and got. Without faults, that costs a load and a branch per
 * packet. Used entries that are to come behind those of the next packet, if such a rule says so and
 * the driver has not negotiated IN_ORDER, are kept out of the ring until then, at most for BACK_NS
 * and never beyond the worker's end: see struct back.
 *
 * With a log (dirty_log.h), the buffers of received frames are marked, as the rings' own areas are.
 *
 * A malformed ring stops that direction only.
 *
 * On a cable (cable.h) no system call moves a packet. A turn takes a burst of transmit chains, so
 * that the processor fetches their buffers together, copies the frames into the cable's queue, and
 * publishes the queue and the ring once. A frame that comes by the cable has a known length, so
 * nothing is held or copied twice: the frame stays in the queue until the guest has the buffers for
 * it. Its header is zero, whatever the sender's said. With in-flight notes, each transmit chain is
 * published by itself, as always, for no more than one may be in doubt. In the place of linger(),
 * the worker looks for work a while before it asks for kicks.
 *
 * The textbook device is the same code with parts left out:
 *
 * - in_exit: a transmit kick is an exit, and the vCPU that kicks sends the frames itself, in
 *   take_kick(). The thread receives. One lock is between them, as QEMU's big lock was; the thread
 *   has it while it is not in epoll, where it goes after each round, and a vCPU that waits for the
 *   lock has it next. The thread also transmits what no kick comes for ("owed"): what was pending
 *   at the start, after a tap that was full or is gone, and beyond a turn. A vCPU waits for the
 *   lock for LOCK_MS at most, then leaves its kick to the thread. A tap that the vCPU finds gone is
 *   taken from epoll by the thread: the sandbox lets no vCPU do that.
 * - unbatched: a turn is one frame, which is published and interrupts the guest at once. The thread
 *   goes back to epoll for each, does not linger, and never turns transmit kicks off. With
 *   EVENT_IDX the driver gets by without kicks while the worker has not asked for more, though.
 * - inject: the thread that moves the frame raises the interrupt by an ioctl.
 *
 * Other threads ask the worker for something by an atomic field and a write to wake_fd, and may
 * read the counters at any time. The worker tells them what happens by a ring of events, which one
 * thread reads, and an eventfd. It never waits for the reader. The ring cannot lose a fault or an
 * error, since each of them comes once and has its slot kept free; of link changes, which have no
 * such bound, it may lose some in the middle, but not the latest state.
 *
 * Before it looks at its rings, the thread is confined to nine system calls (confine.h). The loop
 * uses epoll_pwait2, epoll_ctl, readv (the tap, and wake_fd), writev (the tap, and eventfds), ppoll
 * (before a write to a call eventfd, which a peer may share: event.h), futex (locks) and, if the
 * vDSO cannot tell the time, clock_gettime. Its end adds clock_gettime (CPU time) and exit; if it
 * has to be interrupted, rt_sigreturn. Name, CPU and timer slack are set before. strace -f on
 * tests/fuzz/race_net shows it. With interrupts by ioctl, the thread has ioctl, too; on a cable
 * with two ends, sched_yield. There may be ten at most (tests/lint/test_sandbox.py).
 */
#ifndef PV_NET_WORKER_H
#define PV_NET_WORKER_H

#include "cable.h"
#include "flow_hash.h"
#include "inflight.h"
#include "inject.h"
#include "trace.h"
#include "vring.h"

/* cffi: begin */
/* What a worker tells. */
enum pv_net_event_kind {
	PV_NET_NONE,
	PV_NET_RING_FAULT, /* queue, fault; that direction is off from now on */
	/* The tap is gone: transmits are dropped from now on, nothing is received. */
	PV_NET_LINK_DOWN,
	PV_NET_LINK_UP,	   /* the tap given to pv_net_worker_attach is in use */
	PV_NET_NOT_PINNED, /* error; the thread runs on any CPU */
	/* error: number of a system call that the thread may not make; it does nothing any more */
	PV_NET_STOPPED,
	PV_NET_ERROR /* error; epoll failed, which should not happen: the thread has ended */
};

struct pv_net_event {
	enum pv_net_event_kind kind;
	int queue; /* 0 receive, 1 transmit */
	enum pv_fault fault;
	int error; /* errno */
};

struct pv_net_ring {
	uint32_t size; /* 0: the driver left the queue out */
	uint32_t base; /* see vring.h */
	uint64_t desc;
	uint64_t avail;
	uint64_t used;
	int kick; /* lent, as are all descriptors */
	int call;
	/* Raises the interrupt in the place of call, by an ioctl; lent; NULL: call does. */
	struct pv_inject *inject;
	/*
	 * In-flight region of PV_INFLIGHT_SIZE() bytes, shared with an untrusted peer; NULL: none.
	 * The ring then starts at the used index: base is not looked at where the region has been
	 * in use.
	 */
	uint8_t *inflight;
	/*
	 * Coalescing (5.1.6.5.7): an interrupt waits until so many packets are done, or for so long
	 * after the first of them; no microseconds: it does not wait. Not together with inflight.
	 */
	uint32_t coalesce_packets; /* 0: however many */
	uint32_t coalesce_us;
	bool log_used;	   /* if there is a log: mark the used ring, too */
	uint64_t log_addr; /* under this address */
};

#define PV_NET_HOLD_MS 200 /* a good value for hold_ms */

struct pv_net_config {
	struct pv_net_ring ring[2]; /* 0 receive, 1 transmit */
	int fd;			    /* non-blocking tap, or a socket that keeps packet boundaries */
	/*
	 * One end of a cable, lent: frames go by it, and fd is its bell. NULL: fd takes them. Not
	 * together with in_exit.
	 */
	struct pv_cable_end *cable;
	/*
	 * virtio_net_hdr: 12, 20 with a hash, 24 with tunnels, or 10 without VERSION_1 and
	 * MRG_RXBUF; of fd, too; on a cable there are none
	 */
	uint32_t hdr_len;
	uint32_t first_queue; /* index of the receive virtqueue, for captures */
	uint32_t max_frame;   /* longest frame expected from fd, header included */
	uint32_t poll_us;     /* look for work this long before sleeping */
	/*
	 * The textbook device: pv_net_worker_taker() takes transmit kicks in the vCPU's thread. Not
	 * together with poll_us or inflight.
	 */
	bool in_exit;
	bool unbatched;	  /* one frame at a time, and a kick is wanted for each */
	uint32_t hold_ms; /* how long a frame waits for the guest to add buffers */
	uint64_t taken; /* frames that fd has taken so far, of all senders; PV_INFLIGHT_UNCOUNTED */
	/*
	 * Frames from fd may need the driver to know what their header says: GUEST_CSUM is
	 * negotiated. Else the driver gets headers of zeros (5.1.6.4.1), whatever fd says.
	 */
	bool guest_csum;
	bool mrg_rxbuf;
	bool in_order;		  /* IN_ORDER: the rings keep their order, whatever is asked for */
	struct pv_flow_hash hash; /* if hdr_len is 20 or 24 */
	struct pv_vring_format format;
	/*
	 * Bitmap of log_size bytes in which the pages of guest memory are marked that the worker
	 * has written, shared with an untrusted peer; NULL: none.
	 */
	uint8_t *log;
	uint64_t log_size;
	int log_call;		/* eventfd: 1 is added when something was marked; -1: none */
	int event_fd;		/* eventfd: 1 is added when pv_net_worker_event has something */
	int cpu;		/* to pin the thread to; -1: none */
	char name[16];		/* of the thread */
	struct pv_trace *trace; /* of wake-ups by kicks and of batches, lent; NULL: none */
};

#define PV_NET_BATCH_BINS 8

/* Written by the worker only; read them with pv_net_worker_counters. */
struct pv_net_counters {
	uint64_t rx_packets;
	uint64_t rx_bytes; /* without the virtio_net_hdr */
	/* Wake-ups by a kick; kicks while the worker is awake count once or not at all. */
	uint64_t rx_kicks;
	uint64_t rx_calls;
	uint64_t rx_calls_suppressed; /* batches for which the guest wanted no interrupt */
	uint64_t rx_calls_delayed;    /* batches whose interrupt waited for more packets */
	uint64_t rx_batches;	      /* publications of the used index */
	uint64_t rx_waits;	      /* times without a buffer from the guest */
	uint64_t rx_overflows;	      /* frames that needed a copy from the scratch buffer */
	uint64_t rx_drop_long;	      /* frames longer than the buffers of the guest */
	uint64_t rx_drop_short;	      /* frames without a full header */
	uint64_t rx_drop_error;	      /* frames lost in reading */
	uint64_t rx_drop_held; /* frames for which no buffers came in time, or held at stop */
	/* Packets by what their header says; both flags count, none of them is csum_none. */
	uint64_t rx_csum_valid;
	uint64_t rx_csum_needed;
	uint64_t rx_csum_none;
	uint64_t rx_gso_packets; /* gso_type is not 0 */
	uint64_t rx_gso_bytes;	 /* without the virtio_net_hdr */
	uint64_t tx_packets;
	uint64_t tx_bytes;
	uint64_t tx_kicks;
	uint64_t tx_calls;
	uint64_t tx_calls_suppressed;
	uint64_t tx_calls_delayed;
	uint64_t tx_batches;
	uint64_t tx_blocks;	/* times that fd took no more */
	uint64_t tx_drop_error; /* frames that fd refused: bad header, interface down */
	uint64_t tx_drop_link;	/* frames sent after fd was gone */
	uint64_t tx_lingers;  /* short sleeps, before asking for kicks, that brought more to send */
	uint64_t tx_in_doubt; /* frames that a killed process was sending: taken as sent */
	uint64_t log_missed;  /* pages that could not be marked: the log is too small */
	uint64_t tx_csum_needed; /* of those sent */
	uint64_t tx_csum_none;
	uint64_t tx_gso_packets;
	uint64_t tx_gso_bytes;
	uint64_t link_losses;
	uint64_t ring_faults;
	uint64_t events_missed; /* link changes that nobody was told of one by one */
	uint64_t wakeups;
	uint64_t fd_reads; /* system calls on fd, vain ones included */
	uint64_t fd_writes;
	/* Batches by size: 1, 2-3, 4-7, ... 64-127, 128 and more. */
	uint64_t rx_batch_size[PV_NET_BATCH_BINS];
	uint64_t tx_batch_size[PV_NET_BATCH_BINS];
};

/* What is known of a worker's thread. */
struct pv_net_thread {
	int tid;
	uint64_t began; /* when it began to serve the rings: CLOCK_MONOTONIC, nanoseconds */
};

struct pv_net_worker;
struct pv_capture;
struct pv_impair;

struct pv_net_worker *pv_net_worker_new(const struct pv_net_config *cfg,
					const struct pv_memory *mem, struct pv_net_event *why);
void pv_net_worker_free(struct pv_net_worker *w);
int pv_net_worker_start(struct pv_net_worker *w);
void pv_net_worker_go(struct pv_net_worker *w);
void pv_net_worker_await(struct pv_net_worker *w, struct pv_net_thread *out);
bool pv_net_worker_event(struct pv_net_worker *w, struct pv_net_event *ev);
int pv_net_worker_hold(struct pv_net_worker *w, int timeout_ms);
struct pv_taker *pv_net_worker_taker(struct pv_net_worker *w);
void pv_net_worker_stop(struct pv_net_worker *w, bool finish);
void pv_net_worker_join(struct pv_net_worker *w);
void pv_net_worker_attach(struct pv_net_worker *w, int fd);
bool pv_net_worker_capture(struct pv_net_worker *w, uint32_t place, struct pv_capture *c);
void pv_net_worker_impair(struct pv_net_worker *w, struct pv_impair *im);
uint64_t pv_net_worker_cpu_ns(const struct pv_net_worker *w);
uint32_t pv_net_worker_base(const struct pv_net_worker *w, int queue);
uint32_t pv_net_worker_position(const struct pv_net_worker *w, int queue);
void pv_net_worker_counters(const struct pv_net_worker *w, struct pv_net_counters *out);
/* cffi: end */

#endif
