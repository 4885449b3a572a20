/* SPDX-License-Identifier: MIT */
#include <linux/virtio_ring.h>
#include <string.h>

#include "vring_packed.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
	       "virtio 1.x is little-endian and so are we");
_Static_assert(sizeof(struct vring_desc) == 16, "2.7.5");

/* Index into the available and used areas, in 16-bit units. */
enum { FLAGS = 0, IDX = 1, RING = 2 };

static const char *const fault_text[] = {
	[PV_FAULT_NONE] = "no fault",
	[PV_FAULT_SIZE] = "queue size is not from 1 to 32768, or not a power of two",
	[PV_FAULT_ALIGN] = "ring area is misaligned",
	[PV_FAULT_AREA] = "ring area is not in guest memory",
	[PV_FAULT_AVAIL_IDX] = "available index is ahead by more than the queue size",
	[PV_FAULT_HEAD] = "head is outside the descriptor table",
	[PV_FAULT_NEXT] = "next is outside the descriptor table",
	[PV_FAULT_LOOP] = "descriptor chain loops",
	[PV_FAULT_INDIRECT] = "indirect descriptor without INDIRECT_DESC",
	[PV_FAULT_INDIRECT_NESTED] = "indirect descriptor inside an indirect table",
	[PV_FAULT_INDIRECT_NEXT] = "indirect descriptor with a next one",
	[PV_FAULT_INDIRECT_LEN] = "indirect table of a bad length",
	[PV_FAULT_INDIRECT_ADDR] = "indirect table is not in guest memory",
	[PV_FAULT_ZERO_LEN] = "descriptor of length 0",
	[PV_FAULT_RANGE] = "descriptor is not in guest memory",
	[PV_FAULT_ORDER] = "readable descriptor after a writable one",
	[PV_FAULT_SEGMENTS] = "descriptor chain of too many segments",
	[PV_FAULT_DIRECTION] = "descriptor of the wrong direction",
	[PV_FAULT_SHORT] = "descriptor chain is shorter than the packet header",
	[PV_FAULT_TOO_LONG] = "descriptor chain of too many bytes",
	[PV_FAULT_BASE] = "position is outside of the ring",
	[PV_FAULT_AGAIN] = "descriptor is available again before it was used",
};
_Static_assert(sizeof(fault_text) / sizeof(fault_text[0]) == PV_FAULT_COUNT,
	       "every fault has its text");

/**
 * pv_fault_text() - Say in words what is wrong
 * @fault:	Any value
 *
 * Return: a static string
 */
const char *pv_fault_text(enum pv_fault fault)
{
	return (unsigned int)fault < PV_FAULT_COUNT ? fault_text[fault] : "unknown fault";
}

/**
 * pv_vring_init() - Take over a ring
 * @vr:		Filled in
 * @mem:	Guest memory; must outlive the ring
 * @size:	Entries, up to 32768; of a split ring, a power of two
 * @desc:	Guest-physical address of the descriptor area, 16-byte aligned
 * @avail:	Address of the driver area, 2-byte aligned; packed: 4-byte
 * @used:	Address of the device area, 4-byte aligned
 * @base:	Position; see vring.h
 * @format:	What was negotiated
 *
 * Each area, the event fields included, must lie within one memory region. The function reads at
 * most used->idx and writes nothing, so that a refused ring is left as it was.
 *
 * Return: PV_FAULT_NONE, _SIZE, _ALIGN, _AREA or _BASE
 */
enum pv_fault pv_vring_init(struct pv_vring *vr, const struct pv_memory *mem, uint32_t size,
			    uint64_t desc, uint64_t avail, uint64_t used, uint32_t base,
			    struct pv_vring_format format)
{
	uint64_t avail_len = format.packed ? 4 : 6 + 2ull * size;
	uint64_t used_len = format.packed ? 4 : 6 + 8ull * size;

