/* SPDX-License-Identifier: MIT */
#include <pthread.h>
#include <stdint.h>
#include <time.h>

int race_clocklock(pthread_mutex_t *lock, clockid_t clock, const struct timespec *until);

/*
 * The ThreadSanitizers of GCC 12 and clang 14 do not know pthread_mutex_clocklock(), whose name the
 * compiler is told to change to this one.
 */
int race_clocklock(pthread_mutex_t *lock, clockid_t clock, const struct timespec *until)
{
	struct timespec now, end;
	int64_t left;

	clock_gettime(clock, &now);
	left = (until->tv_sec - now.tv_sec) * 1000000000 + until->tv_nsec - now.tv_nsec;
	clock_gettime(CLOCK_REALTIME, &end);
	left = end.tv_nsec + (left > 0 ? left : 0);
	end.tv_sec += left / 1000000000;
	end.tv_nsec = left % 1000000000;
	return pthread_mutex_timedlock(lock, &end);
}
