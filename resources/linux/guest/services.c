/*
 * The jobs `net` and `vsock`: small services for a client outside, over TCP and over virtio sockets, on the same ports.
 *
 * | port | service |
 * |---|---|
 * | 7 | echo: every byte comes back (RFC 862) |
 * | 9 | discard: takes whatever comes (RFC 863) |
 * | 19 | chargen: sends as fast as is read (RFC 864), a letter per KiB |
 * | 2007 | count: each line comes back as "N LINE", where N counts the lines of all clients since the job began |
 *
 * The count is the guest's own memory, so that a client notices a reply that was lost, sent twice, or sent by a guest
 * that has forgotten something. One process and one loop: a process per client would cost a third of a second where ring
 * 0 is emulated.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
/* After sys/socket.h, which it needs. */
#include <linux/vm_sockets.h>

enum service { ECHO, DISCARD, CHARGEN, COUNT, SERVICES };

static const uint16_t ports[SERVICES] = { 7, 9, 19, 2007 };

enum {
	CLIENTS_MAX = 32,
	BUFFER = 16384,
	/* The longest line that `count` takes; it must fit into the reply beside its number. */
	LINE_MAX_BYTES = 1024,
	LETTER_RUN = 1024,
};

struct client {
	int socket;
	enum service service;
	/* Received and not yet answered. */
	size_t in_length;
	/* Answered and not yet sent: from out_sent to out_length. */
	size_t out_sent, out_length;
	char in[BUFFER];
	char out[BUFFER + 32];
};

struct server {
	int listeners[SERVICES];
	struct client *clients[CLIENTS_MAX];
	uint64_t lines;
};

static bool is_sending(const struct client *client)
{
	return client->out_sent < client->out_length;
}

static void put(struct client *client, const char *bytes, size_t length)
{
	memcpy(client->out, bytes, length);
	client->out_sent = 0;
	client->out_length = length;
}

static void take(struct client *client, size_t length)
{
	memmove(client->in, client->in + length, client->in_length - length);
	client->in_length -= length;
}

/* Answers what was received, if the last answer has left. False: this client breaks the rules. */
static bool answer(struct server *server, struct client *client)
{
	if (is_sending(client))
		return true;
	switch (client->service) {
	case ECHO:
		put(client, client->in, client->in_length);
		take(client, client->in_length);
		return true;
	case DISCARD:
		take(client, client->in_length);
		return true;
	case CHARGEN:
		take(client, client->in_length);
		for (size_t at = 0; at < BUFFER; at += LETTER_RUN)
			memset(client->out + at, 'a' + (int)(at / LETTER_RUN % 26), LETTER_RUN);
		client->out_sent = 0;
		client->out_length = BUFFER;
		return true;
	case COUNT:
	default: {
		char *end = memchr(client->in, '\n', client->in_length);

		if (end == NULL)
			return client->in_length < LINE_MAX_BYTES;
		int length = (int)(end - client->in);
		if (length >= LINE_MAX_BYTES)
			return false;
		int written = snprintf(client->out, sizeof client->out, "%llu %.*s\n",
				       (unsigned long long)++server->lines, length, client->in);
		client->out_sent = 0;
		client->out_length = (size_t)written;
		take(client, (size_t)length + 1);
		return true;
	}
	}
}

/* Receives, answers and sends until the socket would block. False: the client has gone, or should. */
static bool serve(struct server *server, struct client *client)
{
	for (;;) {
		if (!answer(server, client))
			return false;
		if (is_sending(client)) {
			ssize_t sent = send(client->socket, client->out + client->out_sent,
					    client->out_length - client->out_sent, MSG_NOSIGNAL | MSG_DONTWAIT);
			if (sent < 0)
				return errno == EAGAIN;
			client->out_sent += (size_t)sent;
			continue;
		}
		ssize_t received = recv(client->socket, client->in + client->in_length, BUFFER - client->in_length,
					MSG_DONTWAIT);
		if (received < 0)
			return errno == EAGAIN;
		if (received == 0)
			return false;
		client->in_length += (size_t)received;
	}
}

static int listen_at(int family, enum service service)
{
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_port = htons(ports[service]) };
	struct sockaddr_vm vm = { .svm_family = AF_VSOCK, .svm_port = ports[service], .svm_cid = VMADDR_CID_ANY };
	struct sockaddr *address = family == AF_INET ? (struct sockaddr *)&in : (struct sockaddr *)&vm;
	socklen_t length = family == AF_INET ? sizeof in : sizeof vm;
	int on = 1;

	int listener = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == -1 ||
	    bind(listener, address, length) == -1 || listen(listener, CLIENTS_MAX) == -1)
		fail("%s: cannot listen on port %u: %s", family == AF_INET ? "net" : "vsock", ports[service],
		     strerror(errno));
	return listener;
}

static void welcome(struct server *server, enum service service)
{
	int on = 1;
	int socket = accept4(server->listeners[service], NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (socket < 0)
		return;
	/* Virtio sockets know no such option, and need none. */
	setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	for (size_t i = 0; i < CLIENTS_MAX; i++) {
		if (server->clients[i] != NULL)
			continue;
		struct client *client = malloc(sizeof *client);
		if (client == NULL)
			break;
		client->socket = socket;
		client->service = service;
		client->in_length = client->out_sent = client->out_length = 0;
		server->clients[i] = client;
		return;
	}
	/* No room. A client that is sent away at once knows why it has no answer. */
	close(socket);
}

static _Noreturn void serve_all(const char *name, int family)
{
	static struct server server;
	struct pollfd events[SERVICES + CLIENTS_MAX];

	for (int service = 0; service < SERVICES; service++)
		server.listeners[service] = listen_at(family, (enum service)service);
	say("%s: listening on ports 7 9 19 2007", name);
	for (;;) {
		for (int i = 0; i < SERVICES; i++)
			events[i] = (struct pollfd){ .fd = server.listeners[i], .events = POLLIN };
		for (size_t i = 0; i < CLIENTS_MAX; i++) {
			const struct client *client = server.clients[i];

			/* poll() passes over negative descriptors. */
			events[SERVICES + i] = (struct pollfd){ .fd = client != NULL ? client->socket : -1 };
			if (client != NULL)
				events[SERVICES + i].events = is_sending(client) ? POLLOUT : POLLIN;
		}
		if (poll(events, SERVICES + CLIENTS_MAX, -1) < 0)
			continue;
		for (size_t i = 0; i < CLIENTS_MAX; i++) {
			struct client *client = server.clients[i];

			if (client == NULL || events[SERVICES + i].revents == 0 || serve(&server, client))
				continue;
			close(client->socket);
			free(client);
			server.clients[i] = NULL;
		}
		for (int service = 0; service < SERVICES; service++)
			if (events[service].revents != 0)
				welcome(&server, (enum service)service);
	}
}

int job_net(void)
{
	serve_all("net", AF_INET);
}

int job_vsock(void)
{
	serve_all("vsock", AF_VSOCK);
}
