/* SPDX-License-Identifier: MIT */
/*
 * Says hello on the console and on standard output. The exit status is status=N on the command
 * line. With times=N, it does so N times.
 */
#include "guest.h"

int main(void)
{
	unsigned long times = option_number("times", 1);

	while (times--) {
		serial("hello, console\n");
		say("hello, stdout\n");
	}
	return (int)option_number("status", 0);
}