	memset(vr, 0, sizeof(*vr));
	if (!size || size > PV_VRING_SIZE_MAX || (!format.packed && (size & (size - 1))))
		return vr->fault = PV_FAULT_SIZE;
	if (desc % VRING_DESC_ALIGN_SIZE || used % VRING_USED_ALIGN_SIZE ||
	    avail % (format.packed ? 4 : VRING_AVAIL_ALIGN_SIZE))
		return vr->fault = PV_FAULT_ALIGN;
	vr->mem = mem;
	vr->size = size;
	vr->mask = (uint16_t)(size - 1);
	vr->desc = pv_mem_host(mem, desc, 16ull * size);
	vr->avail = (uint16_t *)(void *)pv_mem_host(mem, avail, avail_len);
	vr->used = (uint16_t *)(void *)pv_mem_host(mem, used, used_len);
	if (!vr->desc || !vr->avail || !vr->used)
		return vr->fault = PV_FAULT_AREA;
	vr->packed = format.packed;
	vr->indirect = format.indirect;
	vr->event_idx = format.event_idx;
	vr->notify_on = true;
	if (vr->packed)
		return vr->fault = pv_packed_init(vr, base);
	vr->used_event = vr->avail + RING + size;
	vr->avail_event = vr->used + RING + 4 * size;
	vr->last_avail = vr->avail_idx = (uint16_t)base;
	vr->used_idx = vr->used_next = __atomic_load_n(&vr->used[IDX], __ATOMIC_RELAXED);
	return PV_FAULT_NONE;
}

/**
 * pv_vring_log() - Mark from now on what is written to the ring's areas
 * @vr:		The ring; nothing is pushed
 * @dirty:	The log, lent
 * @used:	Address to mark for the first byte of the device area; any value
 * @desc:	Guest-physical address of the descriptor area
 */
void pv_vring_log(struct pv_vring *vr, struct pv_dirty_log *dirty, uint64_t used, uint64_t desc)
{
	vr->log = (struct pv_vring_log){.dirty = dirty, .used = used, .desc = desc};
}

/* Mark the latest n elements of the used ring, at most all of them, and the index. */
static void mark_used(struct pv_vring *vr, uint32_t n)
{
	uint32_t at = (vr->used_idx - n) & vr->mask;
	uint32_t first = n < vr->size - at ? n : vr->size - at;
	uint64_t elements = vr->log.used + 2 * RING;

	pv_dirty_mark(vr->log.dirty, elements + 8ull * at, 8ull * first);
	pv_dirty_mark(vr->log.dirty, elements, 8ull * (n - first));
	pv_dirty_mark(vr->log.dirty, vr->log.used, 2 * RING);
}

/* Mark the field that asks for kicks, which has just been written. */
static void mark_notify(struct pv_vring *vr)
{
	uint64_t at = vr->log.used;

	if (vr->packed)
		pv_dirty_mark(vr->log.dirty, at, 4);
	else if (vr->event_idx)
		pv_dirty_mark(vr->log.dirty, at + 2 * RING + 8ull * vr->size, 2);
	else
		pv_dirty_mark(vr->log.dirty, at, 2);
}

/**
 * pv_vring_base() - Where the next owner of the ring has to start
 * @vr:		The ring
 *
 * Return: the position as pv_vring_init() takes it
 */
uint32_t pv_vring_base(const struct pv_vring *vr)
{
	if (!vr->packed)
		return vr->last_avail;
	return pv_packed_outside(vr, vr->last_avail) | (uint32_t)pv_packed_outside(vr, vr->used_idx)
							       << 16;
}

/**
 * pv_vring_glance() - The ring's position, for a thread that does not own the ring
 * @vr:		The ring
 *
 * The owner goes on meanwhile. Each index is read once and whole, the two of a packed ring one
 * after the other, so they need not belong together: this is for people, not for a hand-over.
 *
 * Return: as pv_vring_base()
 */
uint32_t pv_vring_glance(const struct pv_vring *vr)
{
	uint16_t used = __atomic_load_n(&vr->used_idx, __ATOMIC_RELAXED);
	uint16_t avail = __atomic_load_n(&vr->last_avail, __ATOMIC_RELAXED);

	if (!vr->packed)
		return avail;
	return pv_packed_outside(vr, avail) | (uint32_t)pv_packed_outside(vr, used) << 16;
}

