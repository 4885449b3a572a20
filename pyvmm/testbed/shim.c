/*
 * A library that is preloaded into virtiofsd if an ordinary user runs it, as root of a user
 * namespace.
 *
 * virtiofsd begins by dropping its groups, which such a namespace forbids: setgroups() does nothing
 * here. L1's overlay opens all files with O_NOATIME, which the kernel allows only to a file's owner:
 * openat() (the program in Rust) and openat64() (the one in C) drop the flag.
 */
#include <dlfcn.h>
#include <fcntl.h>
#include <grp.h>
#include <stdarg.h>

int __openat64_2(int dir, const char *path, int flags);

int setgroups(size_t n, const gid_t *groups)
{
	(void)n;
	(void)groups;
	return 0;
}

int openat64(int dir, const char *path, int flags, ...)
{
	static int (*next)(int, const char *, int, ...);
	va_list args;
	mode_t mode;

	va_start(args, flags);
	mode = va_arg(args, mode_t);
	va_end(args);
	if (!next)
		next = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat64");
	return next(dir, path, flags & ~O_NOATIME, mode);
}

int openat(int dir, const char *path, int flags, ...)
{
	va_list args;
	mode_t mode;

	va_start(args, flags);
	mode = va_arg(args, mode_t);
	va_end(args);
	return openat64(dir, path, flags, mode);
}

/* With _FORTIFY_SOURCE, a call of openat64() without a mode becomes a call of this function. */
int __openat64_2(int dir, const char *path, int flags)
{
	return openat64(dir, path, flags, 0);
}
