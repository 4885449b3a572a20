/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <linux/virtio_net.h>
#include <stdlib.h>
#include <string.h>

#include "impair.h"

#define WAYS	 2
#define TRANSMIT 1
#define NONE	 UINT32_MAX
/* How long a frame that is to be reordered waits for another. */
#define REORDER_NS 10000000u
/* The worker looks at one frame at most until it has let go of the rules. */
#define SET_MS	   1000
#define ETH_HEADER 14
#define LEGACY_HDR 10 /* struct virtio_net_hdr */

/*
 * The chances of a rule, each with a count of its own. Those before DRAWN have a random number of
 * their own, too.
 */
enum { CHANCE, LOSS, DUPLICATE, REORDER, CORRUPT, EXTRA_IRQ, DRAWN, CUT = DRAWN, USED, CHANCES };

/* Of a rule and a way. */
struct state {
	uint64_t random;
	uint64_t seen;
	uint64_t times[CHANCES]; /* that a chance was looked at */
	uint64_t full_at;	 /* when the bucket is full again */
	uint64_t full_before;	 /* likewise, before the frame at hand */
	bool paid;		 /* the frame at hand has taken tokens */
};

struct rule {
	struct pv_impair_rule r;
	struct sock_filter *filter;
	struct state state[WAYS];
};

struct rules {
	struct rules *older; /* in the list of those that a stopped worker may use */
	uint64_t begun;
	uint32_t count;
	uint32_t ways; /* for whose frames there is a rule, as bits */
	uint32_t used; /* for whose used entries there is one */
	struct rule rule[];
};

/* A frame that waits; it has the number of its first block. */
struct waiting {
	uint64_t due;
	uint64_t order; /* of frames with the same time */
	uint32_t len;
	uint32_t hdr_len;
};

/* One way. */
struct line {
	uint32_t heap[PV_IMPAIR_BLOCKS]; /* frames, the one that goes next at 0 */
	uint32_t count;			 /* atomic: of the heap and of back */
	uint32_t back;			 /* the frame that waits for another to pass; NONE */
	uint32_t free;			 /* first block that is free; NONE */
	uint32_t free_count;
	uint64_t order;
	bool passing; /* see pv_impair_set_passing() */
	struct pv_impair_counters counters;
	struct iovec iov[PV_IMPAIR_IOV];
	struct waiting frame[PV_IMPAIR_BLOCKS];
	uint32_t next[PV_IMPAIR_BLOCKS]; /* block of the same frame, or free block */
	uint8_t data[PV_IMPAIR_BLOCKS][PV_IMPAIR_BLOCK];
};

struct pv_impair {
	uint32_t pair;
	struct rules *rules; /* atomic */
	struct rules *next;  /* prepared */
	struct rules *kept;  /* a worker that was stopped may use them */
	uint32_t ways;	     /* atomic: for whose frames there is a rule, as bits */
	uint32_t used;	     /* atomic: for whose used entries there is one */
	bool busy;	     /* atomic: the worker looks at the rules */
	struct line line[WAYS];
};

static void add(uint64_t *counter, uint64_t n)
{
	__atomic_store_n(counter, *counter + n, __ATOMIC_RELAXED);
}

/* The generator splitmix64: a counter whose values are mixed well. */
static uint64_t draw(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15u;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
	z = (z ^ z >> 27) * 0x94d049bb133111ebu;
	return z ^ z >> 31;
}

static void line_init(struct line *l)
{
	l->back = NONE;
	l->passing = false;
	l->count = 0;
	l->free = 0;
	l->free_count = PV_IMPAIR_BLOCKS;
	for (uint32_t i = 0; i < PV_IMPAIR_BLOCKS; i++)
		l->next[i] = i + 1 < PV_IMPAIR_BLOCKS ? i + 1 : NONE;
}

/**
 * pv_impair_new() - Make the object of a queue pair, without rules
 * @pair:	Number of the queue pair; it makes the random numbers of each pair different
 *
 * Return: the object, to be freed; NULL if memory is short
 */
struct pv_impair *pv_impair_new(uint32_t pair)
{
	struct pv_impair *im = calloc(1, sizeof(*im));

	if (!im)
		return NULL;
	im->pair = pair;
	for (int way = 0; way < WAYS; way++)
		line_init(&im->line[way]);
	return im;
}

static void rules_free(struct rules *rules)
{
	if (!rules)
		return;
	for (uint32_t i = 0; i < rules->count; i++)
		free(rules->rule[i].filter);
	free(rules);
}

