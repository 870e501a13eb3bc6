//! A UDP socket for large packets.
//!
//! quinn hands the kernel several packets in one call (generic segmentation offload): up to ten of the path's current
//! size, whatever that size is. The kernel takes at most one IP packet's worth, 64 KiB, and answers `EMSGSIZE` beyond;
//! quinn takes that for a failed MTU probe and drops all ten in silence. On loopback, where packets of 32,000 bytes pass,
//! that is nearly every packet of a bulk transfer. So calls that are too long are cut here.

use core::fmt;
use core::pin::Pin;
use core::task::{Context, Poll};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

/// The largest UDP payload of an IPv4 packet: what the kernel takes in one call, segmented or not.
const CALL_BYTES: usize = 65_535 - 20 - 8;

/// quinn's socket, with calls of any length.
pub(crate) struct LargePackets {
    inner: Arc<dyn AsyncUdpSocket>,
}

impl LargePackets {
    pub(crate) fn new(socket: UdpSocket) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            inner: TokioRuntime.wrap_udp_socket(socket)?,
        }))
    }
}

impl fmt::Debug for LargePackets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl AsyncUdpSocket for LargePackets {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        // If a later piece would block, quinn sends the whole call again. QUIC drops the packets that came twice.
        pieces(transmit).try_for_each(|piece| self.inner.try_send(&piece))
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

/// `transmit` in calls that the kernel takes, cut between packets.
fn pieces<'a>(transmit: &'a Transmit<'a>) -> impl Iterator<Item = Transmit<'a>> {
    let whole = transmit.contents.len();
    let packet = transmit.segment_size.unwrap_or(whole).max(1);
    let per_call = (CALL_BYTES / packet).max(1).saturating_mul(packet);
    transmit.contents.chunks(per_call).map(move |contents| Transmit {
        destination: transmit.destination,
        ecn: transmit.ecn,
        contents,
        // One packet alone is not segmented.
        segment_size: transmit.segment_size.filter(|size| contents.len() > *size),
        src_ip: transmit.src_ip,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(len: usize, segment_size: Option<usize>) -> Vec<(usize, Option<usize>)> {
        let contents = vec![0; len];
        let destination = "127.0.0.1:1".parse().unwrap();
        let transmit = Transmit {
            destination,
            ecn: None,
            contents: &contents,
            segment_size,
            src_ip: None,
        };
        pieces(&transmit)
            .map(|piece| (piece.contents.len(), piece.segment_size))
            .collect()
    }

    #[test]
    fn no_call_is_longer_than_the_kernel_takes_and_none_cuts_a_packet() {
        assert_eq!(cut(14_520, Some(1_452)), [(14_520, Some(1_452))]);
        assert_eq!(cut(32_000, None), [(32_000, None)]);
        assert_eq!(
            cut(150_000, Some(32_000)),
            [(64_000, Some(32_000)), (64_000, Some(32_000)), (22_000, None)]
        );
        assert_eq!(cut(80_000, Some(8_952)), [(62_664, Some(8_952)), (17_336, Some(8_952))]);
        assert_eq!(cut(100_000, Some(50_000)), [(50_000, None), (50_000, None)]);
        assert_eq!(cut(0, None), []);
    }
}
