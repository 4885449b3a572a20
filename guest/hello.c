/* SPDX-License-Identifier: MIT */
/*
 * Says hello on the console and on standard output; status=N on the command line is its exit
 * status.
 */
#include "guest.h"

int main(void)
{
	serial("hello, console\n");
	say("hello, stdout\n");
	return (int)option_number("status", 0);
}
