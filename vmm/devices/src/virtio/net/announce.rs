//! Telling the network where a guest now is, in its name.
//!
//! What is sent is a reverse ARP request (RFC 903) from the guest's address to everybody: switches learn from its source
//! address, and nobody answers it. Rounds and intervals are QEMU's (`announce-rounds`, `announce-initial`,
//! `announce-step`, `announce-max`), which operators' networks are used to.

use core::time::Duration;

use umbra_units::Now;

use super::HEADER_BYTES;

/// How often the network is told.
pub const ROUNDS: u8 = 5;

const INITIAL: Duration = Duration::from_millis(50);
const STEP: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_millis(550);

/// Rounds still to come. Moments are this process's, so an announcement does not travel: a moved guest is announced anew.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Announcement {
    done: u8,
    next: Option<Now>,
    over: bool,
}

impl Announcement {
    /// One whose first round is due.
    pub const fn due() -> Self {
        Self {
            done: 0,
            next: None,
            over: false,
        }
    }

    /// One that says nothing.
    pub const fn over() -> Self {
        Self {
            done: ROUNDS,
            next: None,
            over: true,
        }
    }

    /// Whether a round is due; it then counts as done.
    pub fn take_round(&mut self, now: Now) -> bool {
        if self.over || self.next.is_some_and(|next| now < next) {
            return false;
        }
        self.done += 1;
        self.over = self.done == ROUNDS;
        self.next = (!self.over).then(|| now + interval(self.done));
        true
    }

    /// When the next round is due, if one is still to come after the first.
    pub const fn next(&self) -> Option<Now> {
        self.next
    }
}

/// How long after round `done` the next is.
fn interval(done: u8) -> Duration {
    (INITIAL + STEP * u32::from(done - 1)).min(LONGEST)
}

/// A frame that shows the network where `mac` is, with the card's header before it.
pub fn frame(mac: [u8; 6]) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    // EtherType RARP; hardware Ethernet, protocol IPv4, their lengths, operation "request reverse" (RFC 903).
    frame.extend([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    for _ in 0..2 {
        frame.extend(mac);
        frame.extend([0; 4]);
    }
    // An Ethernet frame has 60 bytes at least (IEEE 802.3), its checksum not counted.
    frame.resize(HEADER_BYTES + 60, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_rounds_at_growing_intervals() {
        let mut announcement = Announcement::due();
        let mut now = Now::from_us(7);
        let mut waits = Vec::new();
        while announcement.take_round(now) {
            assert!(!announcement.take_round(now), "a round is done once");
            if let Some(next) = announcement.next() {
                waits.push(next.since(now).as_millis());
                now = next;
            }
        }
        assert_eq!(waits, [50, 150, 250, 350]);
        assert!(!announcement.take_round(Now::NEVER));
    }

    #[test]
    fn the_frame_is_a_broadcast_from_the_guest() {
        let frame = frame([2, 3, 4, 5, 6, 7]);
        assert_eq!(frame.len(), 72);
        assert_eq!(frame[..12], [0; 12]);
        assert_eq!(frame[12..24], [255, 255, 255, 255, 255, 255, 2, 3, 4, 5, 6, 7]);
        assert_eq!(frame[24..26], [0x80, 0x35]);
    }
}
