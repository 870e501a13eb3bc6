/*
 * What the parts of umbra-linux share.
 *
 * umbra-linux is the first program of the Linux guest that Umbra is tested with (main.c). It speaks to whoever watches the
 * console in whole lines, and is told what to do by words `umbra.NAME=VALUE` on the kernel's command line. README.md
 * lists both.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Says one line on the console, in one write, so that lines of several processes never mix. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Says a line and ends this process with failure. */
void fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* The value of `umbra.NAME=` on the kernel's command line, or NULL. */
const char *option(const char *name);

/* The same as a number between `least` and `most`, or `otherwise` when it is not given. Anything else is said and fails. */
uint64_t option_number(const char *name, uint64_t otherwise, uint64_t least, uint64_t most);

/* Nanoseconds of CLOCK_MONOTONIC. */
uint64_t clock_now(void);

void sleep_ms(uint64_t ms);

/* A number that looks random, and is always the same for the same `seed` (the finaliser of SplitMix64). */
static inline uint64_t mixed(uint64_t seed)
{
	seed += 0x9e3779b97f4a7c15u;
	seed = (seed ^ (seed >> 30)) * 0xbf58476d1ce4e5b9u;
	seed = (seed ^ (seed >> 27)) * 0x94d049bb133111ebu;
	return seed ^ (seed >> 31);
}

/* Jobs, one process each. A job that has an end returns; its value is the process's exit code. */
int job_check(void);  /* check.c */
int job_net(void);    /* services.c */
int job_vsock(void);  /* services.c */
int job_disk(void);   /* disk.c */
int job_verify(void); /* disk.c */

/* Checks a disk or an image of one that job_disk wrote (disk.c). Says what it found. */
int verify_image(const char *path);

/* Gives an interface its address from umbra.ip= and umbra.gateway= (network.c). */
void network_up(void);