/**
 * pv_vring_position() - An index of the ring as the specification has it, for reports
 * @vr:		The ring
 * @index:	One of last_avail, used_next and used_idx, or an earlier value of these
 *
 * Return: split: the index; packed: the descriptor's place, with the wrap counter in bit 15
 */
uint16_t pv_vring_position(const struct pv_vring *vr, uint16_t index)
{
	return vr->packed ? pv_packed_outside(vr, index) : index;
}

/* Half a descriptor; an indirect table may lie at any address. */
struct __attribute__((packed, may_alias)) half {
	uint64_t bits;
};

/*
 * Copy descriptor i of table once; the guest may change the original while we look. The last two
 * fields of a packed descriptor are id and flags (2.8.13), those of a split one flags and next.
 */
static inline struct vring_desc desc_copy(const uint8_t *table, uint32_t i, bool packed)
{
	/* Volatile: else the compiler may fetch a field from guest memory again after the check. */
	const volatile struct half *from = (const volatile void *)(table + 16ull * i);
	uint64_t addr = from[0].bits, rest = from[1].bits;
	uint16_t third = (uint16_t)(rest >> 32), fourth = (uint16_t)(rest >> 48);

	return (struct vring_desc){.addr = addr,
				   .len = (uint32_t)rest,
				   .flags = packed ? fourth : third,
				   .next = packed ? third : fourth};
}

static inline enum pv_step walk_bad(struct pv_walk *w, enum pv_fault fault)
{
	w->fault = fault;
	w->ended = true;
	return PV_BAD;
}

static inline void walk_begin(struct pv_walk *w, const struct pv_vring *vr, uint16_t head)
{
	*w = (struct pv_walk){
		.vr = vr,
		.table = vr->desc,
		.count = vr->size,
		.ttl = vr->size,
		.next = head,
	};
}

/* pv_walk_next(), so that pv_vring_pop() keeps the state in registers. */
static inline __attribute__((always_inline)) enum pv_step walk_next(struct pv_walk *w,
								    struct pv_segment *seg)
{
	bool packed = w->vr->packed;
	struct vring_desc d;

	if (w->ended)
		return w->fault ? PV_BAD : PV_DONE;
	for (;;) {
		if (w->next >= w->count) {
			bool head = !w->indirect && w->ttl == w->count;

			return walk_bad(w, head ? PV_FAULT_HEAD : PV_FAULT_NEXT);
		}
		if (!w->ttl)
			return walk_bad(w, PV_FAULT_LOOP);
		w->ttl--;
		d = desc_copy(w->table, w->next, packed);
		if (packed && !w->indirect) {
			w->slots++;
			w->id = d.next;
		}
		if (!(d.flags & VRING_DESC_F_INDIRECT))
			break;
		/*
		 * 2.7.5.3, 2.8.7: the last descriptor of a chain may refer to a table with the rest
		 * of the chain. The device must ignore its WRITE flag.
		 */
		if (w->indirect)
			return walk_bad(w, PV_FAULT_INDIRECT_NESTED);
		if (!w->vr->indirect)
			return walk_bad(w, PV_FAULT_INDIRECT);
		if (d.flags & VRING_DESC_F_NEXT)
			return walk_bad(w, PV_FAULT_INDIRECT_NEXT);
		if (!d.len || d.len % sizeof(d))
			return walk_bad(w, PV_FAULT_INDIRECT_LEN);
		w->table = pv_mem_host(w->vr->mem, d.addr, d.len);
		if (!w->table)
			return walk_bad(w, PV_FAULT_INDIRECT_ADDR);
		w->count = w->ttl = d.len / (uint32_t)sizeof(d);
		w->next = 0;
		w->indirect = true;
	}
	if (!d.len)
		return walk_bad(w, PV_FAULT_ZERO_LEN);
	seg->write = d.flags & VRING_DESC_F_WRITE;
	if (w->written && !seg->write)
		return walk_bad(w, PV_FAULT_ORDER);
	w->written = seg->write;
	seg->len = d.len;
	seg->host = pv_mem_host(w->vr->mem, d.addr, d.len);
	if (!seg->host)
		return walk_bad(w, PV_FAULT_RANGE);
	if (packed && w->indirect) {
		/* 2.8.7: the entries are in order, and the only valid flag is WRITE. */
		w->ended = ++w->next == w->count;
	} else if (!(d.flags & VRING_DESC_F_NEXT)) {
		w->ended = true;
	} else if (packed) {
		w->next = w->next + 1 == w->count ? 0 : w->next + 1;
	} else {
		w->next = d.next;
	}
	return PV_MORE;
}