static void kept_free(struct pv_impair *im)
{
	while (im->kept) {
		struct rules *older = im->kept->older;

		rules_free(im->kept);
		im->kept = older;
	}
}

/**
 * pv_impair_free() - Free the object
 * @im:		No worker uses it any more; may be NULL
 */
void pv_impair_free(struct pv_impair *im)
{
	if (!im)
		return;
	rules_free(im->rules);
	rules_free(im->next);
	kept_free(im);
	free(im);
}

/* Copy rules, with the random numbers that a seed gives. NULL: no memory, or a bad filter. */
static struct rules *rules_new(const struct pv_impair_rule *rule, uint32_t count, uint32_t pair,
			       uint64_t seed)
{
	struct rules *rules = calloc(1, sizeof(*rules) + count * sizeof(rules->rule[0]));

	if (!rules)
		return NULL;
	for (; rules->count < count; rules->count++) {
		struct rule *to = &rules->rule[rules->count];
		uint32_t n = rule[rules->count].filter ? rule[rules->count].filter_count : 0;

		to->r = rule[rules->count];
		to->r.filter = NULL;
		if (n) {
			if (pv_filter_check(rule[rules->count].filter, n))
				to->filter = calloc(n, sizeof(*to->filter));
			if (!to->filter) {
				rules_free(rules);
				return NULL;
			}
			memcpy(to->filter, rule[rules->count].filter, n * sizeof(*to->filter));
		}
		if (to->r.frames)
			rules->ways |= to->r.ways;
		if (to->r.reorder_used.odds | to->r.reorder_used.every)
			rules->used |= to->r.ways;
		for (uint32_t way = 0; way < WAYS; way++) {
			uint64_t mix = pair * 64ull + rules->count * 2ull + way;

			to->state[way].random = seed ^ draw(&mix);
		}
	}
	return rules;
}

/**
 * pv_impair_prepare() - Make rules, for pv_impair_commit()
 * @im:		The object; a worker may use it; from one thread at a time
 * @rule:	The rules, copied
 * @count:	How many, up to PV_IMPAIR_RULES; 0: frames that wait still go in their time
 * @seed:	Of the random numbers
 * @now:	CLOCK_MONOTONIC in nanoseconds: what from_ns and until_ns count from
 *
 * Rules that were prepared before, and not committed, are forgotten.
 *
 * Return: 0; -ENOMEM; -EINVAL for a filter that pv_filter_check() does not accept or too many
 * rules: the rules in force stay in any case
 */
int pv_impair_prepare(struct pv_impair *im, const struct pv_impair_rule *rule, uint32_t count,
		      uint64_t seed, uint64_t now)
{
	rules_free(im->next);
	im->next = NULL;
	if (count > PV_IMPAIR_RULES)
		return -EINVAL;
	for (uint32_t i = 0; i < count; i++)
		if (rule[i].filter && !pv_filter_check(rule[i].filter, rule[i].filter_count))
			return -EINVAL;
	if (!count)
		return 0;
	im->next = rules_new(rule, count, im->pair, seed);
	if (!im->next)
		return -ENOMEM;
	im->next->begun = now;
	return 0;
}

/**
 * pv_impair_commit() - Have the rules of pv_impair_prepare() from now on
 * @im:		The object; a worker may use it; from one thread at a time
 *
 * Return: 0; -EBUSY: the new ones are in force, but the worker, which was stopped by the system in
 * the middle of a frame, may use the old ones, so these stay in memory until a worker lets go of
 * the rules, or pv_impair_free()
 */
int pv_impair_commit(struct pv_impair *im)
{
	const struct timespec moment = {.tv_nsec = 10000};
	uint64_t until = pv_now_ns() + SET_MS * 1000000ull;
	struct rules *rules = im->next, *old;

	im->next = NULL;
	old = __atomic_exchange_n(&im->rules, rules, __ATOMIC_SEQ_CST);
	__atomic_store_n(&im->ways, rules ? rules->ways : 0, __ATOMIC_RELAXED);
	__atomic_store_n(&im->used, rules ? rules->used : 0, __ATOMIC_RELAXED);
	if (old) {
		old->older = im->kept;
		im->kept = old;
	}
	/* What begins after this finds the rules as they are now. */
	while (im->kept && __atomic_load_n(&im->busy, __ATOMIC_SEQ_CST)) {
		if (pv_now_ns() > until)
			return -EBUSY;
		nanosleep(&moment, NULL);
	}
	kept_free(im);
	return 0;
}

