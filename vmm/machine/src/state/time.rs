//! Time over a move: what the guest's clocks must show when it goes on, and how far off they are.
//!
//! A guest reads two clocks that its host keeps: kvmclock, which counts nanoseconds, and the time-stamp counter (TSC), from
//! which kvmclock and most of the guest's own timekeeping are computed. Two hosts' counters have nothing to do with each
//! other: they began at different boots and may run at different rates. So the guest's counter is carried as the *value it
//! had at the instant of the clock record*, and from there it goes on, advanced by as much as kvmclock has advanced
//! (kvm/devices/vcpu.rst 4.1, which carries the offset instead, to the same end):
//!
//! ```text
//!   source, when the clock was read:   guest TSC = scaled(host TSC) + offset
//!   here, when the clock was set:      guest TSC = that + (kvmclock now − kvmclock then) · guest kHz
//!                                      offset    = guest TSC − scaled(host TSC here)
//! ```
//!
//! kvmclock itself is advanced by the wall time between the two readings, if both kernels tell it; the guest's wall clock
//! is kvmclock and a constant, and so goes on with it. What the two hosts' own wall clocks disagree by, the guest inherits.
//!
//! # Measured, not believed
//!
//! Some kernels take an offset, say that they did, and go on without. So after a restore the clocks are read again, and
//! what they show is compared with what they should: see [`ClockReport`].

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};

/// How a guest's clocks went on after a restore, as they were then read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockReport {
    /// Wall time, in nanoseconds, from saving to restoring, negative when this host's clock is behind the other's; `None`
    /// when one of the kernels does not tell.
    pub away_ns: Option<i64>,
    /// By how much kvmclock is ahead of what it was and the wall time since. `None` as above: then it stood still.
    pub error_ns: Option<i64>,
    /// How the guest's time-stamp counter was put in its place.
    pub tsc: TscPlaced,
    /// By how much the time-stamp counter is ahead of kvmclock, compared with when it was saved: the furthest of all
    /// vCPUs, 0 within what it takes to read it. `None` when the source did not know what it was.
    pub tsc_error_ns: Option<i64>,
}

/// How a guest's time-stamp counter was put in its place on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TscPlaced {
    /// By its offset from the host's: it goes on with kvmclock, unless the kernel ignores that.
    Offset,
    /// By the value it should have, because this host's kernel takes no offset, or does not keep time by its own counter:
    /// it lacks the time from computing the value to the kernel's taking it.
    Value,
    /// As it was when it was saved, because the source did not know what it was at the clock's instant.
    AsSaved,
}

impl TscPlaced {
    /// What it means, in words.
    pub const fn why(self) -> &'static str {
        match self {
            Self::Offset => "by offset",
            Self::Value => "by value: this kernel takes no offset, or keeps no time by its own counter",
            Self::AsSaved => "as it was saved: the source could not tell when it was that",
        }
    }
}

impl ClockReport {
    /// Whether a clock is off by more than `ns`, where that is known.
    pub(crate) fn is_off_by(&self, ns: u64) -> bool {
        let off = |error: Option<i64>| error.is_some_and(|error| error.unsigned_abs() > ns);
        off(self.error_ns) || off(self.tsc_error_ns)
    }
}

/// The clocks of a host and of a guest's VM, read at one instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reading {
    /// kvmclock.
    clock_ns: u64,
    realtime_ns: Option<u64>,
    host_tsc: Option<u64>,
}

impl Reading {
    pub(crate) fn of(clock: &kvm_clock_data) -> Self {
        let told = |flag: u32, value| (clock.flags & flag != 0).then_some(value);
        Self {
            clock_ns: clock.clock,
            realtime_ns: told(KVM_CLOCK_REALTIME, clock.realtime),
            host_tsc: told(KVM_CLOCK_HOST_TSC, clock.host_tsc),
        }
    }

    /// Wall time since `then`, and by how much kvmclock is ahead of it.
    pub(crate) fn since(&self, then: &Self) -> (Option<i64>, Option<i64>) {
        let (now, before) = (self.realtime_ns, then.realtime_ns);
        let away = now.zip(before).map(|(now, before)| difference(now, before));
        let advanced = difference(self.clock_ns, then.clock_ns);
        (away, away.map(|away| advanced.saturating_sub(away)))
    }

