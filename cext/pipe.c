/* SPDX-License-Identifier: MIT */
#include "pipe.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* After a sleep the reader waits so long for more bytes. A person who types does not notice. */
#define GATHER_US 500

struct pv_pipe {
	pthread_mutex_t lock;
	pthread_cond_t data, room;
	uint32_t size;	     /* a power of two */
	uint32_t head, tail; /* they run freely modulo 2^32 */
	uint64_t dropped, total;
	bool closed, hurry, reader_waits;
	uint32_t writers; /* the number of writers that wait for room */
	uint32_t wanted;  /* call on_room when there is so much room; 0: do not call it */
	void (*on_room)(void *);
	void *on_room_arg;
	uint8_t buf[];
};

/**
 * pv_pipe_new() - Make a pipe
 * @size:	Bytes that it holds, a power of two
 *
 * Return: the pipe, to be freed by pv_pipe_free(); NULL if @size is no power of two or memory is
 * short
 */
struct pv_pipe *pv_pipe_new(uint32_t size)
{
	struct pv_pipe *p = size && !(size & (size - 1)) ? malloc(sizeof(*p) + size) : NULL;
	pthread_condattr_t attr;

	if (!p)
		return NULL;
	memset(p, 0, sizeof(*p)); /* and not the bytes, most of which are never used */
	p->size = size;
	pthread_mutex_init(&p->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&p->data, &attr);
	pthread_cond_init(&p->room, &attr);
	pthread_condattr_destroy(&attr);
	return p;
}

/**
 * pv_pipe_free() - Free a pipe
 * @p:		From pv_pipe_new(), or NULL; nobody uses it any more
 */
void pv_pipe_free(struct pv_pipe *p)
{
	if (!p)
		return;
	pthread_cond_destroy(&p->data);
	pthread_cond_destroy(&p->room);
	pthread_mutex_destroy(&p->lock);
	free(p);
}

static struct timespec deadline(int64_t us)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	t.tv_sec += us / 1000000;
	t.tv_nsec += (long)(us % 1000000) * 1000;
	if (t.tv_nsec >= 1000000000) {
		t.tv_sec++;
		t.tv_nsec -= 1000000000;
	}
	return t;
}

static bool has_room(const struct pv_pipe *p, uint32_t len)
{
	return p->hurry || p->closed || p->size - (p->head - p->tail) >= len;
}

/* Counters are written with the lock, and read without it; readers must only not see halves. */
static void add(uint64_t *counter, uint64_t n)
{
	__atomic_store_n(counter, *counter + n, __ATOMIC_RELAXED);
}

static void wake_reader(struct pv_pipe *p)
{
	if (p->reader_waits) {
		p->reader_waits = false;
		pthread_cond_signal(&p->data);
	}
}

/**
 * pv_pipe_write() - Put bytes into a pipe
 * @p:		The pipe
 * @buf:	The bytes
 * @len:	Their number
 * @wait_ms:	Wait so long for room, in all; -1: without limit
 *
 * Bytes that find no room are dropped and counted. Closing or hurrying the pipe ends the wait.
 *
 * Return: how many bytes the pipe has taken
 */
uint32_t pv_pipe_write(struct pv_pipe *p, const uint8_t *buf, uint32_t len, int wait_ms)
{
	struct timespec until = deadline(wait_ms < 0 ? 0 : 1000 * (int64_t)wait_ms);
	uint32_t done = 0;
	int error = 0;

	pthread_mutex_lock(&p->lock);
	add(&p->total, len);
	while (done < len && !p->closed) {
		if (p->head - p->tail < p->size) {
			p->buf[p->head++ & (p->size - 1)] = buf[done++];
			continue;
		}
		if (!wait_ms || p->hurry || error)
			break;
		wake_reader(p); /* it may still sleep, since before we filled the pipe */
		p->writers++;
		if (wait_ms < 0)
			pthread_cond_wait(&p->room, &p->lock);
		else
			error = pthread_cond_timedwait(&p->room, &p->lock, &until);
		p->writers--;
	}
	add(&p->dropped, len - done);
	if (done)
		wake_reader(p);
	pthread_mutex_unlock(&p->lock);
	return done;
}

/**
 * pv_pipe_writable() - Whether a write of @len bytes would not wait
 * @p:		The pipe
 * @len:	Number of bytes
 *
 * Return: true if there is room, or if no write waits any more; else the function of
 * pv_pipe_on_room() will be called once there is room
 */
