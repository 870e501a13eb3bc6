/*
 * The job `check`: a guest that proves itself.
 *
 * One worker per processor, pinned to it, owns a region of memory. At each step it checks every page of it against a
 * table of how often the page was rewritten, rewrites all of them, looks at the clock, and then sleeps with known values in
 * its registers, which must be there when it wakes. So whatever a move loses, repeats or mixes up is noticed within a
 * step: a page, a table, a register, a processor, or time.
 *
 * A line `tick N cpus=C ...` says that since the line before C workers have made at least one whole step, all of them without
 * fault. A fault is a line `CORRUPT ...` and the end of the job.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
	PAGE = 4096,
	PAGE_WORDS = PAGE / 8,
	CPUS_MAX = 64,
	VECTORS = 16,
	/* Rounds of a loop with everything in registers: about a tenth of a millisecond. */
	SPINS = 200000,
};

/* What all workers and the parent see. */
struct shared {
	/* The latest time anybody has read: no processor may read an earlier one afterwards. */
	_Atomic uint64_t latest;
	_Atomic uint64_t steps[CPUS_MAX];
};

struct worker {
	unsigned cpu;
	size_t pages;
	uint64_t *memory;
	/* How often each page was rewritten. */
	uint64_t *rewrites;
	uint64_t steps;
	bool has_avx;
	struct shared *shared;
};

static void *take_memory(size_t bytes, int sharing)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, sharing | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		fail("check: no memory for %zu bytes: %s", bytes, strerror(errno));
	return memory;
}

static uint64_t page_seed(const struct worker *worker, size_t page, uint64_t rewrites)
{
	return mixed((uint64_t)worker->cpu << 56 ^ (uint64_t)page << 32 ^ rewrites);
}

static void write_page(struct worker *worker, size_t page)
{
	uint64_t *words = worker->memory + page * PAGE_WORDS;
	uint64_t seed = page_seed(worker, page, ++worker->rewrites[page]);

	for (size_t i = 0; i < PAGE_WORDS; i++)
		words[i] = seed + i * 0x9e3779b97f4a7c15u;
}

static void check_page(const struct worker *worker, size_t page)
{
	const uint64_t *words = worker->memory + page * PAGE_WORDS;
	uint64_t seed = page_seed(worker, page, worker->rewrites[page]);

	/* The table itself may be what is old: every page is rewritten once a step. */
	if (worker->rewrites[page] != worker->steps + 1)
		fail("CORRUPT what=table cpu=%u page=%zu want=%llu found=%llu", worker->cpu, page,
		     (unsigned long long)worker->steps + 1, (unsigned long long)worker->rewrites[page]);
	for (size_t i = 0; i < PAGE_WORDS; i++) {
		uint64_t want = seed + i * 0x9e3779b97f4a7c15u;

		if (words[i] != want)
			fail("CORRUPT what=page cpu=%u page=%zu word=%zu want=%#llx found=%#llx rewrites=%llu",
			     worker->cpu, page, i, (unsigned long long)want, (unsigned long long)words[i],
			     (unsigned long long)worker->rewrites[page]);
	}
}

static void check_clock(const struct worker *worker)
{
	uint64_t latest = atomic_load(&worker->shared->latest);
	uint64_t now = clock_now();

	if (now < latest)
		fail("CORRUPT what=clock cpu=%u want=%llu found=%llu", worker->cpu, (unsigned long long)latest,
		     (unsigned long long)now);
	while (latest < now && !atomic_compare_exchange_weak(&worker->shared->latest, &latest, now))
		;
}

static void check_place(const struct worker *worker)
{
	uintptr_t thread, at_thread;
	int cpu = sched_getcpu();

	if (cpu != (int)worker->cpu)
		fail("CORRUPT what=cpu want=%u found=%d", worker->cpu, cpu);
	/* x86-64 psABI, Thread-Local Storage: the first word of the thread's block is its own address. */
	__asm__("mov %%fs:0, %0" : "=r"(thread));
	at_thread = *(uintptr_t *)thread;
	if (at_thread != thread)
		fail("CORRUPT what=fsbase cpu=%u want=%#lx found=%#lx", worker->cpu, (unsigned long)thread,
		     (unsigned long)at_thread);
}

/* Everything that hold() keeps in registers, before and after. */
struct registers {
	uint8_t vectors[VECTORS][32];
	uint64_t general[4];
	uint8_t x87[16];
	uint32_t mxcsr;
	uint16_t x87_control;
};

