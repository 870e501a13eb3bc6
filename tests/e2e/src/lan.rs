//! A network of a story's own: a bridge, and a TAP for each host on it.
//!
//! Linux keeps networks apart by namespace, and a namespace belongs to a thread: [`Lan::new`] moves the story's thread
//! into a new one. What that thread starts and connects from then on is in there, and nothing else of the machine is.
//! The namespace goes when the last process in it does.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::world::PATIENCE;

/// A story's own network, `10.0.0.0/24`, of which the story is `10.0.0.1`.
#[derive(Debug)]
pub struct Lan(());

impl Lan {
    /// Move the calling thread into a new network.
    pub fn new() -> Result<Self> {
        // A namespace is made by `ip`, which can; this thread enters it while it has a name, and then it needs none.
        let name = format!("umbra-e2e-{}-{:?}", std::process::id(), std::thread::current().id());
        let name: String = name
            .chars()
            .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
            .collect();
        ip(&["netns", "add", &name])?;
        let entered = rustix::fs::open(
            format!("/run/netns/{name}"),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .and_then(|namespace| move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)));
        ip(&["netns", "del", &name])?;
        entered.context("enter a network namespace")?;
        ip(&["link", "set", "lo", "up"])?;
        ip(&["link", "add", "br0", "type", "bridge", "forward_delay", "0"])?;
        ip(&["addr", "add", "10.0.0.1/24", "dev", "br0"])?;
        ip(&["link", "set", "br0", "up"])?;
        Ok(Self(()))
    }

    /// A new TAP on the bridge, called `name`.
    pub fn tap(&self, name: &str) -> Result<()> {
        ip(&["tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr"])?;
        ip(&["link", "set", name, "master", "br0", "up"])
    }

    /// A TCP connection from the story.
    pub fn connect(&self, to: &str) -> Result<TcpStream> {
        let to: SocketAddr = to.parse()?;
        let stream = TcpStream::connect_timeout(&to, PATIENCE).with_context(|| format!("connect to {to}"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(Duration::from_secs(10)))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

fn ip(args: &[&str]) -> Result<()> {
    let done = Command::new("ip")
        .args(args)
        .output()
        .context("run `ip`, of Debian's iproute2")?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "ip {}: {}", args.join(" "), said.trim());
    Ok(())
}
