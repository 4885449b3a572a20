/* SPDX-License-Identifier: MIT */
/* What must hold in a fuzz program, whatever its input is. */
#ifndef PV_CHECK_H
#define PV_CHECK_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(cond)                                                                                \
	do {                                                                                       \
		if (!(cond)) {                                                                     \
			fprintf(stderr, "%s:%d: %s (errno %d)\n", __FILE__, __LINE__, #cond,       \
				errno);                                                            \
			abort();                                                                   \
		}                                                                                  \
	} while (0)

#endif
