/*
 * umbra-linux: the first program of the Linux guest that Umbra is tested with.
 *
 * As process 1 it says that user space has begun, mounts what programs expect, gives the network its address, starts the
 * jobs that the command line names, and waits. When every job has ended, or somebody presses the power button, it ends the
 * machine in order. It is a program and not a shell script because where ring 0 is emulated each process that a script
 * starts costs a third of a second.
 *
 * Outside of a guest, `umbra-linux verify IMAGE` checks a disk that the guest wrote.
 */
#include "guest.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
	JOBS_MAX = 8,
	BUTTONS_MAX = 4,
	/* How long jobs may take to end when they are asked to. */
	FAREWELL_MS = 3000,
};

struct job {
	const char *name;
	int (*work)(void);
	pid_t process;
};

static char command_line[4096];

void say(const char *format, ...)
{
	char line[512];
	va_list arguments;

	va_start(arguments, format);
	int length = vsnprintf(line, sizeof line - 1, format, arguments);
	va_end(arguments);
	if (length < 0)
		return;
	size_t end = (size_t)length < sizeof line - 2 ? (size_t)length : sizeof line - 2;
	line[end] = '\n';
	/* A console that takes no more must not stop the machine. */
	ssize_t written = write(STDOUT_FILENO, line, end + 1);
	(void)written;
}

void fail(const char *format, ...)
{
	char line[400];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(line, sizeof line, format, arguments);
	va_end(arguments);
	say("%s", line);
	_exit(1);
}

uint64_t clock_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void sleep_ms(uint64_t ms)
{
	struct timespec left = { (time_t)(ms / 1000), (long)(ms % 1000) * 1000000 };

	while (nanosleep(&left, &left) == -1 && errno == EINTR)
		;
}

/*
 * Cuts the kernel's command line into words, in place. The kernel shows words with spaces as it was given them: with
 * double quotes around the value or around all of it.
 */
static void read_command_line(void)
{
	int file = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
	ssize_t length = file < 0 ? -1 : read(file, command_line, sizeof command_line - 2);
	bool quoted = false;
	size_t to = 0;

	if (length < 0)
		fail("umbra-linux: cannot read /proc/cmdline: %s", strerror(errno));
	close(file);
	for (ssize_t from = 0; from < length; from++) {
		char c = command_line[from];

		if (c == '"')
			quoted = !quoted;
		else
			command_line[to++] = (c == '\n' || (c == ' ' && !quoted)) ? '\0' : c;
	}
	/* Two: an empty word ends the list, and there may be empty words between. */
	memset(command_line + to, 0, sizeof command_line - to);
}

const char *option(const char *name)
{
	size_t length = strlen(name);
	const char *end = command_line + sizeof command_line;
	const char *found = NULL;

	for (const char *word = command_line; word < end; word += strlen(word) + 1)
		if (strncmp(word, "umbra.", 6) == 0 && strncmp(word + 6, name, length) == 0 && word[6 + length] == '=')
			found = word + 6 + length + 1;
	return found;
}

uint64_t option_number(const char *name, uint64_t otherwise, uint64_t least, uint64_t most)
{
	const char *text = option(name);
	char *end;

	if (text == NULL)
		return otherwise;
	errno = 0;
	unsigned long long number = strtoull(text, &end, 10);
	if (errno != 0 || *text == '-' || end == text || *end != '\0' || number < least || number > most)
		fail("umbra-linux: umbra.%s=%s: expected a number from %llu to %llu", name, text,
		     (unsigned long long)least, (unsigned long long)most);
	return number;
}

static void mount_at(const char *kind, const char *place)
{
	if (mount(kind, place, kind, 0, NULL) == -1 && errno != EBUSY)
		say("umbra-linux: cannot mount %s on %s: %s", kind, place, strerror(errno));
}

/* umbra.run= as a job: a command for busybox's shell. */
static int job_run(void)
{
	const char *command = option("run");

	if (command == NULL)
		fail("umbra-linux: the job `run` needs umbra.run=\"COMMAND\"");
	execl("/bin/sh", "sh", "-c", command, NULL);
	fail("umbra-linux: cannot start /bin/sh: %s", strerror(errno));
}

/* A shell on the console, for people. */
static int job_shell(void)
{
	setsid();
	execl("/bin/sh", "sh", "-i", NULL);
	fail("umbra-linux: cannot start /bin/sh: %s", strerror(errno));
}

/* Nothing, for ever. */
static int job_idle(void)
{
	while (pause() == -1)
		;
	return 0;
}

static const struct job known_jobs[] = {
	{ "check", job_check, 0 }, { "net", job_net, 0 },	{ "vsock", job_vsock, 0 }, { "disk", job_disk, 0 },
	{ "verify", job_verify, 0 }, { "run", job_run, 0 }, { "shell", job_shell, 0 }, { "idle", job_idle, 0 },
};

static const struct job *find_job(const char *name)
{
	for (size_t i = 0; i < sizeof known_jobs / sizeof *known_jobs; i++)
		if (strcmp(known_jobs[i].name, name) == 0)
			return &known_jobs[i];
	return NULL;
}

