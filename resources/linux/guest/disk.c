/*
 * The jobs `disk` and `verify`: a disk that shows what a power cut did to it.
 *
 * `disk` writes numbered records of one block each, BATCH of them and then a flush, and says `disk N ok` only after the flush
 * has returned and the records were read back. A record's whole content follows from its number, and record s lies in
 * slot (s - 1) % SLOTS, so that a look at the blocks tells what was written last and whether anything before it is
 * missing:
 *
 *   - every record up to the last N that was said is there, unless a later one lies in its slot;
 *   - if any record of a batch is there, all batches before it are: they were flushed before it was written.
 *
 * Within the newest batch anything goes: it may be missing, half there, or torn.
 *
 * The slots are the first of the disk itself (umbra.disk=raw), or a file in an ext4 filesystem on it (umbra.disk=ext4). With
 * the filesystem, each batch also replaces a small file by renaming another over it, which must never be missing or half
 * written. Both continue where the disk shows that they had come to.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
	RECORD = 4096,
	RECORD_WORDS = RECORD / 8,
	SLOTS = 1024,
	BATCH = 8,
};

static const uint64_t MAGIC = 0x6b7369646172626dull; /* "mbradisk" as bytes */

static const char *const DISK = "/dev/vda";
static const char *const FOLDER = "/disk";
static const char *const LOG = "/disk/log";
static const char *const CURRENT = "/disk/current";
static const char *const NEXT = "/disk/next";

/* One block, aligned as direct I/O wants it. */
struct record {
	uint64_t words[RECORD_WORDS];
} __attribute__((aligned(RECORD)));

static void make_record(struct record *record, uint64_t number)
{
	record->words[0] = MAGIC;
	record->words[1] = number;
	for (size_t i = 2; i < RECORD_WORDS; i++)
		record->words[i] = mixed(number << 9 ^ i);
}

/* The record's number, or 0 when the block is not a whole record. */
static uint64_t number_of(const struct record *record)
{
	struct record whole;
	uint64_t number = record->words[1];

	if (record->words[0] != MAGIC)
		return 0;
	make_record(&whole, number);
	return memcmp(record, &whole, sizeof whole) == 0 ? number : 0;
}

static uint64_t slot_of(uint64_t number)
{
	return (number - 1) % SLOTS;
}

/* The newest record of the first `count` that belongs into this slot, or 0. */
static uint64_t newest_in(uint64_t slot, uint64_t count)
{
	if (count <= slot)
		return 0;
	return slot + 1 + (count - slot - 1) / SLOTS * SLOTS;
}

/*
 * Up to which record everything is there. Anything that a power cut cannot explain is said, and `*sound` becomes false.
 */
static uint64_t find_last(int file, bool *sound)
{
	static uint64_t found[SLOTS];
	struct record record;
	uint64_t newest = 0;

	for (uint64_t slot = 0; slot < SLOTS; slot++) {
		ssize_t length = pread(file, &record, RECORD, (off_t)(slot * RECORD));

		if (length < 0)
			fail("disk: cannot read slot %llu: %s", (unsigned long long)slot, strerror(errno));
		/* A file ends where nothing was written yet. */
		found[slot] = length == RECORD ? number_of(&record) : 0;
		if (found[slot] > newest)
			newest = found[slot];
	}
	if (newest == 0)
		return 0;
	uint64_t flushed = (newest - 1) / BATCH * BATCH;
	bool is_batch_whole = true;
	for (uint64_t slot = 0; slot < SLOTS; slot++) {
		uint64_t in_batch = newest_in(slot, flushed + BATCH);

		if (in_batch > flushed) {
			is_batch_whole = is_batch_whole && found[slot] == in_batch;
			continue;
		}
		if (found[slot] != in_batch) {
			say("CORRUPT what=disk slot=%llu want=%llu found=%llu newest=%llu", (unsigned long long)slot,
			    (unsigned long long)in_batch, (unsigned long long)found[slot],
			    (unsigned long long)newest);
			*sound = false;
		}
	}
	return is_batch_whole ? flushed + BATCH : flushed;
}

/* The number in the small file, which may be one batch behind the log and never before it. */
static void check_current(uint64_t last, bool *sound)
{
	unsigned long long number = 0;
	FILE *file = fopen(CURRENT, "re");

	if (file == NULL && last <= BATCH)
		return;
	if (file == NULL || fscanf(file, "%llu", &number) != 1 || number > last || number + BATCH < last) {
		say("CORRUPT what=rename want=%llu found=%llu", (unsigned long long)last, number);
		*sound = false;
	}
	if (file != NULL)
		fclose(file);
}

