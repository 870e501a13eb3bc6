//! What the clock does, after the MC146818A data sheet.

use std::fmt;
use std::sync::Arc;

use umbra_units::{Malformed, Reader, Writer};

use crate::contract::{Device, Restore, RestoreError, SaveError, SavedState};
use crate::limits::CMOS_BYTES;

const KIND: &str = "rtc/0";
/// Version 1: the index, then [`CMOS_BYTES`] bytes of memory.
const VERSION: u32 = 1;

const SECONDS: usize = 0x00;
const MINUTES: usize = 0x02;
const HOURS: usize = 0x04;
const WEEKDAY: usize = 0x06;
const DAY: usize = 0x07;
const MONTH: usize = 0x08;
const YEAR: usize = 0x09;
const STATUS_A: usize = 0x0a;
const STATUS_B: usize = 0x0b;
const STATUS_C: usize = 0x0c;
const STATUS_D: usize = 0x0d;
/// Where a PC's firmware keeps the century (and Linux looks for it when ACPI says so).
const CENTURY: usize = 0x32;

/// 32.768 kHz time base, the rate every BIOS leaves; never "update in progress".
const STATUS_A_VALUE: u8 = 0x26;
/// 24-hour mode, BCD, no interrupts.
const STATUS_B_VALUE: u8 = 0x02;
/// The battery is good.
const STATUS_D_VALUE: u8 = 0x80;

/// The index port's top bit masks NMI; it is not part of the index.
const INDEX_MASK: u8 = 0x7f;

/// Somebody who knows what time it is.
pub trait WallClock: Send + Sync {
    /// Seconds since 1970-01-01 00:00 UTC.
    fn unix_seconds(&self) -> u64;
}

/// What a clock is connected to.
#[derive(Clone)]
pub struct Wiring {
    /// The time to show.
    pub clock: Arc<dyn WallClock>,
}

/// The clock and its memory.
pub struct Rtc {
    wiring: Wiring,
    /// Always at most [`INDEX_MASK`].
    index: u8,
    memory: [u8; CMOS_BYTES],
}

impl Rtc {
    /// A clock at power-on, its memory empty.
    pub const fn new(wiring: Wiring) -> Self {
        Self {
            wiring,
            index: 0,
            memory: [0; CMOS_BYTES],
        }
    }

    fn register(&self) -> u8 {
        let register = usize::from(self.index);
        let date = || Date::of(self.wiring.clock.unix_seconds());
        match register {
            SECONDS => bcd(date().second),
            MINUTES => bcd(date().minute),
            HOURS => bcd(date().hour),
            WEEKDAY => bcd(date().weekday),
            DAY => bcd(date().day),
            MONTH => bcd(date().month),
            YEAR => bcd(date().year % 100),
            CENTURY => bcd(date().year / 100 % 100),
            STATUS_A => STATUS_A_VALUE,
            STATUS_B => STATUS_B_VALUE,
            STATUS_C => 0,
            STATUS_D => STATUS_D_VALUE,
            memory => self.memory[memory],
        }
    }
}

impl Device for Rtc {
    fn kind(&self) -> &str {
        KIND
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (1, Some(first)) = (offset, data.first_mut()) {
            *first = self.register();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, [index, value, ..]) => {
                // A 16-bit write to the index port reaches the data port too.
                self.index = index & INDEX_MASK;
                self.memory[usize::from(self.index)] = *value;
            }
            (0, [index]) => self.index = index & INDEX_MASK,
            (1, [value, ..]) => self.memory[usize::from(self.index)] = *value,
            _ => {}
        }
    }

    fn reset(&mut self) {
        *self = Self::new(self.wiring.clone());
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}

    fn save(&self) -> Result<SavedState, SaveError> {
        let mut w = Writer::new();
        w.u8(self.index).put(&self.memory);
        Ok(SavedState {
            kind: KIND.to_owned(),
            version: VERSION,
            bytes: w.into_bytes(),
        })
    }
}

impl Restore for Rtc {
    type Wiring = Wiring;