/**
 * pv_impair_set() - Prepare rules and commit them
 * @im, @rule, @count, @seed, @now: see pv_impair_prepare()
 *
 * Return: as of the two
 */
int pv_impair_set(struct pv_impair *im, const struct pv_impair_rule *rule, uint32_t count,
		  uint64_t seed, uint64_t now)
{
	int error = pv_impair_prepare(im, rule, count, seed, now);

	return error ? error : pv_impair_commit(im);
}

/* By the worker: use the rules until rules_put(). NULL: there are none. */
static struct rules *rules_get(struct pv_impair *im)
{
	/* Either this is seen by pv_impair_set(), or its rules are found. */
	__atomic_store_n(&im->busy, true, __ATOMIC_SEQ_CST);
	return __atomic_load_n(&im->rules, __ATOMIC_SEQ_CST);
}

static void rules_put(struct pv_impair *im)
{
	__atomic_store_n(&im->busy, false, __ATOMIC_RELEASE);
}

/**
 * pv_impair_clear() - Throw away all frames that wait
 * @im:		The object; no worker uses it at present
 */
void pv_impair_clear(struct pv_impair *im)
{
	struct rules *rules = __atomic_load_n(&im->rules, __ATOMIC_RELAXED);

	for (int way = 0; way < WAYS; way++) {
		add(&im->line[way].counters.cleared, im->line[way].count);
		line_init(&im->line[way]);
		for (uint32_t i = 0; rules && i < rules->count; i++)
			rules->rule[i].state[way].full_at = 0; /* nobody waits for tokens */
	}
}

/**
 * pv_impair_counters() - Read the counters of a way
 * @im:		The object; any thread
 * @way:	0 receive, 1 transmit
 * @out:	Filled in; each value is whole, the set is not a snapshot
 */
