//! What the keyboard controller does, after the IBM PS/2 Technical Reference, "Keyboard and Auxiliary Device Controller".

use std::fmt;
use std::sync::Arc;

use umbra_units::{Malformed, Reader, Writer};

use super::{COMMAND_PORT, DATA_PORT};
use crate::contract::{Device, End, Ending, Restore, RestoreError, SaveError, SavedState};

const KIND: &str = "i8042/0";
/// Version 1: control byte; answer (flag, byte); command awaiting its data (flag, byte).
const VERSION: u32 = 1;

const COMMAND_OFFSET: u64 = COMMAND_PORT - DATA_PORT;

/// Status: the output buffer holds a byte for the guest.
const STATUS_OUTPUT_FULL: u8 = 0x01;
/// Status: the self test has passed.
const STATUS_SYSTEM: u8 = 0x04;
/// Status: the keyboard is not locked.
const STATUS_UNLOCKED: u8 = 0x10;

const READ_CONTROL: u8 = 0x20;
const WRITE_CONTROL: u8 = 0x60;
const TEST_AUX: u8 = 0xa9;
const SELF_TEST: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const READ_OUTPUT_PORT: u8 = 0xd0;
const WRITE_OUTPUT_PORT: u8 = 0xd1;
const WRITE_KEYBOARD_OUTPUT: u8 = 0xd2;
const WRITE_AUX_OUTPUT: u8 = 0xd3;
const WRITE_AUX: u8 = 0xd4;
const RESET: u8 = 0xfe;

/// Output port: A20 open, the reset line not pulled (it is active low).
const OUTPUT_PORT: u8 = 0x03;
const OUTPUT_PORT_NOT_RESET: u8 = 0x01;

/// Control byte at power-on: self test passed, keyboard and mouse clocks off.
const CONTROL_AT_POWER_ON: u8 = 0x34;

/// What a keyboard controller is connected to.
#[derive(Clone)]
pub struct Wiring {
    /// Who hears the reset line.
    pub ending: Arc<dyn Ending>,
}

/// The keyboard controller.
pub struct I8042 {
    wiring: Wiring,
    control: u8,
    /// The output buffer: what the guest reads next.
    answer: Option<u8>,
    /// A command whose data byte is still to come.
    awaiting: Option<u8>,
}

impl I8042 {
    /// A controller at power-on.
    pub const fn new(wiring: Wiring) -> Self {
        Self {
            wiring,
            control: CONTROL_AT_POWER_ON,
            answer: None,
            awaiting: None,
        }
    }

    fn command(&mut self, command: u8) {
        self.awaiting = None;
        match command {
            READ_CONTROL => self.answer = Some(self.control),
            SELF_TEST => self.answer = Some(0x55),
            TEST_KEYBOARD | TEST_AUX => self.answer = Some(0),
            READ_OUTPUT_PORT => self.answer = Some(OUTPUT_PORT),
            WRITE_CONTROL | WRITE_OUTPUT_PORT | WRITE_KEYBOARD_OUTPUT | WRITE_AUX_OUTPUT | WRITE_AUX => {
                self.awaiting = Some(command);
            }
            RESET => self.wiring.ending.end(End::Reset),
            _ => {}
        }
    }

    fn data(&mut self, byte: u8) {
        match self.awaiting.take() {
            Some(WRITE_CONTROL) => self.control = byte,
            Some(WRITE_OUTPUT_PORT) if byte & OUTPUT_PORT_NOT_RESET == 0 => self.wiring.ending.end(End::Reset),
            Some(WRITE_KEYBOARD_OUTPUT | WRITE_AUX_OUTPUT) => self.answer = Some(byte),
            // For a keyboard or mouse that is not there.
            _ => {}
        }
    }
}