static void replace_current(uint64_t last)
{
	char text[24];
	int length = snprintf(text, sizeof text, "%llu\n", (unsigned long long)last);

	int file = open(NEXT, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	bool done = file >= 0 && write(file, text, (size_t)length) == length && fsync(file) == 0;
	if (file >= 0)
		close(file);
	int folder = open(FOLDER, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	done = done && rename(NEXT, CURRENT) == 0 && folder >= 0 && fsync(folder) == 0;
	if (folder >= 0)
		close(folder);
	if (!done)
		fail("disk: cannot replace %s: %s", CURRENT, strerror(errno));
}

static void write_batch(int file, uint64_t first)
{
	struct record record;

	for (uint64_t number = first; number < first + BATCH; number++) {
		make_record(&record, number);
		if (pwrite(file, &record, RECORD, (off_t)(slot_of(number) * RECORD)) != RECORD)
			fail("disk: cannot write record %llu: %s", (unsigned long long)number, strerror(errno));
	}
	if (fsync(file) == -1)
		fail("disk: the flush after record %llu failed: %s", (unsigned long long)first + BATCH - 1,
		     strerror(errno));
}

static void read_back(int file, uint64_t first)
{
	struct record record;

	for (uint64_t number = first; number < first + BATCH; number++) {
		ssize_t length = pread(file, &record, RECORD, (off_t)(slot_of(number) * RECORD));
		uint64_t found = length == RECORD ? number_of(&record) : 0;

		if (found != number)
			fail("CORRUPT what=disk slot=%llu want=%llu found=%llu", (unsigned long long)slot_of(number),
			     (unsigned long long)number, (unsigned long long)found);
	}
}

/* An empty filesystem without a journal, for a disk that brings none. */
static void format(void)
{
	int status;
	pid_t process = fork();

	if (process == 0) {
		execl("/bin/busybox", "mke2fs", DISK, NULL);
		_exit(127);
	}
	if (process < 0 || waitpid(process, &status, 0) < 0 || status != 0)
		fail("disk: cannot format %s", DISK);
}

static bool has_filesystem(void)
{
	return strcmp(option("disk") != NULL ? option("disk") : "raw", "raw") != 0;
}

/* Opens the slots that umbra.disk= asks for. */
static int open_slots(bool may_format)
{
	const char *how = option("disk") != NULL ? option("disk") : "raw";

	if (strcmp(how, "raw") != 0 && strcmp(how, "ext4") != 0 && strcmp(how, "format") != 0)
		fail("disk: umbra.disk=%s: expected raw, ext4 or format", how);
	if (!has_filesystem()) {
		int disk = open(DISK, O_RDWR | O_DIRECT | O_CLOEXEC);
		if (disk < 0)
			fail("disk: cannot open %s: %s", DISK, strerror(errno));
		if (lseek(disk, 0, SEEK_END) < (off_t)SLOTS * RECORD)
			fail("disk: %s is smaller than %d bytes", DISK, SLOTS * RECORD);
		return disk;
	}
	if (may_format && strcmp(how, "format") == 0)
		format();
	mkdir(FOLDER, 0700);
	if (mount(DISK, FOLDER, "ext4", MS_NOATIME, NULL) == -1)
		fail("disk: cannot mount %s as ext4: %s", DISK, strerror(errno));
	int log = open(LOG, O_RDWR | O_CREAT | O_DIRECT | O_CLOEXEC, 0600);
	if (log < 0)
		fail("disk: cannot open %s: %s", LOG, strerror(errno));
	return log;
}

static uint64_t verified(int file)
{
	bool sound = true;
	uint64_t last = find_last(file, &sound);

	if (has_filesystem())
		check_current(last, &sound);
	if (!sound)
		_exit(1);
	say("disk verified %llu", (unsigned long long)last);
	return last;
}

int job_disk(void)
{
	uint64_t pause_ms = option_number("disk.ms", 100, 0, 60000);
	uint64_t batches = option_number("disk.batches", UINT64_MAX, 0, UINT64_MAX);
	int file = open_slots(true);
	uint64_t last = verified(file);

	for (; batches > 0; batches--, last += BATCH) {
		write_batch(file, last + 1);
		if (has_filesystem())
			replace_current(last + BATCH);
		read_back(file, last + 1);
		say("disk %llu ok", (unsigned long long)last + BATCH);
		sleep_ms(pause_ms);
	}
	return 0;
}

int job_verify(void)
{
	verified(open_slots(false));
	return 0;
}

int verify_image(const char *path)
{
	bool sound = true;
	int file = open(path, O_RDONLY | O_CLOEXEC);

	if (file < 0)
		fail("disk: cannot open %s: %s", path, strerror(errno));
	uint64_t last = find_last(file, &sound);
	if (!sound)
		return 1;
	say("disk verified %llu", (unsigned long long)last);
	return 0;
}