void pv_impair_counters(const struct pv_impair *im, uint32_t way, struct pv_impair_counters *out)
{
	const uint64_t *from = (const uint64_t *)&im->line[way].counters;
	uint64_t *to = (uint64_t *)out;

	for (size_t i = 0; i < sizeof(*out) / sizeof(*to); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}

/**
 * pv_impair_waiting() - How many frames wait
 * @im:		The object; any thread
 * @way:	0 receive, 1 transmit
 *
 * Return: the number
 */
uint32_t pv_impair_waiting(const struct pv_impair *im, uint32_t way)
{
	return __atomic_load_n(&im->line[way].count, __ATOMIC_RELAXED);
}

/**
 * pv_impair_idle() - Whether frames of a way pass untouched
 * @im:		The object; by the worker
 * @way:	0 receive, 1 transmit
 *
 * Return: true if there is no rule for frames of this way, and no frame waits
 */
bool pv_impair_idle(const struct pv_impair *im, int way)
{
	uint32_t ways = __atomic_load_n(&im->ways, __ATOMIC_RELAXED);

	return !im->line[way].count && !(ways >> way & 1);
}

/**
 * pv_impair_used_idle() - Whether a way's used entries keep their order
 * @im:		The object; by the worker
 * @way:	0 receive, 1 transmit
 *
 * Return: true if there is no rule for used entries of this way
 */
bool pv_impair_used_idle(const struct pv_impair *im, int way)
{
	return !(__atomic_load_n(&im->used, __ATOMIC_RELAXED) >> way & 1);
}

/**
 * pv_impair_set_passing() - Say whether a frame that is to pass could not go yet
 * @im:		The object; by the worker
 * @way:	0 receive, 1 transmit
 * @passing:	The caller shows the frame of the latest pv_impair_take() again, and is not to ask
 *		about it: it has been decided about; false: it has gone
 *
 * That outlives the worker, as its position in the ring does.
 */
void pv_impair_set_passing(struct pv_impair *im, int way, bool passing)
{
	im->line[way].passing = passing;
}

/**
 * pv_impair_passing() - Whether the next frame has been decided about: it is to pass
 * @im:		The object; by the worker
 * @way:	0 receive, 1 transmit
 *
 * Return: as last given to pv_impair_set_passing()
 */
bool pv_impair_passing(const struct pv_impair *im, int way)
{
	return im->line[way].passing;
}

/* --- frames that wait ------------------------------------------------------------------------- */

static bool before(const struct line *l, uint32_t a, uint32_t b)
{
	const struct waiting *x = &l->frame[a], *y = &l->frame[b];

	return x->due != y->due ? x->due < y->due : x->order < y->order;
}

static void count_waiting(struct line *l, uint32_t n)
{
	__atomic_store_n(&l->count, n, __ATOMIC_RELAXED);
}

static uint32_t in_heap(const struct line *l)
{
	return l->count - (l->back != NONE);
}

/* Put a frame, which is counted, into the heap of n others. */
static void heap_put(struct line *l, uint32_t n, uint32_t f)
{
	uint32_t at = n;

	l->frame[f].order = l->order++;
	while (at && before(l, f, l->heap[(at - 1) / 2])) {
		l->heap[at] = l->heap[(at - 1) / 2];
		at = (at - 1) / 2;
	}
	l->heap[at] = f;
}

/* Take the frame that goes next out of the heap of n. */
static void heap_take(struct line *l, uint32_t n)
{
	uint32_t last = l->heap[n - 1], at = 0;

	for (;;) {
		uint32_t child = 2 * at + 1;

		if (child >= n - 1)
			break;
		if (child + 1 < n - 1 && before(l, l->heap[child + 1], l->heap[child]))
			child++;
		if (!before(l, l->heap[child], last))
			break;
		l->heap[at] = l->heap[child];
		at = child;
	}
	l->heap[at] = last;
}

/* The frame that waits for another to pass waits no more: it goes at the given time. */
static void back_ends(struct line *l, uint64_t due)
{
	uint32_t f = l->back, n = in_heap(l);

	if (f == NONE)
		return;
	l->frame[f].due = due;
	l->back = NONE;
	heap_put(l, n, f);
}

/* Whether a frame finds enough free blocks. */
static bool has_room(const struct line *l, size_t len)
{
	return len && (len + PV_IMPAIR_BLOCK - 1) / PV_IMPAIR_BLOCK <= l->free_count;
}

/* Copy a frame into free blocks; NONE: there are too few. */
static uint32_t copy(struct line *l, const struct pv_impair_frame *f)
{
	uint32_t first = l->free, blocks = 0, last = NONE;
	size_t at = 0;

	if (!has_room(l, f->len))
		return NONE;
	for (uint32_t b = first; at < f->len; b = l->next[b]) {
		size_t n = f->len - at < PV_IMPAIR_BLOCK ? f->len - at : PV_IMPAIR_BLOCK;

		pv_segments_load(f->iov, at, l->data[b], n);
		at += n;
		blocks++;
		last = b;
	}
	l->free = l->next[last];
	l->next[last] = NONE;
	l->free_count -= blocks;
	l->frame[first] = (struct waiting){.len = (uint32_t)f->len, .hdr_len = f->hdr_len};
	return first;
}

static void give_back(struct line *l, uint32_t first)
{
	uint32_t last = first, blocks = 1;

	for (; l->next[last] != NONE; last = l->next[last])
		blocks++;
	l->next[last] = l->free;
	l->free = first;
	l->free_count += blocks;
}

/* A byte of a frame that waits. */
static uint8_t *byte_at(struct line *l, uint32_t f, uint32_t at)
{
	uint32_t b = f;

	for (; at >= PV_IMPAIR_BLOCK; at -= PV_IMPAIR_BLOCK)
		b = l->next[b];
	return &l->data[b][at];
}

static uint32_t u16_at(struct line *l, uint32_t f, uint32_t at)
{
	return (uint32_t)(*byte_at(l, f, at) | *byte_at(l, f, at + 1) << 8);
}

/* Make the checksum that a frame's header asks for (virtio 1.2, 5.1.6.2). */
static void make_checksum(struct line *l, uint32_t f)
{
	const struct waiting *w = &l->frame[f];
	uint32_t start = w->hdr_len + u16_at(l, f, offsetof(struct virtio_net_hdr, csum_start));
	uint32_t at = start + u16_at(l, f, offsetof(struct virtio_net_hdr, csum_offset));
	uint64_t sum = 0;
	uint32_t b = f;

	if (at + 2 > w->len)
		return;
	for (uint32_t i = 0; i < w->len; i++) {
		if (i && !(i % PV_IMPAIR_BLOCK))
			b = l->next[b];
		if (i >= start)
			sum += (uint64_t)l->data[b][i % PV_IMPAIR_BLOCK]
			       << ((i - start) % 2 ? 0 : 8);
	}
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	sum = ~sum & 0xffff;
	if (!sum)
		sum = 0xffff; /* the same number; 0 would mean "none" for UDP */
	*byte_at(l, f, at) = (uint8_t)(sum >> 8);
	*byte_at(l, f, at + 1) = (uint8_t)sum;
}

/*
 * Have nobody vouch for a frame that waits, for nobody has seen it as it is going to be. False: it
 * is to be segmented.
 */
static bool vouch_no_more(struct line *l, uint32_t f)
{
	uint8_t *flags = byte_at(l, f, offsetof(struct virtio_net_hdr, flags));

	if (l->frame[f].hdr_len < LEGACY_HDR)
		return true;
	if (*byte_at(l, f, offsetof(struct virtio_net_hdr, gso_type)))
		return false;
	if (*flags & VIRTIO_NET_HDR_F_NEEDS_CSUM)
		make_checksum(l, f);
	*flags &= (uint8_t) ~(VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID);
	return true;
}

/* Cut a frame that waits short, to keep bytes or a random number. False: it is left alone. */
static bool cut(struct line *l, uint32_t f, int way, uint64_t keep, uint64_t random)
{
	const uint32_t hint = offsetof(struct virtio_net_hdr, hdr_len);
	struct waiting *w = &l->frame[f];
	uint64_t least = way == TRANSMIT ? ETH_HEADER : 0, len = w->len - w->hdr_len;

	if (keep == UINT64_MAX)
		keep = len > least ? least + random % (len - least) : len;
	else if (keep < least)
		keep = least;
	if (keep >= len || !vouch_no_more(l, f))
		return false;
	/* A tap refuses a frame whose headers would be longer than the frame (EINVAL). */
	if (w->hdr_len >= LEGACY_HDR)
		*byte_at(l, f, hint) = *byte_at(l, f, hint + 1) = 0;
	w->len = w->hdr_len + (uint32_t)keep; /* blocks behind the end stay the frame's */
	return true;
}

/* Turn over a bit of a frame that waits. False: it is left alone. */
static bool corrupt(struct line *l, uint32_t f, uint64_t random)
{
	const struct waiting *w = &l->frame[f];
	uint32_t begin = w->hdr_len + ETH_HEADER;

	if (w->len <= begin || !vouch_no_more(l, f))
		return false;
	begin += (uint32_t)((random >> 3) % (w->len - begin));
	*byte_at(l, f, begin) ^= (uint8_t)(1u << (random & 7));
	return true;
}

/**
 * pv_impair_due() - The frame of a way that is to go next, if its time has come
 * @im:		The object; by the worker
 * @way:	0 receive, 1 transmit
 * @now:	CLOCK_MONOTONIC in nanoseconds
 * @out:	Filled in
 *
 * The frame stays until pv_impair_sent().
 *
 * Return: whether there is one
 */
bool pv_impair_due(struct pv_impair *im, int way, uint64_t now, struct pv_impair_due *out)
{
	struct line *l = &im->line[way];
	const struct waiting *w;
	uint32_t left;

	if (l->back != NONE && l->frame[l->back].due <= now)
		back_ends(l, l->frame[l->back].due);
	if (!in_heap(l) || l->frame[l->heap[0]].due > now)
		return false;
	w = &l->frame[l->heap[0]];
	*out = (struct pv_impair_due){.iov = l->iov, .len = w->len, .hdr_len = w->hdr_len};
	left = w->len;
	for (uint32_t b = l->heap[0]; left; b = l->next[b]) {
		uint32_t n = left < PV_IMPAIR_BLOCK ? left : PV_IMPAIR_BLOCK;

		l->iov[out->niov++] = (struct iovec){.iov_base = l->data[b], .iov_len = n};
		left -= n;
	}
	return true;
}

/**
 * pv_impair_sent() - The frame of pv_impair_due() has gone
 * @im:		The object; by the worker, which has called nothing else of this way since
 * @way:	0 receive, 1 transmit
 */
void pv_impair_sent(struct pv_impair *im, int way)
{
	struct line *l = &im->line[way];
	uint32_t f = l->heap[0];

	heap_take(l, in_heap(l));
	count_waiting(l, l->count - 1);
	give_back(l, f);
}

/**
 * pv_impair_next() - When a frame is to go
 * @im:		The object; by the worker
 * @way:	0 receive, 1 transmit
 *
 * Return: CLOCK_MONOTONIC in nanoseconds; UINT64_MAX if none waits
 */
uint64_t pv_impair_next(const struct pv_impair *im, int way)
{
	const struct line *l = &im->line[way];
	uint64_t next = UINT64_MAX;

	if (in_heap(l))
		next = l->frame[l->heap[0]].due;
	if (l->back != NONE && l->frame[l->back].due < next)
		next = l->frame[l->back].due;
	return next;
}

/* --- decisions -------------------------------------------------------------------------------- */

static bool happens(struct state *s, int which, const struct pv_chance *c, uint64_t random)
{
	if (c->every)
		return !(++s->times[which] % c->every);
	return (uint32_t)(random >> 32) < c->odds;
}

/* Whether a rule's conditions hold, but for its chance; f is NULL for kicks and interrupts. */
static bool applies(const struct rules *rules, struct rule *rule, int way,
		    const struct pv_impair_frame *f, uint64_t now)
{
	const struct pv_impair_rule *r = &rule->r;
	/* The worker may have looked at the clock before the rules were set. */
	uint64_t age = now > rules->begun ? now - rules->begun : 0, seen;

	if (!(r->ways >> way & 1) || !r->frames != !f)
		return false;
	if (age < r->from_ns || (r->until_ns && age >= r->until_ns))
		return false;
	if (rule->filter && !pv_filter_run(rule->filter, f->iov, f->hdr_len, f->len - f->hdr_len))
		return false;
	seen = rule->state[way].seen++;
	return seen >= r->after && (!r->count || seen - r->after < r->count);
}

/* What the rules want of a frame. */
struct wish {
	uint32_t deeds;
	uint32_t copies;
	uint32_t bits; /* to turn over */
	uint64_t random[PV_IMPAIR_RULES];
	uint64_t keep;	     /* of a frame that is cut short: UINT64_MAX: a random number */
	uint64_t cut_random; /* which is this */
	uint64_t due;
};

/*
 * When a frame has its tokens. It keeps them only if it waits or passes: see settle(). So full_at
 * is at most as far away as bucket and blocks have room for bytes: some days at 1 kbit/s.
 */
static uint64_t bucket(const struct pv_impair_rule *r, struct state *s, size_t len, uint64_t now)
{
	uint64_t burst = r->burst * 8000000000u / r->rate, at;

	s->paid = true;
	s->full_before = s->full_at;
	if (s->full_at < now)
		s->full_at = now;
	at = s->full_at - now > burst ? s->full_at - burst : now;
	s->full_at += len * 8000000000u / r->rate;
	return at;
}

/* A frame does not go: its tokens are for others. Or it does: then it has paid. */
static void settle(struct rules *rules, int way, bool goes)
{
	for (uint32_t i = 0; rules && i < rules->count; i++) {
		struct state *s = &rules->rule[i].state[way];

		if (s->paid && !goes)
			s->full_at = s->full_before;
		s->paid = false;
	}
}

static void ask(struct rule *rule, int way, const struct line *l, const struct pv_impair_frame *f,
		uint64_t now, struct wish *w)
{
	const struct pv_impair_rule *r = &rule->r;
	struct state *s = &rule->state[way];
	uint64_t random[DRAWN + 1];
	uint64_t wait, more;

	for (int i = 0; i <= DRAWN; i++)
		random[i] = draw(&s->random);
	more = random[CHANCE]; /* of which others follow, so that a rule draws as many as ever */
	if (!happens(s, CHANCE, &r->chance, random[CHANCE]))
		return;
	if (happens(s, LOSS, &r->loss, random[LOSS])) {
		w->deeds |= PV_DEED_LOSS;
		return;
	}
	if (happens(s, DUPLICATE, &r->duplicate, random[DUPLICATE])) {
		w->deeds |= PV_DEED_DUPLICATE;
		w->copies++;
	}
	if (happens(s, REORDER, &r->reorder, random[REORDER]))
		w->deeds |= PV_DEED_REORDER;
	if (happens(s, CORRUPT, &r->corrupt, random[CORRUPT])) {
		w->deeds |= PV_DEED_CORRUPT;
		w->random[w->bits++] = random[EXTRA_IRQ];
	}
	if (happens(s, CUT, &r->truncate, draw(&more))) {
		w->deeds |= PV_DEED_TRUNCATE;
		w->keep = r->keep;
		w->cut_random = draw(&more);
	}
	if ((r->delay_ns || r->jitter_ns || r->rate) && r->queue && l->count >= r->queue) {
		w->deeds |= PV_DEED_FULL;
		return;
	}
	if (r->rate) {
		wait = bucket(r, s, f->len - f->hdr_len, now) - now;
		w->due += wait;
		if (wait)
			w->deeds |= PV_DEED_RATE;
	}
	wait = r->delay_ns;
	if (r->jitter_ns) {
		uint64_t other = random[DRAWN] % (2 * r->jitter_ns + 1); /* 0 to twice the jitter */

		wait = wait + other > r->jitter_ns ? wait + other - r->jitter_ns : 0;
	}
	w->due += wait;
	if (r->delay_ns || r->jitter_ns)
		w->deeds |= PV_DEED_DELAY;
}

/* Count what was done to a frame. */
static void count_deeds(struct pv_impair_counters *c, uint32_t deeds)
{
	add(&c->frames, 1);
	if (deeds & PV_DEED_LOSS)
		add(&c->loss, 1);
	if (deeds & PV_DEED_DUPLICATE)
		add(&c->duplicate, 1);
	if (deeds & PV_DEED_REORDER)
		add(&c->reorder, 1);
	if (deeds & PV_DEED_CORRUPT)
		add(&c->corrupt, 1);
	if (deeds & PV_DEED_DELAY)
		add(&c->delay, 1);
	if (deeds & PV_DEED_RATE)
		add(&c->rate, 1);
	if (deeds & PV_DEED_FULL)
		add(&c->full, 1);
	if (deeds & PV_DEED_TRUNCATE)
		add(&c->truncate, 1);
}

/* Have a copy of a frame wait. False: there is no room. */
static bool wait_copy(struct line *l, int way, const struct pv_impair_frame *f, struct wish *w,
		      uint64_t now)
{
	uint32_t n = copy(l, f), turned = 0;
	bool swap = w->deeds & PV_DEED_REORDER && l->back == NONE;

	if (n == NONE)
		return false;
	if (w->deeds & PV_DEED_TRUNCATE && !cut(l, n, way, w->keep, w->cut_random)) {
		w->deeds &= ~(uint32_t)PV_DEED_TRUNCATE;
		add(&l->counters.truncate_left, 1);
	}
	for (uint32_t i = 0; i < w->bits; i++)
		turned += corrupt(l, n, w->random[i]);
	if (w->bits && !turned) {
		w->deeds &= ~(uint32_t)PV_DEED_CORRUPT;
		add(&l->counters.corrupt_left, 1);
	}
	w->bits = 0; /* another copy is as the frame was */
	l->frame[n].due = w->due;
	if (swap) {
		if (l->frame[n].due < now + REORDER_NS)
			l->frame[n].due = now + REORDER_NS;
		l->back = n;
		count_waiting(l, l->count + 1);
		return true;
	}
	w->deeds &= ~(uint32_t)PV_DEED_REORDER;
	heap_put(l, in_heap(l), n);
	count_waiting(l, l->count + 1);
	back_ends(l, w->due);
	return true;
}

/**
 * pv_impair_take() - Decide what becomes of a frame
 * @im:		The object; by the worker
 * @way:	0 receive, 1 transmit
 * @f:		The frame
 * @keep:	Have the frame wait even if it is to pass at once
 * @now:	CLOCK_MONOTONIC in nanoseconds
 * @deeds:	Set to what was done to it: PV_DEED_* bits
 *
 * After a frame that passes, there may be others whose time has come.
 *
 * Return: whether the caller is done with the frame: it waits, or it is lost. Else it is to pass
 */
bool pv_impair_take(struct pv_impair *im, int way, const struct pv_impair_frame *f, bool keep,
		    uint64_t now, uint32_t *deeds)
{
	const uint32_t copied =
		PV_DEED_REORDER | PV_DEED_CORRUPT | PV_DEED_TRUNCATE | PV_DEED_DELAY | PV_DEED_RATE;
	const uint32_t gone = PV_DEED_LOSS | PV_DEED_FULL;
	struct line *l = &im->line[way];
	struct wish w = {.due = now};
	bool looked = false, taken = true;
	struct rules *rules;

	*deeds = 0;
	if (f->len > PV_IMPAIR_FRAME_MAX || f->len <= f->hdr_len)
		return false;
	rules = rules_get(im);
	for (uint32_t i = 0; rules && i < rules->count; i++) {
		if (!applies(rules, &rules->rule[i], way, f, now))
			continue;
		looked = true;
		ask(&rules->rule[i], way, l, f, now, &w);
		if (w.deeds & gone)
			break;
	}
	if (!(w.deeds & gone)) {
		taken = keep || w.deeds & copied;
		if (taken && !has_room(l, f->len)) {
			w.deeds = PV_DEED_FULL;
			looked = true;
		}
	}
	settle(rules, way, !(w.deeds & gone));
	rules_put(im);
	if (w.deeds & gone) {
		w.deeds &= gone;
	} else {
		struct wish more = {.due = w.due};

		if (taken)
			(void)wait_copy(l, way, f, &w, now); /* there is room */
		for (; w.copies; w.copies--)
			if (!wait_copy(l, way, f, &more, now))
				w.deeds &= ~(uint32_t)PV_DEED_DUPLICATE;
		if (!taken)
			back_ends(l, now);
	}
	if (looked)
		count_deeds(&l->counters, w.deeds);
	*deeds = w.deeds;
	return taken;
}

/**
 * pv_impair_interrupt() - When to interrupt the guest
 * @im:		The object; by the worker
 * @way:	0 receive, 1 transmit: the ring that has news
 * @now:	CLOCK_MONOTONIC in nanoseconds
 * @wanted:	Whether the driver has asked for the interrupt
 *
 * Return: the time, @now at the earliest; UINT64_MAX: never
 */
uint64_t pv_impair_interrupt(struct pv_impair *im, int way, uint64_t now, bool wanted)
{
	struct pv_impair_counters *c = &im->line[way].counters;
	uint64_t at = wanted ? now : UINT64_MAX;
	struct rules *rules = rules_get(im);

	for (uint32_t i = 0; rules && i < rules->count; i++) {
		struct rule *rule = &rules->rule[i];
		struct state *s = &rule->state[way];
		uint64_t first, second;

		if (wanted ? !rule->r.hold_irq_ns
			   : !(rule->r.extra_irq.odds | rule->r.extra_irq.every))
			continue;
		if (!applies(rules, rule, way, NULL, now))
			continue;
		first = draw(&s->random);
		second = draw(&s->random);
		if (!happens(s, CHANCE, &rule->r.chance, first))
			continue;
		if (wanted) {
			add(&c->hold_irq, 1);
			at += rule->r.hold_irq_ns;
		} else if (happens(s, EXTRA_IRQ, &rule->r.extra_irq, second)) {
			add(&c->extra_irq, 1);
			at = now;
		}
	}
	rules_put(im);
	return at;
}

/**
 * pv_impair_kick() - How long a kick is to be overlooked
 * @im:		The object; by the worker
 * @way:	0 receive, 1 transmit
 * @now:	CLOCK_MONOTONIC in nanoseconds
 *
 * Return: until when; @now if it is to be served at once
 */
uint64_t pv_impair_kick(struct pv_impair *im, int way, uint64_t now)
{
	struct rules *rules = rules_get(im);
	uint64_t at = now;

	for (uint32_t i = 0; rules && i < rules->count; i++) {
		struct rule *rule = &rules->rule[i];

		if (!rule->r.hold_kick_ns || !applies(rules, rule, way, NULL, now))
			continue;
		if (!happens(&rule->state[way], CHANCE, &rule->r.chance,
			     draw(&rule->state[way].random)))
			continue;
		add(&im->line[way].counters.hold_kick, 1);
		at += rule->r.hold_kick_ns;
	}
	rules_put(im);
	return at;
}

/**
 * pv_impair_used() - Whether a packet's used entries are to come behind those of the next packet
 * @im:		The object; by the worker, which is done with the packet
 * @way:	0 receive, 1 transmit
 * @now:	CLOCK_MONOTONIC in nanoseconds
 *
 * The caller tells what came of that by pv_impair_used_done().
 *
 * Return: whether they are
 */
bool pv_impair_used(struct pv_impair *im, int way, uint64_t now)
{
	struct rules *rules;
	bool found = false;

	if (pv_impair_used_idle(im, way))
		return false;
	rules = rules_get(im);
	for (uint32_t i = 0; rules && i < rules->count; i++) {
		struct rule *rule = &rules->rule[i];
		struct state *s = &rule->state[way];
		uint64_t first, second;

		if (!(rule->r.reorder_used.odds | rule->r.reorder_used.every) ||
		    !applies(rules, rule, way, NULL, now))
			continue;
		first = draw(&s->random);
		second = draw(&s->random);
		if (happens(s, CHANCE, &rule->r.chance, first))
			found |= happens(s, USED, &rule->r.reorder_used, second);
	}
	rules_put(im);
	return found;
}

/**
 * pv_impair_used_done() - Count what came of a packet's used entries
 * @im:		The object; by the worker
 * @way:	0 receive, 1 transmit
 * @deed:	PV_DEED_REORDER_USED, PV_DEED_LATE_USED, or 0: they were left alone
 */
void pv_impair_used_done(struct pv_impair *im, int way, uint32_t deed)
{
	struct pv_impair_counters *c = &im->line[way].counters;

	if (deed == PV_DEED_REORDER_USED)
		add(&c->reorder_used, 1);
	else if (deed == PV_DEED_LATE_USED)
		add(&c->late_used, 1);
	else
		add(&c->reorder_used_left, 1);
}
