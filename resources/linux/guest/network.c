/* Gives eth0 an address. With ioctls, because two processes of `ip` would double the time to the first packet. */
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static const char *const INTERFACE = "eth0";

static struct sockaddr *set_address(struct sockaddr *place, struct in_addr address)
{
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr = address };

	memcpy(place, &in, sizeof in);
	return place;
}

static bool bring_up(int control, const char *name)
{
	struct ifreq request = { 0 };

	snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
	if (ioctl(control, SIOCGIFFLAGS, &request) == -1)
		return false;
	request.ifr_flags |= IFF_UP;
	return ioctl(control, SIOCSIFFLAGS, &request) == 0;
}

/* Reads "10.0.0.2/24". */
static bool parse(const char *text, struct in_addr *address, unsigned *bits)
{
	char dotted[INET_ADDRSTRLEN];
	const char *slash = strchr(text, '/');
	char *end;

	if (slash == NULL || (size_t)(slash - text) >= sizeof dotted)
		return false;
	memcpy(dotted, text, (size_t)(slash - text));
	dotted[slash - text] = '\0';
	unsigned long number = strtoul(slash + 1, &end, 10);
	if (end == slash + 1 || *end != '\0' || number > 32)
		return false;
	*bits = (unsigned)number;
	return inet_pton(AF_INET, dotted, address) == 1;
}

static void set_gateway(int control, const char *text)
{
	struct rtentry route = { .rt_flags = RTF_UP | RTF_GATEWAY };
	struct in_addr gateway, any = { INADDR_ANY };

	if (inet_pton(AF_INET, text, &gateway) != 1) {
		say("umbra-linux: umbra.gateway=%s: expected an IPv4 address", text);
		return;
	}
	set_address(&route.rt_dst, any);
	set_address(&route.rt_genmask, any);
	set_address(&route.rt_gateway, gateway);
	if (ioctl(control, SIOCADDRT, &route) == -1)
		say("umbra-linux: no route by %s: %s", text, strerror(errno));
}

void network_up(void)
{
	const char *text = option("ip");
	const char *gateway = option("gateway");
	struct ifreq request = { 0 };
	struct in_addr address;
	unsigned bits;

	int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (control < 0)
		return;
	bring_up(control, "lo");
	if (text == NULL)
		goto done;
	if (!parse(text, &address, &bits)) {
		say("umbra-linux: umbra.ip=%s: expected ADDRESS/BITS, for example 10.0.0.2/24", text);
		goto done;
	}
	snprintf(request.ifr_name, sizeof request.ifr_name, "%s", INTERFACE);
	set_address(&request.ifr_addr, address);
	bool is_set = ioctl(control, SIOCSIFADDR, &request) == 0;
	struct in_addr mask = { bits == 0 ? 0 : htonl(~0u << (32 - bits)) };
	set_address(&request.ifr_netmask, mask);
	is_set = is_set && ioctl(control, SIOCSIFNETMASK, &request) == 0;
	if (!is_set || !bring_up(control, INTERFACE)) {
		say("umbra-linux: no %s: %s", INTERFACE, strerror(errno));
		goto done;
	}
	if (gateway != NULL)
		set_gateway(control, gateway);
	say("umbra-linux: %s %s", INTERFACE, text);
done:
	close(control);
}
