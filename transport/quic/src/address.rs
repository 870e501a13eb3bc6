//! Addresses as an operator writes them, and sockets bound to them.

use crate::error::{PathError, Unreadable};
use core::fmt;
use core::str::FromStr;
use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

const PATH: &str = "quic:IP:PORT or quic:IP:PORT,local=IP[:PORT], IPv6 in brackets,";
const LISTEN: &str = "quic:IP:PORT, IPv6 in brackets,";

/// Room for 20 ms at 1.6 Gbit/s. The kernel gives what its own limits allow.
const SOCKET_BUFFER: usize = 4 << 20;

/// One path: where to, and from which local address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PathSpec {
    /// The local address; `None` leaves it to the routing table, port 0 to the host.
    pub local: Option<SocketAddr>,
    /// The peer's listener.
    pub remote: SocketAddr,
}

impl PathSpec {
    /// To `remote`, from wherever the routing table says.
    pub const fn to(remote: SocketAddr) -> Self {
        Self { local: None, remote }
    }

    /// What to bind: the local address, or any of the remote's family.
    pub(crate) fn bind_addr(&self) -> SocketAddr {
        let any = if self.remote.is_ipv6() {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED)
        } else {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        };
        self.local.unwrap_or_else(|| SocketAddr::new(any, 0))
    }
}

impl FromStr for PathSpec {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Unreadable> {
        let bad = || Unreadable::new(text, PATH);
        let rest = text.strip_prefix("quic:").ok_or_else(bad)?;
        let (remote, local) = match rest.split_once(',') {
            None => (rest, None),
            Some((remote, option)) => (remote, Some(option.strip_prefix("local=").ok_or_else(bad)?)),
        };
        let remote: SocketAddr = remote.parse().map_err(|_| bad())?;
        let local = local.map(|local| local_addr(local).ok_or_else(bad)).transpose()?;
        if remote.port() == 0 || remote.ip().is_unspecified() {
            return Err(Unreadable::new(
                text,
                "a remote address that can be reached: an IP and a port, neither zero,",
            ));
        }
        if local.is_some_and(|local| local.is_ipv6() != remote.is_ipv6()) {
            return Err(Unreadable::new(text, "a local address of the remote's family"));
        }
        Ok(Self { local, remote })
    }
}

/// `IP:PORT`, `IP`, `[IP6]:PORT` or `[IP6]`.
fn local_addr(text: &str) -> Option<SocketAddr> {
    if let Ok(addr) = text.parse::<SocketAddr>() {
        return Some(addr);
    }
    let bare = text
        .strip_prefix('[')
        .map_or(Some(text), |inner| inner.strip_suffix(']'))?;
    let ip: IpAddr = bare.parse().ok()?;
    // An IPv6 address without brackets could as well be one with a port.
    (ip.is_ipv4() || bare.len() < text.len()).then(|| SocketAddr::new(ip, 0))
}

impl fmt::Display for PathSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "quic:{}", self.remote)?;
        self.local.map_or(Ok(()), |local| write!(f, ",local={local}"))
    }
}

/// Where to listen: `quic:IP:PORT`, port 0 for any free one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenSpec(pub SocketAddr);

impl FromStr for ListenSpec {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Unreadable> {
        let addr = text.strip_prefix("quic:").and_then(|addr| addr.parse().ok());
        addr.map(Self).ok_or_else(|| Unreadable::new(text, LISTEN))
    }
}

impl fmt::Display for ListenSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "quic:{}", self.0)
    }
}

/// A UDP socket bound to `addr`, with large buffers. An IPv6 socket takes IPv6 only, so that one listener per family
/// can share a port.
pub(crate) fn bind(addr: SocketAddr) -> Result<UdpSocket, PathError> {
    open(addr).map_err(|error| PathError::Bind {
        local: addr,
        text: error.to_string(),
    })
}

fn open(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_recv_buffer_size(SOCKET_BUFFER)?;
    socket.set_send_buffer_size(SOCKET_BUFFER)?;
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_reads_as_it_is_written() {
        for text in [
            "quic:192.0.2.1:7000",
            "quic:192.0.2.1:7000,local=192.0.2.9:0",
            "quic:192.0.2.1:7000,local=192.0.2.9:7001",
            "quic:[2001:db8::1]:7000",
            "quic:[2001:db8::1]:7000,local=[2001:db8::9]:0",
        ] {
            assert_eq!(text.parse::<PathSpec>().unwrap().to_string(), text);
        }
        let spec: PathSpec = "quic:192.0.2.1:7000,local=192.0.2.9".parse().unwrap();
        assert_eq!(spec.local, Some("192.0.2.9:0".parse().unwrap()));
        let spec: PathSpec = "quic:[2001:db8::1]:7000,local=[2001:db8::9]".parse().unwrap();
        assert_eq!(spec.local, Some("[2001:db8::9]:0".parse().unwrap()));
    }

    #[test]
    fn a_path_without_a_local_address_binds_any_of_the_remotes_family() {
        let v4: PathSpec = "quic:192.0.2.1:7000".parse().unwrap();
        let v6: PathSpec = "quic:[2001:db8::1]:7000".parse().unwrap();
        assert_eq!(v4.bind_addr().to_string(), "0.0.0.0:0");
        assert_eq!(v6.bind_addr().to_string(), "[::]:0");
    }

    #[test]
    fn what_is_not_a_path_is_named_with_what_would_be() {
        for text in [
            "192.0.2.1:7000",
            "tcp:192.0.2.1:7000",
            "quic:192.0.2.1",
            "quic:host:7000",
            "quic:2001:db8::1:7000",
            "quic:192.0.2.1:7000,via=eth0",
            "quic:192.0.2.1:7000,local=",
            "quic:[2001:db8::1]:7000,local=2001:db8::9",
            "quic:",
            "",
        ] {
            let error = text.parse::<PathSpec>().unwrap_err();
            assert_eq!(error.to_string(), format!("`{text}`: {PATH} expected"));
        }
        let error = "quic:192.0.2.1:0".parse::<PathSpec>().unwrap_err().to_string();
        assert!(error.contains("neither zero"), "{error}");
        let error = "quic:192.0.2.1:7000,local=[::1]:0"
            .parse::<PathSpec>()
            .unwrap_err()
            .to_string();
        assert!(error.contains("family"), "{error}");
        assert!("x".repeat(10_000).parse::<PathSpec>().unwrap_err().to_string().len() < 200);
    }

    #[test]
    fn a_listening_address_may_leave_the_port_to_the_host() {
        assert_eq!(
            "quic:127.0.0.1:0".parse::<ListenSpec>().unwrap().to_string(),
            "quic:127.0.0.1:0"
        );
        let error = "127.0.0.1:0".parse::<ListenSpec>().unwrap_err();
        assert_eq!(error.to_string(), format!("`127.0.0.1:0`: {LISTEN} expected"));
    }

    #[test]
    fn an_address_that_is_not_ours_cannot_be_bound_and_the_error_says_which() {
        let error = bind("192.0.2.77:0".parse().unwrap()).unwrap_err();
        assert!(
            error.to_string().starts_with("cannot use local address 192.0.2.77:0: "),
            "{error}"
        );
        assert!(!error.is_final());
    }
}
