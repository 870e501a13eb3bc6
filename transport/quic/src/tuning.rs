//! How connections behave: the one place where QUIC is tuned.

use crate::limits;
use core::net::{IpAddr, SocketAddr};
use core::time::Duration;
use quinn::congestion::BbrConfig;
use quinn::{EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt};
use std::sync::Arc;

/// The protocol versions this build speaks on top of a connection.
pub const VERSIONS: &[u16] = &[1];

/// Largest UDP payload tried where nothing but this host is between the ends. Doubling it again gains nothing that can be
/// measured, and a datagram must fit the link's largest shard.
const MTU_LOOPBACK: u16 = 32_000;

/// Largest UDP payload tried elsewhere: jumbo frames less IPv6 and UDP headers.
const MTU_NETWORK: u16 = 8_952;

/// What the peer may send ahead of our reading, per stream: a whole block.
const STREAM_WINDOW: u32 = 8 << 20;

/// The same for a connection: 1 Gbit/s for a quarter of a second.
const CONNECTION_WINDOW: u32 = 32 << 20;

/// Room for the datagrams of the largest urgent block with as much parity again.
const DATAGRAM_BUFFER: usize = 16 << 20;

/// What an operator may tune.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tuning {
    /// Protocol versions to offer or accept, best last.
    pub versions: Vec<u16>,
    /// How long a connection may be silent before it is dead. The link suspects a path long before and works around it;
    /// this is when dialling begins anew.
    pub idle: Duration,
    /// How often a silent connection says that it is there.
    pub keep_alive: Duration,
    /// Largest UDP payload to look for.
    pub mtu: Mtu,
    /// From a connection's first packet to its answer.
    pub join_deadline: Duration,
}

/// Largest UDP payload to look for. What the network really carries is found by probing, below this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mtu {
    /// 32,000 on loopback, 8,952 elsewhere.
    Auto,
    /// This; at least QUIC's 1,200.
    UpTo(u16),
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            versions: VERSIONS.to_vec(),
            idle: Duration::from_secs(2),
            keep_alive: Duration::from_millis(500),
            mtu: Mtu::Auto,
            join_deadline: limits::JOIN_DEADLINE,
        }
    }
}

impl Mtu {
    fn towards(self, peer: IpAddr) -> u16 {
        match self {
            Self::UpTo(bytes) => bytes.max(1_200),
            Self::Auto if peer.is_loopback() => MTU_LOOPBACK,
            Self::Auto => MTU_NETWORK,
        }
    }

    /// What a socket must be ready to receive: from whom is not known yet.
    const fn receivable(self) -> u16 {
        match self {
            Self::UpTo(bytes) if bytes > MTU_LOOPBACK => bytes,
            _ => MTU_LOOPBACK,
        }
    }
}

impl Tuning {
    pub(crate) fn endpoint(&self) -> EndpointConfig {
        let mut config = EndpointConfig::default();
        let largest = self.mtu.receivable().min(65_527);
        config
            .max_udp_payload_size(largest)
            .expect("between 1,200 and 65,527 by construction");
        config
    }

    pub(crate) fn transport(&self, peer: SocketAddr) -> Arc<TransportConfig> {
        let mut mtu = MtuDiscoveryConfig::default();
        mtu.upper_bound(self.mtu.towards(peer.ip().to_canonical()))
            .black_hole_cooldown(Duration::from_secs(10));
        let idle = self
            .idle
            .min(Duration::from_secs(3_600))
            .try_into()
            .expect("an hour fits QUIC's milliseconds");
        let mut config = TransportConfig::default();
        config
            // Loss is no sign of congestion on the links this is for; cubic is unusable there (measured: 1 % of the
            // rate at 80 ms and 5 % loss, where BBR keeps 76 %).
            .congestion_controller_factory(Arc::new(BbrConfig::default()))
            .mtu_discovery_config(Some(mtu))
            .max_idle_timeout(Some(idle))
            .keep_alive_interval(Some(self.keep_alive))
            // A lost first packet is repeated after a third of a second, not after a second.
            .initial_rtt(Duration::from_millis(110))
            .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
            .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
            .send_window(u64::from(CONNECTION_WINDOW))
            .max_concurrent_uni_streams(VarInt::from_u32(limits::STREAMS))
            // The join at the beginning and the farewell at the end.
            .max_concurrent_bidi_streams(VarInt::from_u32(2))
            // Blocks of one priority one after the other: half of them whole is worth more than all of them half.
            .send_fairness(false)
            .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER))
            .datagram_send_buffer_size(DATAGRAM_BUFFER);
        Arc::new(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mtu_suits_the_peer_and_never_falls_below_what_quic_needs() {
        let peer = |ip: &str| ip.parse().unwrap();
        assert_eq!(Mtu::Auto.towards(peer("127.0.0.9")), MTU_LOOPBACK);
        assert_eq!(Mtu::Auto.towards(peer("::1")), MTU_LOOPBACK);
        assert_eq!(Mtu::Auto.towards(peer("192.0.2.1")), MTU_NETWORK);
        assert_eq!(Mtu::UpTo(1_452).towards(peer("127.0.0.1")), 1_452);
        assert_eq!(Mtu::UpTo(0).towards(peer("127.0.0.1")), 1_200);
        for mtu in [Mtu::Auto, Mtu::UpTo(0), Mtu::UpTo(1_452), Mtu::UpTo(u16::MAX)] {
            Tuning {
                mtu,
                ..Tuning::default()
            }
            .endpoint();
        }
    }
}