bool pv_pipe_writable(struct pv_pipe *p, uint32_t len)
{
	bool ok;

	pthread_mutex_lock(&p->lock);
	ok = has_room(p, len);
	if (!ok)
		p->wanted = len;
	pthread_mutex_unlock(&p->lock);
	return ok;
}

/* Release the lock and wake all who wait for room, if there is any now. */
static void unlock_with_room(struct pv_pipe *p)
{
	bool tell = p->wanted && has_room(p, p->wanted);
	void (*fn)(void *) = p->on_room;
	void *arg = p->on_room_arg;

	if (tell)
		p->wanted = 0;
	if (p->writers && has_room(p, 1))
		pthread_cond_broadcast(&p->room);
	pthread_mutex_unlock(&p->lock);
	if (tell && fn)
		fn(arg);
}

/**
 * pv_pipe_read() - Take bytes out of a pipe
 * @p:		The pipe
 * @buf:	Gets the bytes
 * @len:	Room in @buf
 * @timeout_ms:	Wait so long for the first byte; -1: without limit
 *
 * Only one thread reads.
 *
 * Return: the number of bytes; 0 on time-out; -1 once the pipe is closed and empty
 */
int pv_pipe_read(struct pv_pipe *p, uint8_t *buf, uint32_t len, int timeout_ms)
{
	struct timespec until = deadline(timeout_ms < 0 ? 0 : 1000 * (int64_t)timeout_ms);
	uint32_t n = 0;
	bool waited = false;

	pthread_mutex_lock(&p->lock);
	while (p->head == p->tail && !p->closed) {
		p->reader_waits = true;
		waited = true;
		if (timeout_ms < 0)
			pthread_cond_wait(&p->data, &p->lock);
		else if (pthread_cond_timedwait(&p->data, &p->lock, &until) == ETIMEDOUT)
			break;
	}
	p->reader_waits = false;
	if (waited && p->head != p->tail) {
		until = deadline(GATHER_US);
		/* No writer signals meanwhile: only the end of the output ends this wait. */
		while (!p->closed && !pthread_cond_timedwait(&p->data, &p->lock, &until))
			;
	}
	while (n < len && p->tail != p->head)
		buf[n++] = p->buf[p->tail++ & (p->size - 1)];
	if (!n && p->closed) {
		pthread_mutex_unlock(&p->lock);
		return -1;
	}
	unlock_with_room(p);
	return (int)n;
}

/**
 * pv_pipe_close() - Take no more bytes
 * @p:		The pipe; the reader can still take the rest
 *
 * This ends all waits.
 */
void pv_pipe_close(struct pv_pipe *p)
{
	pthread_mutex_lock(&p->lock);
	p->closed = true;
	pthread_cond_broadcast(&p->data);
	unlock_with_room(p);
}

/**
 * pv_pipe_hurry() - Let no writer wait for room, not even those that wait already
 * @p:		The pipe
 * @hurry:	false lets writers wait again
 */
void pv_pipe_hurry(struct pv_pipe *p, bool hurry)
{
	pthread_mutex_lock(&p->lock);
	p->hurry = hurry;
	unlock_with_room(p);
}

/**
 * pv_pipe_dropped() - How many bytes were dropped
 * @p:		The pipe
 *
 * Return: the count since pv_pipe_new()
 */
uint64_t pv_pipe_dropped(struct pv_pipe *p)
{
	return __atomic_load_n(&p->dropped, __ATOMIC_RELAXED);
}

/**
 * pv_pipe_total() - How many bytes were written, dropped ones included
 * @p:		The pipe
 *
 * Return: the count since pv_pipe_new()
 */
uint64_t pv_pipe_total(struct pv_pipe *p)
{
	return __atomic_load_n(&p->total, __ATOMIC_RELAXED);
}

/**
 * pv_pipe_on_room() - Set the function that hears of room in a full pipe
 * @p:		The pipe
 * @fn:		Called without the pipe's lock, by the reader or by whoever closes or hurries the
 *		pipe, once there is the room that pv_pipe_writable() missed; NULL for none
 * @arg:	Its argument; valid until the reader has ended
 */
void pv_pipe_on_room(struct pv_pipe *p, void (*fn)(void *), void *arg)
{
	pthread_mutex_lock(&p->lock);
	p->on_room = fn;
	p->on_room_arg = arg;
	pthread_mutex_unlock(&p->lock);
}