    /// A guest's TSC at this instant, if the kernel told the host's.
    pub(crate) fn guest_tsc(&self, offset: u64, rate: Rate) -> Option<u64> {
        self.host_tsc.map(|tsc| rate.scaled(tsc).wrapping_add(offset))
    }

    /// The offset with which a guest's TSC, as it was `then`, goes on here, if the kernel told the host's.
    pub(crate) fn tsc_offset(&self, tsc: Tsc, then: &Self, rate: Rate) -> Option<u64> {
        self.host_tsc
            .map(|host| tsc.due(then, self).wrapping_sub(rate.scaled(host)))
    }
}

/// A guest's TSC at some instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tsc {
    pub(crate) value: u64,
    /// How many thousands a second the guest believes it counts.
    pub(crate) khz: u32,
}

impl Tsc {
    /// What it is at `now`, having been this `then`, if it goes on with kvmclock.
    pub(crate) fn due(self, then: &Reading, now: &Reading) -> u64 {
        let passed = i128::from(now.clock_ns) - i128::from(then.clock_ns);
        // 65 bits by 32.
        let cycles = passed * i128::from(self.khz) / 1_000_000;
        let due = (i128::from(self.value) + cycles).rem_euclid(1 << 64);
        u64::try_from(due).expect("a remainder of 2^64")
    }

    /// How many nanoseconds `found`, read at some instant from `from` to `to`, is ahead of what it should be.
    pub(crate) fn error_ns(self, then: &Reading, found: u64, from: &Reading, to: &Reading) -> i64 {
        let ahead_of = |now| found.wrapping_sub(self.due(then, now)).cast_signed();
        let cycles = match (ahead_of(from), ahead_of(to)) {
            (behind, _) if behind < 0 => behind,
            (_, ahead) if ahead > 0 => ahead,
            _ => 0,
        };
        let ns = i128::from(cycles) * 1_000_000 / i128::from(self.khz.max(1));
        i64::try_from(ns).unwrap_or(if ns > 0 { i64::MAX } else { i64::MIN })
    }

    /// Its value at the instant of a clock record: `told`, computed from the offset that the kernel says is in force, if
    /// that can be; `found` is what the guest read a moment later.
    pub(crate) fn at_the_clock(told: Option<u64>, found: Option<u64>, khz: u32) -> Option<u64> {
        const MOMENT_MS: u64 = 10_000;
        match (told, found) {
            // A kernel that ignores offsets may still say that it has the one it was given.
            (Some(told), Some(found)) if found.wrapping_sub(told) > u64::from(khz).saturating_mul(MOMENT_MS) => {
                Some(found)
            }
            (Some(told), _) => Some(told),
            (None, found) => found,
        }
    }
}

/// How fast a vCPU's TSC runs, compared with its host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rate {
    pub(crate) guest_khz: u32,
    pub(crate) host: HostTsc,
}

/// A host's own TSC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HostTsc {
    pub(crate) khz: u32,
    /// Bits behind the point of the processor's multiplier.
    pub(crate) fraction: u32,
}

impl HostTsc {
    /// Of a processor whose vendor's name begins with `vendor`: leaf 0, register ebx.
    pub(crate) fn new(khz: u32, vendor: u32) -> Self {
        // SVM's multiplier has 32 bits (APM volume 2, 15.30.5), VMX's has 48 (SDM volume 3, 26.6.5).
        let svm = [*b"Auth", *b"Hygo"].map(u32::from_le_bytes).contains(&vendor);
        Self {
            khz,
            fraction: if svm { 32 } else { 48 },
        }
    }
}