/**
 * pv_walk_begin() - Start walking a chain
 * @w:		Filled in
 * @vr:		The ring
 * @head:	Index of the first descriptor; any value; packed: in the ring
 */
void pv_walk_begin(struct pv_walk *w, const struct pv_vring *vr, uint16_t head)
{
	walk_begin(w, vr, head);
}

/**
 * pv_walk_next() - Get the next segment of a chain
 * @w:		From pv_walk_begin()
 * @seg:	Filled in on PV_MORE
 *
 * The walk is bounded: a table of n entries yields at most n descriptors, and at most one indirect
 * table is entered.
 *
 * Return: PV_MORE; PV_DONE after the last segment; PV_BAD with @w->fault set. After PV_DONE or
 * PV_BAD, further calls return the same.
 */
enum pv_step pv_walk_next(struct pv_walk *w, struct pv_segment *seg)
{
	return walk_next(w, seg);
}

/* Read the available index; returns false if its value is impossible. */
static bool avail_refresh(struct pv_vring *vr)
{
	/*
	 * Acquire: this pairs with the driver's barrier between writing descriptors and ring entry
	 * and storing the index (2.7.13.3). All that we read through the ring after this is at
	 * least as new as the index.
	 */
	uint16_t idx = __atomic_load_n(&vr->avail[IDX], __ATOMIC_ACQUIRE);

	/* An impossible index is not kept: whoever clears the fault has to find it again. */
	if ((uint16_t)(idx - vr->last_avail) > vr->size)
		return false;
	vr->avail_idx = idx;
	return true;
}

/* The head in a place of the available ring of a split ring; any value. */
static inline uint16_t split_head(const struct pv_vring *vr, uint16_t at)
{
	return __atomic_load_n(&vr->avail[RING + (at & vr->mask)], __ATOMIC_RELAXED);
}

/*
 * Look at the chain that begins at an entry, of a ring of the given format. Returns whether it is a
 * single good descriptor, as most are. Else pop_chain() looks again, and decides on what it sees
 * then.
 */
static inline __attribute__((always_inline)) bool look_single(const struct pv_vring *vr,
							      bool packed, uint32_t head,
							      struct iovec *iov,
							      struct pv_chain *chain)
{
	struct vring_desc d;
	uint8_t *host;
	bool write;

	if (head >= vr->size)
		return false;
	d = desc_copy(vr->desc, head, packed);
	if (d.flags & (VRING_DESC_F_NEXT | VRING_DESC_F_INDIRECT) || !d.len)
		return false;
	host = pv_mem_host(vr->mem, d.addr, d.len);
	if (!host)
		return false;
	write = d.flags & VRING_DESC_F_WRITE;
	*iov = (struct iovec){.iov_base = host, .iov_len = d.len};
	*chain = (struct pv_chain){.head = packed ? d.next : (uint16_t)head,
				   .slots = 1,
				   .out_num = !write,
				   .in_num = write,
				   .out_len = write ? 0 : d.len,
				   .in_len = write ? d.len : 0};
	return true;
}

/*
 * Take the chain that begins at an entry, whatever it is. Not inlined: it would make pv_vring_pop()
 * save registers that a single descriptor does not need.
 */
static __attribute__((noinline)) enum pv_step pop_chain(struct pv_vring *vr, uint16_t head,
							struct iovec *iov, uint32_t max,
							struct pv_chain *chain)
{
	struct pv_segment seg;
	struct pv_walk w;
	enum pv_step step;
	uint32_t n = 0;