#define EACH_VECTOR(DO)                                                                                                \
	DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14) DO(15)
#define LOAD_XMM(n) "movdqu 32*" #n "(%[in]), %%xmm" #n "\n"
#define STORE_XMM(n) "movdqu %%xmm" #n ", 32*" #n "(%[out])\n"
#define LOAD_YMM(n) "vmovdqu 32*" #n "(%[in]), %%ymm" #n "\n"
#define STORE_YMM(n) "vmovdqu %%ymm" #n ", 32*" #n "(%[out])\n"
#define XMM_CLOBBER(n) "xmm" #n,

/*
 * The values are held through a short loop, where a stop finds them in the processor, and through a system call that
 * sleeps, where the kernel has put them away and other processes run.
 */
#define HOLD(LOAD, STORE)                                                                                              \
	__asm__ volatile("fninit\n"                                                                                    \
			 "fldt %c[x87](%[in])\n"                                                                       \
			 "fldcw %c[x87_control](%[in])\n"                                                              \
			 "ldmxcsr %c[mxcsr](%[in])\n"                                                                  \
			 EACH_VECTOR(LOAD)                                                                             \
			 "mov %c[general]+0(%[in]), %%r12\n"                                                           \
			 "mov %c[general]+8(%[in]), %%r13\n"                                                           \
			 "mov %c[general]+16(%[in]), %%r14\n"                                                          \
			 "mov %c[general]+24(%[in]), %%r15\n"                                                          \
			 "1: dec %[spins]\n"                                                                           \
			 "jnz 1b\n"                                                                                    \
			 "syscall\n"                                                                                   \
			 "mov %%r12, %c[general]+0(%[out])\n"                                                          \
			 "mov %%r13, %c[general]+8(%[out])\n"                                                          \
			 "mov %%r14, %c[general]+16(%[out])\n"                                                         \
			 "mov %%r15, %c[general]+24(%[out])\n"                                                         \
			 EACH_VECTOR(STORE)                                                                            \
			 "stmxcsr %c[mxcsr](%[out])\n"                                                                 \
			 "fnstcw %c[x87_control](%[out])\n"                                                            \
			 "fstpt %c[x87](%[out])\n"                                                                     \
			 "fninit\n"                                                                                    \
			 : "+a"(call), [spins] "+r"(spins)                                                             \
			 : "D"(&length), "S"(0), [in] "r"(before), [out] "r"(after),                                   \
			   [x87] "i"(offsetof(struct registers, x87)),                                                 \
			   [x87_control] "i"(offsetof(struct registers, x87_control)),                                 \
			   [mxcsr] "i"(offsetof(struct registers, mxcsr)),                                             \
			   [general] "i"(offsetof(struct registers, general))                                          \
			 : "rcx", "r11", "r12", "r13", "r14", "r15", EACH_VECTOR(XMM_CLOBBER) "memory", "cc")

static void hold(const struct registers *before, struct registers *after, bool has_avx, uint64_t ms)
{
	struct timespec length = { (time_t)(ms / 1000), (long)(ms % 1000) * 1000000 };
	/* What the compiler's own code runs with. */
	uint32_t usual = 0x1f80;
	uint64_t spins = SPINS;
	long call = 35; /* nanosleep */

	if (has_avx)
		HOLD(LOAD_YMM, STORE_YMM);
	else
		HOLD(LOAD_XMM, STORE_XMM);
	__asm__ volatile("ldmxcsr %0" : : "m"(usual));
}

