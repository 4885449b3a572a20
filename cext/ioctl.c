/* SPDX-License-Identifier: MIT */
#include "ioctl.h"

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <sys/ioctl.h>

#define INTERRUPTED_MAX 10 /* tries after the first; the pauses add up to 0.1 s */

/**
 * pv_ioctl() - Make an ioctl, again if a signal interrupts it
 * @fd:		Descriptor
 * @request:	Number of the request
 * @arg:	Its argument, a pointer or a number
 *
 * KVM and vhost make threads and wait for locks in their ioctls, which a signal for this process
 * interrupts. On busy hosts, KVM_CREATE_VM fails with EINTR even without a signal of ours. So the
 * call is made again, at most INTERRUPTED_MAX times, after 0.1 ms, 0.2 ms and so on.
 *
 * Return: the result of ioctl(), or -errno
 */
int pv_ioctl(int fd, unsigned long request, void *arg)
{
	struct timespec pause = {.tv_nsec = 100000};
	int ret = ioctl(fd, request, arg);

	for (int i = 0; ret < 0 && errno == EINTR && i < INTERRUPTED_MAX; i++) {
		ppoll(NULL, 0, &pause, NULL); /* which packet workers have anyway */
		pause.tv_nsec *= 2;
		ret = ioctl(fd, request, arg);
	}
	return ret < 0 ? -errno : ret;
}
