/* SPDX-License-Identifier: MIT */
/*
 * Says hello on the console and on standard output. The exit status is status=N on the command
 * line.
 */
#include "guest.h"

int main(void)
{
	serial("hello, console\n");
	say("hello, stdout\n");
	return (int)option_number("status", 0);
}