impl Rate {
    /// The host's TSC times the multiplier, as the processor does it: to the same bit, because after a year of uptime what
    /// is rounded in the multiplier is milliseconds.
    fn scaled(self, tsc: u64) -> u64 {
        let Self {
            guest_khz,
            host: HostTsc { khz, fraction },
        } = self;
        if khz == 0 || is_same_khz(guest_khz, khz) {
            return tsc;
        }
        let multiplier = (u128::from(guest_khz) << fraction) / u128::from(khz);
        let multiplier = u64::try_from(multiplier).unwrap_or(u64::MAX);
        let scaled = (u128::from(tsc) * u128::from(multiplier)) >> fraction;
        u64::try_from(scaled & u128::from(u64::MAX)).expect("64 bits were kept")
    }
}

/// Whether KVM takes these frequencies for the same, and lets the guest read the host's counter unscaled (its parameter
/// `tsc_tolerance_ppm`): two hosts of one model differ by as much, and a guest's own clock discipline absorbs it.
pub(crate) fn is_same_khz(guest: u32, host: u32) -> bool {
    u64::from(guest.abs_diff(host)) <= u64::from(host) * 250 / 1_000_000
}

fn difference(a: u64, b: u64) -> i64 {
    i64::try_from(i128::from(a) - i128::from(b)).unwrap_or(if a > b { i64::MAX } else { i64::MIN })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const INTEL: u32 = u32::from_le_bytes(*b"Genu");
    const AMD: u32 = u32::from_le_bytes(*b"Auth");

    fn reading(clock_ns: u64, realtime_ns: u64, host_tsc: u64) -> Reading {
        Reading::of(&kvm_clock_data {
            clock: clock_ns,
            flags: KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC,
            realtime: realtime_ns,
            host_tsc,
            ..Default::default()
        })
    }

    /// A host, as its processor and kernel do it: what a vCPU reads, by the multiplier that it was given.
    struct Model {
        tsc: HostTsc,
        /// Bits behind the point of its multiplier.
        fraction: u32,
        /// What its counter was when the guest booted.
        counter: u64,
    }

    impl Model {
        fn new(khz: u32, vendor: u32, up_seconds: u64) -> Self {
            let tsc = HostTsc::new(khz, vendor);
            let counter = up_seconds * u64::from(khz) * 1000;
            let fraction = if vendor == AMD { 32 } else { 48 };
            Self { tsc, fraction, counter }
        }

        fn counter(&self, seconds: u64) -> u64 {
            self.counter + seconds * u64::from(self.tsc.khz) * 1000
        }

        fn reading(&self, seconds: u64) -> Reading {
            reading(seconds * SECOND, (1_000_000 + seconds) * SECOND, self.counter(seconds))
        }

        /// A vCPU's TSC some seconds after the guest's boot.
        fn guest(&self, khz: u32, offset: u64, seconds: u64) -> u64 {
            let counter = u128::from(self.counter(seconds));
            let scaled = if khz.abs_diff(self.tsc.khz) * 4000 <= self.tsc.khz {
                counter
            } else {
                (counter * ((u128::from(khz) << self.fraction) / u128::from(self.tsc.khz))) >> self.fraction
            };
            u64::try_from(scaled & u128::from(u64::MAX))
                .unwrap()
                .wrapping_add(offset)
        }
    }

    #[test]
    fn a_guests_tsc_goes_on_between_hosts_whose_counters_differ_in_everything() {
        const YEAR: u64 = 365 * 86_400;
        for (from, to, khz) in [
            // The same frequency, up for different times; then also another frequency, vendor, and a guest from a third host.
            (
                Model::new(2_600_000, INTEL, YEAR),
                Model::new(2_600_000, INTEL, 60),
                2_600_000,
            ),
            (
                Model::new(2_600_000, INTEL, 60),
                Model::new(3_100_001, AMD, YEAR),
                2_600_000,
            ),
            (
                Model::new(1_999_999, AMD, YEAR),
                Model::new(3_000_000, INTEL, YEAR),
                2_500_000,
            ),
            // So close that neither kernel scales.
            (
                Model::new(2_600_000, AMD, YEAR),
                Model::new(2_600_300, AMD, YEAR),
                2_600_100,
            ),
        ] {
            // The guest's counter was somewhere when it booted.
            let offset = 12_345_u64.wrapping_sub(from.guest(khz, 0, 0));
            let (then, saved) = (from.reading(3600), from.guest(khz, offset, 3600));
            let rate = |host: &Model| Rate {
                guest_khz: khz,
                host: host.tsc,
            };
            assert_eq!(then.guest_tsc(offset, rate(&from)), Some(saved));

            let (tsc, now) = (Tsc { value: saved, khz }, to.reading(3602));
            let offset = now.tsc_offset(tsc, &then, rate(&to)).unwrap();
            assert_eq!(to.guest(khz, offset, 3602), saved + 2 * u64::from(khz) * 1000);
            // And runs at its rate: to 250 in a million where it is not scaled, to what the multiplier holds where it is.
            let in_a_minute = to.guest(khz, offset, 3662);
            let error = tsc.error_ns(&then, in_a_minute, &to.reading(3662), &to.reading(3662));
            assert!(error.abs() <= 15_000_000, "{error} ns");
        }
    }

    #[test]
    fn the_error_of_a_counter_is_what_it_is_outside_the_time_of_its_reading() {
        let (then, from, to) = (
            reading(10 * SECOND, 0, 0),
            reading(11 * SECOND, 0, 0),
            reading(11 * SECOND + 1000, 0, 0),
        );
        let tsc = Tsc {
            value: u64::MAX - 10,
            khz: 2_000_000,
        };
        // 2 cycles a nanosecond, and round the end of its 64 bits.
        let due = 2_000_000_000 - 11;
        for (found, error) in [
            (due, 0),
            (due + 2000, 0),
            (due + 2200, 100),
            (due - 200, -100),
            (u64::MAX - 10, -1_000_000_000),
        ] {
            assert_eq!(tsc.error_ns(&then, found, &from, &to), error, "{found}");
        }
        // Whatever a record says, there is an answer.
        let strange = Tsc { value: 1 << 63, khz: 0 };
        assert_ne!(strange.error_ns(&reading(u64::MAX, 0, 0), 0, &from, &to), 0);
        let fast = Tsc {
            value: 0,
            khz: u32::MAX,
        };
        let rate = Rate {
            guest_khz: u32::MAX,
            host: HostTsc::new(1, AMD),
        };
        assert!(
            reading(0, 0, u64::MAX)
                .tsc_offset(fast, &reading(u64::MAX, 0, 0), rate)
                .is_some()
        );
    }

    #[test]
    fn the_error_of_a_clock_is_what_it_gained_on_wall_time() {
        let then = reading(5 * SECOND, 100 * SECOND, 0);
        let ahead = reading(7 * SECOND + 300, 102 * SECOND, 0).since(&then);
        assert_eq!(ahead, (Some(2_000_000_000), Some(300)));
        let stood_still = reading(5 * SECOND, 102 * SECOND, 0).since(&then);
        assert_eq!(stood_still.1, Some(-2_000_000_000));
        // This host's wall clock is behind: kvmclock is never set back.
        let behind = reading(5 * SECOND, 99 * SECOND, 0).since(&then);
        assert_eq!(behind, (Some(-1_000_000_000), Some(1_000_000_000)));
        let silent = Reading::of(&kvm_clock_data::default());
        assert_eq!(silent.since(&then), (None, None));
        let rate = Rate {
            guest_khz: 1,
            host: HostTsc::new(1, INTEL),
        };
        assert_eq!(silent.guest_tsc(1, rate), None);
    }

    #[test]
    fn an_offset_that_is_not_in_force_is_not_carried_on() {
        let khz = 1_000_000;
        assert_eq!(Tsc::at_the_clock(Some(1000), Some(9000), khz), Some(1000));
        assert_eq!(Tsc::at_the_clock(Some(1 << 50), Some(9000), khz), Some(9000));
        assert_eq!(Tsc::at_the_clock(Some(5), Some(1 << 50), khz), Some(1 << 50));
        assert_eq!(Tsc::at_the_clock(None, Some(9000), khz), Some(9000));
        assert_eq!(Tsc::at_the_clock(Some(1000), None, khz), Some(1000));
        assert_eq!(Tsc::at_the_clock(None, None, khz), None);
    }
}