	*chain = (struct pv_chain){.head = head, .slots = 1};
	walk_begin(&w, vr, head);
	while ((step = walk_next(&w, &seg)) == PV_MORE) {
		if (n == max) {
			vr->fault = PV_FAULT_SEGMENTS;
			return PV_BAD;
		}
		iov[n].iov_base = seg.host;
		iov[n].iov_len = seg.len;
		n++;
		if (seg.write) {
			chain->in_num++;
			chain->in_len += seg.len;
		} else {
			chain->out_num++;
			chain->out_len += seg.len;
		}
	}
	if (step == PV_BAD) {
		vr->fault = w.fault;
		return PV_BAD;
	}
	if (vr->packed) {
		chain->head = w.id;
		chain->slots = w.slots;
		if (!pv_packed_take(vr, w.slots)) {
			vr->fault = PV_FAULT_AGAIN;
			return PV_BAD;
		}
	} else {
		vr->last_avail++;
	}
	return PV_MORE;
}

/**
 * pv_vring_pop() - Take the next available chain
 * @vr:		The ring
 * @iov:	Gets the segments; those that the device reads come first
 * @max:	Entries of @iov, at least one; a chain with more segments is bad
 * @chain:	Filled in on PV_MORE
 *
 * A bad chain is not taken: last_avail stays on it.
 *
 * Return: PV_MORE; PV_DONE if the ring is empty; PV_BAD with @vr->fault set
 */
enum pv_step pv_vring_pop(struct pv_vring *vr, struct iovec *iov, uint32_t max,
			  struct pv_chain *chain)
{
	uint16_t head;

	if (vr->fault)
		return PV_BAD;
	if (vr->packed) {
		if (!pv_packed_available(vr))
			return PV_DONE;
		head = pv_packed_outside(vr, vr->last_avail) & PV_PACKED_INDEX;
		if (look_single(vr, true, head, iov, chain) && pv_packed_take(vr, 1))
			return PV_MORE;
	} else {
		if (vr->avail_idx == vr->last_avail) {
			if (!avail_refresh(vr)) {
				vr->fault = PV_FAULT_AVAIL_IDX;
				return PV_BAD;
			}
			if (vr->avail_idx == vr->last_avail)
				return PV_DONE;
		}
		head = split_head(vr, vr->last_avail);
		if (look_single(vr, false, head, iov, chain)) {
			vr->last_avail++;
			return PV_MORE;
		}
	}
	return pop_chain(vr, head, iov, max, chain);
}

/* pv_vring_pop_burst() of a packed ring. */
static uint32_t packed_pop_burst(struct pv_vring *vr, struct iovec *iov, struct pv_chain *chain,
				 uint32_t max)
{
	/* See pv_packed_take(). */
	uint32_t taken = pv_packed_distance(vr, vr->used_idx, vr->last_avail), n;
	uint16_t at = vr->last_avail;

	for (n = 0; n < max && taken + n < vr->size && pv_packed_available_at(vr, at); n++) {
		uint32_t index = at >= vr->size ? at - vr->size : at;

		if (!look_single(vr, true, index, &iov[n], &chain[n]))
			break;
		at = pv_packed_advance(vr, at, 1);
	}
	vr->last_avail = at;
	return n;
}

/* pv_vring_pop_burst() of a split ring. */
static uint32_t split_pop_burst(struct pv_vring *vr, struct iovec *iov, struct pv_chain *chain,
				uint32_t max)
{
	uint16_t at = vr->last_avail;
	uint32_t n;

	for (n = 0; n < max; n++) {
		if (vr->avail_idx == at) {
			vr->last_avail = at;
			if (!avail_refresh(vr) || vr->avail_idx == at)
				break;
		}
		if (!look_single(vr, false, split_head(vr, at), &iov[n], &chain[n]))
			break;
		at++;
	}
	vr->last_avail = at;
	return n;
}