static size_t start_jobs(struct job *jobs, const sigset_t *before)
{
	char list[256];
	size_t count = 0;
	const char *asked = option("jobs");

	snprintf(list, sizeof list, "%s", asked != NULL ? asked : "idle");
	for (char *name = strtok(list, ","); name != NULL && count < JOBS_MAX; name = strtok(NULL, ",")) {
		const struct job *known = find_job(name);

		if (known == NULL) {
			say("umbra-linux: umbra.jobs=: no job `%s`: expected check, net, vsock, disk, verify, run, shell or idle",
			    name);
			continue;
		}
		pid_t process = fork();
		if (process == 0) {
			sigprocmask(SIG_SETMASK, before, NULL);
			_exit(known->work());
		}
		if (process < 0) {
			say("umbra-linux: cannot start %s: %s", name, strerror(errno));
			continue;
		}
		jobs[count] = *known;
		jobs[count++].process = process;
	}
	return count;
}

/* The power button is an input device; so is every other, and this guest has no other. */
static size_t open_buttons(struct pollfd *buttons)
{
	DIR *folder = opendir("/dev/input");
	size_t count = 0;

	if (folder == NULL)
		return 0;
	for (struct dirent *entry; (entry = readdir(folder)) != NULL && count < BUTTONS_MAX;) {
		if (strncmp(entry->d_name, "event", 5) != 0)
			continue;
		int file = openat(dirfd(folder), entry->d_name, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
		if (file >= 0)
			buttons[count++] = (struct pollfd){ .fd = file, .events = POLLIN };
	}
	closedir(folder);
	return count;
}

static bool is_power_key(int button)
{
	struct input_event event;

	while (read(button, &event, sizeof event) == (ssize_t)sizeof event)
		if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1)
			return true;
	return false;
}

/* Takes note of every job that has ended, and says how many have not. */
static size_t reap(struct job *jobs, size_t count)
{
	int status;
	size_t left = 0;

	for (pid_t process; (process = waitpid(-1, &status, WNOHANG)) > 0;)
		for (size_t i = 0; i < count; i++)
			if (jobs[i].process == process) {
				jobs[i].process = 0;
				if (WIFEXITED(status))
					say("umbra-linux: job %s ended with %d", jobs[i].name, WEXITSTATUS(status));
				else
					say("umbra-linux: job %s was ended by signal %d", jobs[i].name,
					    WTERMSIG(status));
			}
	for (size_t i = 0; i < count; i++)
		left += jobs[i].process != 0;
	return left;
}

/* Ends the machine in order: jobs, filesystems, then power. Never returns. */
static void end_machine(const char *why)
{
	const char *how = option("end");
	uint64_t give_up = clock_now() + FAREWELL_MS * 1000000ull;

	say("umbra-linux: end: %s", why);
	kill(-1, SIGTERM);
	while (waitpid(-1, NULL, WNOHANG) >= 0 && clock_now() < give_up)
		sleep_ms(10);
	kill(-1, SIGKILL);
	sync();
	umount2("/disk", 0);
	/* Without ACPI a kernel has no way to switch a machine off, and would halt with the machine running on. */
	bool can_power_off = access("/sys/firmware/acpi", F_OK) == 0;
	bool reset = how != NULL ? strcmp(how, "reboot") == 0 : !can_power_off;
	say("umbra-linux: %s", reset ? "reboot" : "power off");
	reboot(reset ? RB_AUTOBOOT : RB_POWER_OFF);
	for (;;)
		pause();
}

static void be_init(void)
{
	struct job jobs[JOBS_MAX];
	struct pollfd events[1 + BUTTONS_MAX];
	sigset_t wanted, before;

	say("umbra-linux: init");
	mount_at("proc", "/proc");
	mount_at("devtmpfs", "/dev");
	mount_at("sysfs", "/sys");
	read_command_line();
	setenv("PATH", "/bin", 1);
	network_up();

	/* Ctrl-Alt-Del, where a VMM has a keyboard to press it on, is a signal to us instead of an instant reset. */
	reboot(RB_DISABLE_CAD);
	sigemptyset(&wanted);
	sigaddset(&wanted, SIGCHLD);
	sigaddset(&wanted, SIGINT);
	sigprocmask(SIG_BLOCK, &wanted, &before);
	int signals = signalfd(-1, &wanted, SFD_NONBLOCK | SFD_CLOEXEC);
	events[0] = (struct pollfd){ .fd = signals, .events = POLLIN };
	size_t buttons = open_buttons(events + 1);
	size_t count = start_jobs(jobs, &before);

	say("umbra-linux: ready");
	while (count > 0) {
		struct signalfd_siginfo signal;

		poll(events, 1 + buttons, -1);
		while (read(signals, &signal, sizeof signal) == (ssize_t)sizeof signal)
			if (signal.ssi_signo == SIGINT)
				end_machine("ctrl-alt-del");
		for (size_t i = 1; i <= buttons; i++)
			if (is_power_key(events[i].fd))
				end_machine("power button");
		if (reap(jobs, count) == 0)
			break;
	}
	end_machine("no job left");
}

int main(int count, char **words)
{
	if (getpid() == 1)
		be_init();
	if (count == 3 && strcmp(words[1], "verify") == 0)
		return verify_image(words[2]);
	fail("usage: umbra-linux verify IMAGE   (or as the first program of a guest)");
}