    fn restore(saved: &SavedState, wiring: Wiring) -> Result<Self, RestoreError> {
        let (index, memory) = decode(saved.expect(KIND, VERSION)?).map_err(RestoreError::malformed(KIND))?;
        Ok(Self { wiring, index, memory })
    }
}

fn decode(bytes: &[u8]) -> Result<(u8, [u8; CMOS_BYTES]), Malformed> {
    let mut r = Reader::new(bytes);
    let index = r.u8("index")?;
    if index > INDEX_MASK {
        return Err(Malformed { what: "index", at: 0 });
    }
    let memory = r.array("memory")?;
    r.finish("end of rtc state")?;
    Ok((index, memory))
}

struct Date {
    year: u64,
    month: u64,
    day: u64,
    weekday: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Date {
    /// The civil date of a number of seconds since 1970 (the days-to-civil algorithm over 400-year eras, whose years
    /// begin in March so that the leap day comes last).
    const fn of(unix_seconds: u64) -> Self {
        let (days, second_of_day) = (unix_seconds / 86_400, unix_seconds % 86_400);
        let since_march_of_year_0 = days + 719_468;
        let era = since_march_of_year_0 / 146_097;
        let day_of_era = since_march_of_year_0 % 146_097;
        let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 {
            month_from_march + 3
        } else {
            month_from_march - 9
        };
        Self {
            year: year_of_era + era * 400 + (month <= 2) as u64,
            month,
            day: day_of_year - (153 * month_from_march + 2) / 5 + 1,
            // 1970-01-01 was a Thursday; the register counts Sunday as 1.
            weekday: (days + 4) % 7 + 1,
            hour: second_of_day / 3_600,
            minute: second_of_day / 60 % 60,
            second: second_of_day % 60,
        }
    }
}

/// Two decimal digits, one in each half of the byte.
fn bcd(value: u64) -> u8 {
    u8::try_from(value / 10 % 10 * 16 + value % 10).expect("two decimal digits fit in a byte")
}

impl fmt::Debug for Rtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rtc(index {:#x})", self.index)
    }
}

impl fmt::Debug for Wiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wiring(rtc/0)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::contract_tests;

    struct At(u64);

    impl WallClock for At {
        fn unix_seconds(&self) -> u64 {
            self.0
        }
    }

    fn at(seconds: u64) -> Wiring {
        Wiring {
            clock: Arc::new(At(seconds)),
        }
    }

    fn read(rtc: &mut Rtc, register: usize) -> u8 {
        rtc.write(0, &[u8::try_from(register).unwrap()]);
        let mut data = [0];
        rtc.read(1, &mut data);
        data[0]
    }

    contract_tests!(
        contract,
        make: || Rtc::new(at(0)),
        restore: |saved| Rtc::restore(saved, at(1)),
        poke: |device: &mut Rtc| device.write(0, &[0x40, 0x99])
    );

    #[test]
    fn the_clock_shows_the_date_in_decimal_digits() {
        // 2024-02-29 23:59:58 UTC, a Thursday.
        let mut rtc = Rtc::new(at(1_709_251_198));
        let date =
            [YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS, CENTURY].map(|register| read(&mut rtc, register));
        assert_eq!(date, [0x24, 0x02, 0x29, 0x05, 0x23, 0x59, 0x58, 0x20]);
        let mut epoch = Rtc::new(at(0));
        assert_eq!(
            [YEAR, MONTH, DAY].map(|register| read(&mut epoch, register)),
            [0x70, 0x01, 0x01]
        );
    }

    #[test]
    fn memory_beside_the_clock_is_kept_and_the_clock_cannot_be_written() {
        let mut rtc = Rtc::new(at(1_709_251_198));
        rtc.write(0, &[0x50]);
        rtc.write(1, &[0xab]);
        assert_eq!(read(&mut rtc, 0x50), 0xab);
        rtc.write(0, &[9, 0x99]);
        assert_eq!(read(&mut rtc, YEAR), 0x24);
    }
}