/**
 * pv_vring_pop_burst() - Take available chains of a single descriptor each
 * @vr:		The ring
 * @iov:	Gets the segments, one of each chain
 * @chain:	Gets the chains
 * @max:	Entries of @iov and of @chain
 *
 * The same as so many calls of pv_vring_pop(), with fewer instructions. It ends before a chain that
 * has more descriptors or is bad; pv_vring_pop() takes that one, or tells what is wrong with it.
 *
 * Return: how many chains were taken
 */
uint32_t pv_vring_pop_burst(struct pv_vring *vr, struct iovec *iov, struct pv_chain *chain,
			    uint32_t max)
{
	if (vr->fault)
		return 0;
	return vr->packed ? packed_pop_burst(vr, iov, chain, max)
			  : split_pop_burst(vr, iov, chain, max);
}

/**
 * pv_vring_unpop() - Give back the chains taken last
 * @vr:		The ring
 * @slots:	Their slots, added up; none of them has been pushed
 */
void pv_vring_unpop(struct pv_vring *vr, uint32_t slots)
{
	if (vr->packed)
		pv_packed_unpop(vr, slots);
	else
		vr->last_avail = (uint16_t)(vr->last_avail - slots);
}

/* Write an element of the used ring. */
static inline void split_push(struct pv_vring *vr, uint32_t at, uint16_t head, uint32_t len)
{
	uint32_t *elem = (uint32_t *)(void *)(vr->used + RING) + 2 * (at & vr->mask);

	__atomic_store_n(&elem[0], head, __ATOMIC_RELAXED);
	__atomic_store_n(&elem[1], len, __ATOMIC_RELAXED);
}

/**
 * pv_vring_push() - Put a chain on the used ring without publishing it
 * @vr:		The ring
 * @head:	From the chain
 * @slots:	From the chain
 * @len:	Bytes that the device wrote
 *
 * Chains may be pushed in another order than they were popped, unless IN_ORDER is negotiated; all
 * that were popped before the last one published are published with it. The guest sees them after
 * pv_vring_flush(), all at once.
 */
void pv_vring_push(struct pv_vring *vr, uint16_t head, uint16_t slots, uint32_t len)
{
	vr->pushed++;
	vr->undecided += slots;
	if (vr->packed)
		pv_packed_push(vr, head, slots, len);
	else
		split_push(vr, vr->used_next++, head, len);
}

/**
 * pv_vring_push_burst() - Put several chains on the used ring, as pv_vring_push() puts one
 * @vr:		The ring
 * @done:	The chains
 * @n:		How many
 */
void pv_vring_push_burst(struct pv_vring *vr, const struct pv_done *done, uint32_t n)
{
	uint32_t slots = 0;

	for (uint32_t i = 0; i < n; i++)
		slots += done[i].slots;
	vr->pushed += n;
	vr->undecided += slots;
	if (vr->packed) {
		pv_packed_push_burst(vr, done, n);
		return;
	}
	for (uint32_t i = 0; i < n; i++)
		split_push(vr, vr->used_next + i, done[i].head, done[i].len);
	vr->used_next = (uint16_t)(vr->used_next + n);
}

/**
 * pv_vring_fetch() - Fetch what the next calls of pv_vring_push() write
 * @vr:		The ring
 * @n:		How many calls; of chains with one slot each
 */
void pv_vring_fetch(const struct pv_vring *vr, uint32_t n)
{
	/* Entries per line. */
	uint32_t step = vr->packed ? 4 : 8, end = vr->used_next + n + step - 1;

	for (uint32_t at = vr->used_next; at < end; at += step) {
		if (vr->packed)
			pv_fetch_to_write(vr->desc + 16 * (at % vr->size));
		else
			pv_fetch_to_write(vr->used + RING + 4 * (at & vr->mask));
	}
}

/**
 * pv_vring_publish() - Let the guest see the pushed chains, without deciding on an interrupt yet
 * @vr:		The ring
 *
 * For a caller that may be killed at any time, so that no chain is lost or returned twice, and for
 * one that has the guest wait for its interrupt. pv_vring_flush() must still follow, before
 * "undecided" is more than the ring has: the driver's wish is a place in the ring.
 */
