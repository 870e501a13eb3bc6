//! Just enough of a network to be reached: Ethernet, ARP, IPv4, ICMP echo, UDP.
//!
//! Nothing here keeps state. A frame is understood ([`understand`]), turned round ([`turn_round`]), answered
//! ([`answer_arp`]) or made ([`datagram`], [`announcement`]). Options, fragments and anything else are not for us.

use core::ops::Range;

/// The largest frame without its checksum: 1500 bytes of payload.
pub const FRAME_MAX: usize = 1514;
/// Bytes of a frame before the payload of a datagram.
pub const DATAGRAM_HEADERS: usize = ETHERNET + IPV4 + UDP;
/// The largest payload of a datagram.
pub const PAYLOAD_MAX: usize = FRAME_MAX - DATAGRAM_HEADERS;

const ETHERNET: usize = 14;
const IPV4: usize = 20;
const UDP: usize = 8;
const ARP: usize = 28;
const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
/// Ethernet and IPv4, addresses of six and four bytes (RFC 826).
const ARP_ETHERNET_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ICMP: u8 = 1;
const UDP_PROTOCOL: u8 = 17;
const BROADCAST: [u8; 6] = [0xff; 6];

/// An address on the network, at both levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// Ethernet.
    pub mac: [u8; 6],
    /// IPv4.
    pub ip: [u8; 4],
}

/// What a frame wants of us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// Who we are.
    WhoIs(Address),
    /// An answer to a ping.
    Ping,
    /// To read it.
    Datagram {
        /// Who sent it.
        from: Address,
        /// Their port.
        from_port: u16,
        /// Ours.
        to_port: u16,
        /// Where in the frame.
        payload: Range<usize>,
    },
    /// Nothing.
    Other,
}

fn array<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..at + N)?.try_into().ok()
}

/// What a frame wants of the host with this address.
pub fn understand(me: &Address, frame: &[u8]) -> Incoming {
    read(me, frame).unwrap_or(Incoming::Other)
}

fn read(me: &Address, frame: &[u8]) -> Option<Incoming> {
    let (to, from): ([u8; 6], [u8; 6]) = (array(frame, 0)?, array(frame, 6)?);
    if to != me.mac && to != BROADCAST {
        return None;
    }
    match array(frame, 12)? {
        TYPE_ARP => {
            let asks_for_us = array(frame, 14)? == ARP_ETHERNET_IPV4
                && array(frame, 20)? == [0, 1]
                && array::<4>(frame, 38)? == me.ip;
            let ip = array(frame, 28)?;
            asks_for_us.then_some(Incoming::WhoIs(Address { mac: from, ip }))
        }
        TYPE_IPV4 => {
            let ip = array(frame, 26)?;
            let from = Address { mac: from, ip };
            let length = usize::from(u16::from_be_bytes(array(frame, 16)?));
            let end = ETHERNET + length;
            let plain = frame[14] == 0x45 && frame[20] & 0x3f == 0 && frame[21] == 0;
            if !plain || array::<4>(frame, 30)? != me.ip || end > frame.len() {
                return None;
            }
            match frame[23] {
                ICMP if *frame.get(34)? == 8 && length >= IPV4 + 8 => Some(Incoming::Ping),
                UDP_PROTOCOL => {
                    let bytes = usize::from(u16::from_be_bytes(array(frame, 38)?));
                    let right = bytes >= UDP && IPV4 + bytes <= length;
                    right.then_some(Incoming::Datagram {
                        from,
                        from_port: u16::from_be_bytes(array(frame, 34)?),
                        to_port: u16::from_be_bytes(array(frame, 36)?),
                        payload: DATAGRAM_HEADERS..ETHERNET + IPV4 + bytes,
                    })
                }
                _ => None,
            }
        }
        _ => None,
    }
}

/// Makes of a ping or datagram the same thing back to its sender. Sums stay right: they do not care who is first.
///
/// The frame must have been understood as one of the two.
pub fn turn_round(frame: &mut [u8]) {
    swap(frame, 0, 6, 6);
    swap(frame, 26, 30, 4);
    if frame[23] == UDP_PROTOCOL {
        swap(frame, 34, 36, 2);
    } else {
        // From request to reply takes 8 from the first byte, which the sum makes good (RFC 1624).
        frame[34] = 0;
        let sum = u16::from_be_bytes([frame[36], frame[37]]);
        let (more, carry) = sum.overflowing_add(0x0800);
        frame[36..38].copy_from_slice(&(more + u16::from(carry)).to_be_bytes());
    }
}

fn swap(frame: &mut [u8], a: usize, b: usize, bytes: usize) {
    for n in 0..bytes {
        frame.swap(a + n, b + n);
    }
}

/// Writes the answer to "who is", and returns its length.
pub fn answer_arp(me: &Address, asker: &Address, out: &mut [u8]) -> usize {
    arp(me, 2, asker, asker.mac, out)
}

/// Writes a frame that tells everybody where this address is now (a gratuitous ARP), and returns its length.
pub fn announcement(me: &Address, out: &mut [u8]) -> usize {
    let all = Address {
        mac: BROADCAST,
        ip: me.ip,
    };
    arp(me, 1, &all, BROADCAST, out)
}

