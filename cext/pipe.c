/* SPDX-License-Identifier: MIT */
#include "pipe.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* How long the reader gathers after the first byte; unnoticeable to a person who types. */
#define GATHER_US 500

struct pv_pipe {
	pthread_mutex_t lock;
	pthread_cond_t data, room;
	uint32_t size; /* power of two */
	uint32_t head, tail;
	uint64_t dropped, total;
	bool closed, hurry, reader_waits;
	uint32_t writers; /* waiting for room */
	uint32_t wanted;  /* what on_room is to wait for; 0: nothing */
	void (*on_room)(void *);
	void *on_room_arg;
	uint8_t buf[];
};

struct pv_pipe *pv_pipe_new(uint32_t size)
{
	struct pv_pipe *p = size && !(size & (size - 1)) ? calloc(1, sizeof(*p) + size) : NULL;
	pthread_condattr_t attr;

	if (!p)
		return NULL;
	p->size = size;
	pthread_mutex_init(&p->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&p->data, &attr);
	pthread_cond_init(&p->room, &attr);
	pthread_condattr_destroy(&attr);
	return p;
}

void pv_pipe_free(struct pv_pipe *p)
{
	if (!p)
		return;
	pthread_cond_destroy(&p->data);
	pthread_cond_destroy(&p->room);
	pthread_mutex_destroy(&p->lock);
	free(p);
}

static struct timespec deadline(int ms)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	t.tv_sec += ms / 1000;
	t.tv_nsec += (long)(ms % 1000) * 1000000;
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

static void wake_reader(struct pv_pipe *p)
{
	if (p->reader_waits) {
		p->reader_waits = false;
		pthread_cond_signal(&p->data);
	}
}

uint32_t pv_pipe_write(struct pv_pipe *p, const uint8_t *buf, uint32_t len, int wait_ms)
{
	struct timespec until = deadline(wait_ms < 0 ? 0 : wait_ms);
	uint32_t done = 0;
	int error = 0;

	pthread_mutex_lock(&p->lock);
	p->total += len;
	while (done < len && !p->closed) {
		if (p->head - p->tail < p->size) {
			p->buf[p->head++ & (p->size - 1)] = buf[done++];
			continue;
		}
		if (!wait_ms || p->hurry || error)
			break;
		wake_reader(p); /* it may have slept since before we filled the pipe */
		p->writers++;
		if (wait_ms < 0)
			pthread_cond_wait(&p->room, &p->lock);
		else
			error = pthread_cond_timedwait(&p->room, &p->lock, &until);
		p->writers--;
	}
	p->dropped += len - done;
	if (done)
		wake_reader(p);
	pthread_mutex_unlock(&p->lock);
	return done;
}

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

/* Unlocks, and tells the writers' side if it had run into a full pipe. */
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

int pv_pipe_read(struct pv_pipe *p, uint8_t *buf, uint32_t len, int timeout_ms)
{
	struct timespec until = deadline(timeout_ms < 0 ? 0 : timeout_ms);
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
	if (waited && p->head != p->tail && !p->closed) {
		pthread_mutex_unlock(&p->lock);
		usleep(GATHER_US);
		pthread_mutex_lock(&p->lock);
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

void pv_pipe_close(struct pv_pipe *p)
{
	pthread_mutex_lock(&p->lock);
	p->closed = true;
	pthread_cond_broadcast(&p->data);
	unlock_with_room(p);
}

void pv_pipe_hurry(struct pv_pipe *p, bool hurry)
{
	pthread_mutex_lock(&p->lock);
	p->hurry = hurry;
	unlock_with_room(p);
}

uint64_t pv_pipe_dropped(struct pv_pipe *p)
{
	return __atomic_load_n(&p->dropped, __ATOMIC_RELAXED);
}

uint64_t pv_pipe_total(struct pv_pipe *p)
{
	return __atomic_load_n(&p->total, __ATOMIC_RELAXED);
}

void pv_pipe_on_room(struct pv_pipe *p, void (*fn)(void *), void *arg)
{
	pthread_mutex_lock(&p->lock);
	p->on_room = fn;
	p->on_room_arg = arg;
	pthread_mutex_unlock(&p->lock);
}