void pv_vring_publish(struct pv_vring *vr)
{
	if (vr->packed) {
		pv_packed_publish(vr);
		return;
	}
	/* Release: see pv_vring_flush(). */
	__atomic_store_n(&vr->used[IDX], vr->used_next, __ATOMIC_RELEASE);
}

/* pv_vring_flush() of a split ring. */
static bool split_flush(struct pv_vring *vr)
{
	uint16_t old = vr->signalled_used;
	bool valid = vr->signalled_valid;

	vr->used_idx = vr->used_next;
	/*
	 * Release: buffers and used elements are visible before the index that hands them over
	 * (2.7.8.2).
	 */
	__atomic_store_n(&vr->used[IDX], vr->used_idx, __ATOMIC_RELEASE);
	/*
	 * Full barrier between publishing and reading whether the guest wants an interrupt. The
	 * driver does the reverse: it asks for interrupts, then looks at the index. One of us must
	 * see the other's write, or the last entry waits for ever.
	 */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!vr->event_idx)
		return !(__atomic_load_n(&vr->avail[FLAGS], __ATOMIC_RELAXED) &
			 VRING_AVAIL_F_NO_INTERRUPT);
	vr->signalled_used = vr->used_idx;
	vr->signalled_valid = true;
	return !valid ||
	       pv_need_event(__atomic_load_n(vr->used_event, __ATOMIC_RELAXED), vr->used_idx, old);
}

/**
 * pv_vring_flush() - Publish the pushed chains
 * @vr:		The ring
 *
 * Return: whether the guest wants an interrupt for them
 */
bool pv_vring_flush(struct pv_vring *vr)
{
	uint32_t slots = vr->undecided < vr->size ? vr->undecided : vr->size;
	bool call;

	if (!vr->pushed)
		return false;
	vr->pushed = vr->undecided = 0;
	call = vr->packed ? pv_packed_flush(vr) : split_flush(vr);
	if (vr->log.dirty && vr->packed)
		pv_packed_mark_used(vr, slots);
	else if (vr->log.dirty)
		mark_used(vr, slots);
	return call;
}

/**
 * pv_vring_enable_notify() - Ask the guest for kicks
 * @vr:		The ring
 *
 * Return: true if entries are available already, so that the caller must not sleep. A bad index
 * counts as available entries; pv_vring_pop() will report it.
 */
bool pv_vring_enable_notify(struct pv_vring *vr)
{
	vr->notify_on = true;
	if (vr->packed)
		pv_packed_notify(vr, true);
	else if (vr->event_idx)
		__atomic_store_n(vr->avail_event, vr->last_avail, __ATOMIC_RELAXED);
	else
		__atomic_store_n(&vr->used[FLAGS], 0, __ATOMIC_RELAXED);
	if (vr->log.dirty)
		mark_notify(vr);
	/*
	 * Full barrier between asking and looking. The driver stores the index, then reads whether
	 * to kick: if it did not see our request, we see its index now.
	 */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return pv_vring_pending(vr);
}

/**
 * pv_vring_disable_notify() - Tell the guest that no kicks are needed
 * @vr:		The ring
 *
 * This is a hint only (2.7.10). With EVENT_IDX nothing is written to a split ring: once the
 * guest's index has passed avail_event, there are no more kicks.
 */
void pv_vring_disable_notify(struct pv_vring *vr)
{
	if (!vr->notify_on || vr->notify_stays)
		return;
	vr->notify_on = false;
	if (vr->packed)
		pv_packed_notify(vr, false);
	else if (!vr->event_idx)
		__atomic_store_n(&vr->used[FLAGS], VRING_USED_F_NO_NOTIFY, __ATOMIC_RELAXED);
	else
		return;
	if (vr->log.dirty)
		mark_notify(vr);
}

/**
 * pv_vring_pending() - Whether chains are available
 * @vr:		The ring
 *
 * Return: true if the available index differs from the index of the next entry to take; packed: if
 * the next descriptor is available
 */
bool pv_vring_pending(const struct pv_vring *vr)
{
	if (vr->packed)
		return pv_packed_available(vr);
	return __atomic_load_n(&vr->avail[IDX], __ATOMIC_ACQUIRE) != vr->last_avail;
}