fn arp(me: &Address, operation: u8, to: &Address, mac: [u8; 6], out: &mut [u8]) -> usize {
    out[..6].copy_from_slice(&mac);
    out[6..12].copy_from_slice(&me.mac);
    out[12..14].copy_from_slice(&TYPE_ARP);
    out[14..20].copy_from_slice(&ARP_ETHERNET_IPV4);
    out[20..22].copy_from_slice(&[0, operation]);
    out[22..28].copy_from_slice(&me.mac);
    out[28..32].copy_from_slice(&me.ip);
    out[32..38].copy_from_slice(&to.mac);
    out[38..42].copy_from_slice(&to.ip);
    ETHERNET + ARP
}

/// Writes the headers of a datagram with so many bytes of payload, which begins at [`DATAGRAM_HEADERS`], and returns
/// the frame's length. There is no checksum over the payload, which IPv4 allows.
pub fn datagram(from: (&Address, u16), to: (&Address, u16), payload: usize, out: &mut [u8]) -> usize {
    let ((me, from_port), (peer, to_port)) = (from, to);
    let length = |bytes: usize| (bytes as u16).to_be_bytes();
    out[..6].copy_from_slice(&peer.mac);
    out[6..12].copy_from_slice(&me.mac);
    out[12..14].copy_from_slice(&TYPE_IPV4);
    let header = &mut out[14..34];
    header[..2].copy_from_slice(&[0x45, 0]);
    header[2..4].copy_from_slice(&length(IPV4 + UDP + payload));
    // No identification; do not fragment; time to live.
    header[4..12].copy_from_slice(&[0, 0, 0x40, 0, 64, UDP_PROTOCOL, 0, 0]);
    header[12..16].copy_from_slice(&me.ip);
    header[16..20].copy_from_slice(&peer.ip);
    let sum = checksum(header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    out[34..36].copy_from_slice(&from_port.to_be_bytes());
    out[36..38].copy_from_slice(&to_port.to_be_bytes());
    out[38..40].copy_from_slice(&length(UDP + payload));
    out[40..42].copy_from_slice(&[0, 0]);
    DATAGRAM_HEADERS + payload
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: Address = Address {
        mac: [2, 0, 0, 0, 0, 1],
        ip: [10, 0, 0, 2],
    };
    const PEER: Address = Address {
        mac: [2, 0, 0, 0, 0, 9],
        ip: [10, 0, 0, 1],
    };

    fn sent_to_me(payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; FRAME_MAX];
        let length = datagram((&PEER, 5000), (&ME, 7), payload.len(), &mut frame);
        frame.truncate(length);
        frame[DATAGRAM_HEADERS..].copy_from_slice(payload);
        frame
    }

    #[test]
    fn a_datagram_is_understood_and_goes_back_where_it_came_from() {
        let mut frame = sent_to_me(b"hello");
        let payload = match understand(&ME, &frame) {
            Incoming::Datagram {
                from,
                from_port: 5000,
                to_port: 7,
                payload,
            } if from == PEER => payload,
            other => panic!("{other:?}"),
        };
        assert_eq!(frame[payload], *b"hello");
        assert_eq!(checksum(&frame[14..34]), 0, "a right header sums to nothing");
        turn_round(&mut frame);
        assert!(matches!(
            understand(&PEER, &frame),
            Incoming::Datagram {
                from: ME,
                from_port: 7,
                to_port: 5000,
                ..
            }
        ));
        assert_eq!(checksum(&frame[14..34]), 0);
    }

    #[test]
    fn a_ping_is_answered_with_a_right_sum() {
        for word in [0u16, 0x1234, 0xf7ff, 0xffff] {
            let mut frame = sent_to_me(&word.to_be_bytes());
            frame[23] = ICMP;
            frame[34..38].copy_from_slice(&[8, 0, 0, 0]);
            let sum = checksum(&frame[34..]);
            frame[36..38].copy_from_slice(&sum.to_be_bytes());
            assert_eq!(understand(&ME, &frame), Incoming::Ping);
            turn_round(&mut frame);
            assert_eq!((frame[34], checksum(&frame[34..])), (0, 0), "{word:#x}");
        }
    }

    #[test]
    fn who_asks_for_us_is_answered_and_who_asks_for_others_is_not() {
        let mut question = vec![0; 60];
        arp(&PEER, 1, &Address { mac: [0; 6], ..ME }, BROADCAST, &mut question);
        assert_eq!(understand(&ME, &question), Incoming::WhoIs(PEER));
        let mut answer = [0; 60];
        assert_eq!(answer_arp(&ME, &PEER, &mut answer), 42);
        assert_eq!((&answer[..6], &answer[20..22]), (&PEER.mac[..], &[0, 2][..]));
        assert_eq!(answer[22..32], [2, 0, 0, 0, 0, 1, 10, 0, 0, 2]);
        let other = Address {
            ip: [10, 0, 0, 3],
            ..ME
        };
        assert_eq!(understand(&other, &question), Incoming::Other);
    }

    #[test]
    fn a_frame_cut_anywhere_or_with_any_byte_changed_harms_nobody() {
        let whole = sent_to_me(b"payload");
        for length in 0..whole.len() {
            assert_eq!(understand(&ME, &whole[..length]), Incoming::Other, "{length} bytes");
        }
        for at in 0..whole.len() {
            for value in [0, 0x46, 0x7f, 0x80, 0xff] {
                let mut frame = whole.clone();
                frame[at] = value;
                if let Incoming::Datagram { payload, .. } = understand(&ME, &frame) {
                    assert!(payload.end <= frame.len() && payload.start <= payload.end);
                }
            }
        }
    }
}