impl Device for I8042 {
    fn kind(&self) -> &str {
        KIND
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(first) = data.first_mut() {
            *first = match offset {
                COMMAND_OFFSET => {
                    STATUS_SYSTEM | STATUS_UNLOCKED | if self.answer.is_some() { STATUS_OUTPUT_FULL } else { 0 }
                }
                0 => self.answer.take().unwrap_or(0),
                _ => 0xff,
            };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data.first()) {
            (COMMAND_OFFSET, Some(byte)) => self.command(*byte),
            (0, Some(byte)) => self.data(*byte),
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
        w.u8(self.control);
        for byte in [self.answer, self.awaiting] {
            w.u8(u8::from(byte.is_some())).u8(byte.unwrap_or(0));
        }
        Ok(SavedState {
            kind: KIND.to_owned(),
            version: VERSION,
            bytes: w.into_bytes(),
        })
    }
}

impl Restore for I8042 {
    type Wiring = Wiring;

    fn restore(saved: &SavedState, wiring: Wiring) -> Result<Self, RestoreError> {
        let bytes = saved.expect(KIND, VERSION)?;
        let (control, answer, awaiting) = decode(bytes).map_err(RestoreError::malformed(KIND))?;
        Ok(Self {
            wiring,
            control,
            answer,
            awaiting,
        })
    }
}

type Registers = (u8, Option<u8>, Option<u8>);

fn decode(bytes: &[u8]) -> Result<Registers, Malformed> {
    let mut r = Reader::new(bytes);
    let control = r.u8("control byte")?;
    let mut optional = |what| match (r.u8(what)?, r.u8(what)?) {
        (0, 0) => Ok(None),
        (1, byte) => Ok(Some(byte)),
        _ => Err(r.malformed(what)),
    };
    let registers = (control, optional("answer")?, optional("awaited command")?);
    r.finish("end of i8042 state")?;
    Ok(registers)
}

impl fmt::Debug for I8042 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "I8042(control {:#x}, answer {:?}, awaiting {:?})",
            self.control, self.answer, self.awaiting
        )
    }
}

impl fmt::Debug for Wiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wiring(i8042/0)")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::contract::contract_tests;

    #[derive(Default)]
    struct Resets(AtomicUsize);

    impl Ending for Resets {
        fn end(&self, why: End) {
            assert_eq!(why, End::Reset);
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn wiring() -> Wiring {
        Wiring {
            ending: Arc::new(Resets::default()),
        }
    }

    fn read(device: &mut I8042, offset: u64) -> u8 {
        let mut data = [0];
        device.read(offset, &mut data);
        data[0]
    }

    contract_tests!(
        contract,
        make: || I8042::new(wiring()),
        restore: |saved| I8042::restore(saved, wiring()),
        poke: |device: &mut I8042| {
            device.write(4, &[WRITE_CONTROL]);
            device.write(0, &[0x77]);
            device.write(4, &[SELF_TEST]);
            device.write(4, &[WRITE_AUX]);
        }
    );

    #[test]
    fn both_ways_to_pull_the_reset_line_reset() {
        let resets = Arc::new(Resets::default());
        let mut device = I8042::new(Wiring { ending: resets.clone() });
        device.write(4, &[RESET]);
        assert_eq!(resets.0.load(Ordering::Relaxed), 1);
        device.write(4, &[WRITE_OUTPUT_PORT]);
        device.write(0, &[0xfe]);
        assert_eq!(resets.0.load(Ordering::Relaxed), 2);
        device.write(0, &[0xfe]);
        assert_eq!(
            resets.0.load(Ordering::Relaxed),
            2,
            "data for an absent keyboard resets nothing"
        );
    }

    #[test]
    fn a_driver_looking_for_a_controller_finds_a_healthy_one() {
        let mut device = I8042::new(wiring());
        assert_eq!(read(&mut device, 4) & STATUS_OUTPUT_FULL, 0);
        device.write(4, &[SELF_TEST]);
        assert_eq!(read(&mut device, 4) & STATUS_OUTPUT_FULL, STATUS_OUTPUT_FULL);
        assert_eq!(read(&mut device, 0), 0x55);
        assert_eq!(read(&mut device, 4) & STATUS_OUTPUT_FULL, 0);
        device.write(4, &[WRITE_CONTROL]);
        device.write(0, &[0x47]);
        device.write(4, &[READ_CONTROL]);
        assert_eq!(read(&mut device, 0), 0x47);
    }
}