static void sleep_with_full_registers(const struct worker *worker, uint64_t ms)
{
	struct registers before = { 0 }, after = { 0 };
	size_t width = worker->has_avx ? 32 : 16;

	for (size_t i = 0; i < VECTORS; i++)
		for (size_t at = 0; at < width; at += 8) {
			uint64_t value = mixed(worker->steps << 16 ^ worker->cpu << 8 ^ i << 4 ^ at);
			memcpy(before.vectors[i] + at, &value, sizeof value);
		}
	for (size_t i = 0; i < 4; i++)
		before.general[i] = mixed(worker->steps * 4 + i);
	/* A normal number: the integer bit is set, the exponent is that of one. */
	uint64_t significand = mixed(worker->steps) | 1ull << 63;
	memcpy(before.x87, &significand, sizeof significand);
	before.x87[8] = 0xff;
	before.x87[9] = 0x3f;
	/* All exceptions masked, rounding towards zero: not what a reset leaves. */
	before.mxcsr = 0x7f80;
	before.x87_control = 0x0f7f;

	hold(&before, &after, worker->has_avx, ms);

	for (size_t i = 0; i < VECTORS; i++)
		if (memcmp(before.vectors[i], after.vectors[i], width) != 0)
			fail("CORRUPT what=%s%zu cpu=%u", worker->has_avx ? "ymm" : "xmm", i, worker->cpu);
	for (size_t i = 0; i < 4; i++)
		if (before.general[i] != after.general[i])
			fail("CORRUPT what=r%zu cpu=%u want=%#llx found=%#llx", 12 + i, worker->cpu,
			     (unsigned long long)before.general[i], (unsigned long long)after.general[i]);
	if (memcmp(before.x87, after.x87, 10) != 0)
		fail("CORRUPT what=st0 cpu=%u", worker->cpu);
	if (before.mxcsr != after.mxcsr)
		fail("CORRUPT what=mxcsr cpu=%u want=%#x found=%#x", worker->cpu, before.mxcsr, after.mxcsr);
	if (before.x87_control != after.x87_control)
		fail("CORRUPT what=fcw cpu=%u want=%#x found=%#x", worker->cpu, before.x87_control, after.x87_control);
}

static void work(struct worker *worker, uint64_t ms)
{
	cpu_set_t here;

	CPU_ZERO(&here);
	CPU_SET(worker->cpu, &here);
	if (sched_setaffinity(0, sizeof here, &here) == -1)
		fail("check: no cpu %u: %s", worker->cpu, strerror(errno));
	worker->memory = take_memory(worker->pages * PAGE, MAP_PRIVATE);
	worker->rewrites = take_memory(worker->pages * sizeof *worker->rewrites, MAP_PRIVATE);
	for (size_t page = 0; page < worker->pages; page++)
		write_page(worker, page);
	for (;; worker->steps++) {
		for (size_t page = 0; page < worker->pages; page++)
			check_page(worker, page);
		for (size_t page = 0; page < worker->pages; page++)
			write_page(worker, page);
		check_clock(worker);
		check_place(worker);
		sleep_with_full_registers(worker, ms);
		atomic_store(&worker->shared->steps[worker->cpu], worker->steps + 1);
	}
}

/* Whether the kernel looks after the upper halves of the vector registers; CPUID may claim it where it does not. */
static bool kernel_keeps_avx(void)
{
	char line[4096];
	bool found = false;
	FILE *file = fopen("/proc/cpuinfo", "re");

	while (file != NULL && !found && fgets(line, sizeof line, file) != NULL)
		found = strncmp(line, "flags", 5) == 0 && strstr(line, " avx ") != NULL;
	if (file != NULL)
		fclose(file);
	return found;
}

int job_check(void)
{
	uint64_t ms = option_number("check.ms", 250, 1, 60000);
	uint64_t kib = option_number("check.kib", 256, 4, 1 << 20);
	uint64_t seen[CPUS_MAX] = { 0 };
	struct shared *shared = take_memory(sizeof *shared, MAP_SHARED);
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	bool has_avx = kernel_keeps_avx();

	if (cpus > CPUS_MAX)
		cpus = CPUS_MAX;
	say("check: cpus=%ld pages=%llu vectors=%s", cpus, (unsigned long long)kib / 4, has_avx ? "ymm" : "xmm");
	for (long cpu = 0; cpu < cpus; cpu++) {
		struct worker worker = {
			.cpu = (unsigned)cpu, .pages = kib / 4, .has_avx = has_avx, .shared = shared
		};

		if (fork() == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			work(&worker, ms);
		}
	}
	for (uint64_t tick = 1;; tick++) {
		unsigned moved = 0;
		uint64_t steps = 0;

		sleep_ms(ms);
		/* Workers never end, except with a fault. */
		if (waitpid(-1, NULL, WNOHANG) != 0)
			return 1;
		for (long cpu = 0; cpu < cpus; cpu++) {
			uint64_t now = atomic_load(&shared->steps[cpu]);

			moved += now > seen[cpu];
			steps += now;
			seen[cpu] = now;
		}
		say("tick %llu cpus=%u steps=%llu clock_ms=%llu", (unsigned long long)tick, moved,
		    (unsigned long long)steps, (unsigned long long)(clock_now() / 1000000));
	}
}
