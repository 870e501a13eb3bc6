//! What the fixed hardware does, after ACPI 6.5, 4.8.

use std::fmt;
use std::sync::Arc;

use umbra_units::{Malformed, Reader, Writer};

use super::{EVENT_PORT, RESET_PORT, SLEEP_TYPE_OFF};
use crate::contract::{Device, End, Ending, Level, Restore, RestoreError, SaveError, SavedState};

const KIND: &str = "acpi-pm/0";
/// Version 1: status, enable and control register, two bytes each.
const VERSION: u32 = 1;

const RESET_OFFSET: u64 = RESET_PORT - EVENT_PORT;

/// Status and enable: the power button.
const POWER_BUTTON: u16 = 1 << 8;
/// Enable bits that a kernel may set and find set: global lock released, and the power button.
const ENABLES: u16 = 1 << 5 | POWER_BUTTON;
/// Control: ACPI mode. Always set.
const SCI_ENABLED: u16 = 1 << 0;
/// Control bits that are kept: bus master reload, and the sleep type.
const KEPT: u16 = 1 << 1 | SLEEP_TYPE;
const SLEEP_TYPE: u16 = 7 << SLEEP_TYPE_SHIFT;
const SLEEP_TYPE_SHIFT: u16 = 10;
/// Control: go to sleep. Reads as zero.
const SLEEP: u16 = 1 << 13;
/// Reset control: reset the processor.
const RESET_CPU: u8 = 1 << 2;

/// What the fixed hardware is connected to.
#[derive(Clone)]
pub struct Wiring {
    /// Who hears that the guest is off, or wants a reset.
    pub ending: Arc<dyn Ending>,
    /// The system control interrupt.
    pub sci: Arc<dyn Level>,
}

/// The fixed hardware.
pub struct AcpiPm {
    wiring: Wiring,
    working: bool,
    status: u16,
    enable: u16,
    /// Never [`SLEEP`]; always [`SCI_ENABLED`].
    control: u16,
}

impl AcpiPm {
    /// The hardware at power-on, paused.
    pub const fn new(wiring: Wiring) -> Self {
        Self {
            wiring,
            working: false,
            status: 0,
            enable: 0,
            control: SCI_ENABLED,
        }
    }

    /// Somebody presses the power button. Says whether the guest listens: a kernel that does not know ACPI, or has not
    /// come to its driver yet, finds the press in the status register if it ever looks.
    pub fn press(&mut self) -> bool {
        self.status |= POWER_BUTTON;
        self.signal();
        self.enable & POWER_BUTTON != 0
    }

    /// Have the interrupt line show whether there is something to be told.
    fn signal(&self) {
        if self.working {
            self.wiring.sci.set(self.status & self.enable != 0);
        }
    }

    fn registers(&self) -> [u8; 6] {
        let [s0, s1] = self.status.to_le_bytes();
        let [e0, e1] = self.enable.to_le_bytes();
        let [c0, c1] = self.control.to_le_bytes();
        [s0, s1, e0, e1, c0, c1]
    }

    /// Write one byte of the registers.
    fn put(&mut self, offset: u64, byte: u8) {
        let high = offset % 2 == 1;
        let (value, mask) = if high {
            (u16::from(byte) << 8, 0xff00)
        } else {
            (u16::from(byte), 0x00ff)
        };
        match offset {
            // Writing a one to a status bit clears it.
            0 | 1 => self.status &= !value,
            2 | 3 => self.enable = (self.enable & !mask | value) & ENABLES,
            4 | 5 => {
                self.control = (self.control & !mask | value) & KEPT | SCI_ENABLED;
                let sleep_type = (self.control & SLEEP_TYPE) >> SLEEP_TYPE_SHIFT;
                if value & SLEEP != 0 && sleep_type == u16::from(SLEEP_TYPE_OFF) {
                    self.wiring.ending.end(End::PowerOff);
                }
            }
            RESET_OFFSET if byte & RESET_CPU != 0 => self.wiring.ending.end(End::Reset),
            _ => {}
        }
    }
}

impl Device for AcpiPm {
    fn kind(&self) -> &str {
        KIND
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let registers = self.registers();
        for (at, byte) in (offset..=u64::MAX).zip(data) {
            let register = usize::try_from(at).ok().and_then(|at| registers.get(at));
            *byte = register.copied().unwrap_or(0);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset..=u64::MAX).zip(data) {
            self.put(at, *byte);
        }
        self.signal();
    }

    fn reset(&mut self) {
        let working = self.working;
        *self = Self::new(self.wiring.clone());
        self.working = working;
        self.signal();
    }

    fn pause(&mut self) {
        self.working = false;
    }

    fn resume(&mut self) {
        self.working = true;
        self.signal();
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        let mut w = Writer::new();
        w.u16(self.status).u16(self.enable).u16(self.control);
        Ok(SavedState {
            kind: KIND.to_owned(),
            version: VERSION,
            bytes: w.into_bytes(),
        })
    }
}

impl Restore for AcpiPm {
    type Wiring = Wiring;

    fn restore(saved: &SavedState, wiring: Wiring) -> Result<Self, RestoreError> {
        let bytes = saved.expect(KIND, VERSION)?;
        let (status, enable, control) = decode(bytes).map_err(RestoreError::malformed(KIND))?;
        Ok(Self {
            status,
            enable,
            control,
            ..Self::new(wiring)
        })
    }
}

fn decode(bytes: &[u8]) -> Result<(u16, u16, u16), Malformed> {
    let mut r = Reader::new(bytes);
    let mut register = |what, possible: u16| match r.u16(what)? {
        value if value & !possible == 0 => Ok(value),
        _ => Err(r.malformed(what)),
    };
    let registers = (
        register("status", POWER_BUTTON)?,
        register("enable", ENABLES)?,
        register("control", KEPT | SCI_ENABLED)?,
    );
    r.finish("end of ACPI fixed hardware")?;
    Ok(registers)
}

impl fmt::Debug for AcpiPm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "AcpiPm(status {:#x}, enable {:#x}, control {:#x})",
            self.status, self.enable, self.control
        )
    }
}

impl fmt::Debug for Wiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wiring(acpi-pm/0)")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::contract::contract_tests;

    /// Remembers what the guest wanted, and where the line is.
    #[derive(Default)]
    struct World(Mutex<(Vec<End>, bool)>);

    impl Ending for World {
        fn end(&self, why: End) {
            self.0.lock().unwrap().0.push(why);
        }
    }

    impl Level for World {
        fn set(&self, high: bool) {
            self.0.lock().unwrap().1 = high;
        }
    }

    impl World {
        fn ends(&self) -> Vec<End> {
            self.0.lock().unwrap().0.clone()
        }

        fn line(&self) -> bool {
            self.0.lock().unwrap().1
        }
    }

    fn device() -> (AcpiPm, Arc<World>) {
        let world = Arc::new(World::default());
        let wiring = Wiring {
            ending: world.clone(),
            sci: world.clone(),
        };
        (AcpiPm::new(wiring), world)
    }

    fn wiring() -> Wiring {
        device().0.wiring
    }

    fn read16(device: &mut AcpiPm, offset: u64) -> u16 {
        let mut data = [0; 2];
        device.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    contract_tests!(
        contract,
        make: || AcpiPm::new(wiring()),
        restore: |saved| AcpiPm::restore(saved, wiring()),
        poke: |device: &mut AcpiPm| {
            device.write(2, &0x0120_u16.to_le_bytes());
            device.write(4, &0x1403_u16.to_le_bytes());
            device.press();
        }
    );

    #[test]
    fn a_pressed_button_interrupts_until_the_guest_has_seen_it() {
        let (mut device, world) = device();
        device.resume();
        assert!(!device.press() && !world.line(), "nobody listens yet");
        device.write(2, &POWER_BUTTON.to_le_bytes());
        assert!(
            world.line(),
            "what was pressed before is told as soon as somebody listens"
        );
        assert_eq!(read16(&mut device, 0), POWER_BUTTON);
        device.write(0, &POWER_BUTTON.to_le_bytes());
        assert!(!world.line() && read16(&mut device, 0) == 0);
        assert!(device.press() && world.line());
    }

    #[test]
    fn a_button_pressed_while_paused_interrupts_when_the_guest_goes_on() {
        let (mut device, world) = device();
        device.resume();
        device.write(2, &POWER_BUTTON.to_le_bytes());
        device.pause();
        assert!(device.press() && !world.line());
        let (_, there) = self::device();
        let wiring = Wiring {
            ending: there.clone(),
            sci: there.clone(),
        };
        let mut twin = AcpiPm::restore(&device.save().unwrap(), wiring).unwrap();
        assert!(!there.line());
        twin.resume();
        assert!(there.line());
    }

    #[test]
    fn only_the_sleep_that_is_soft_off_powers_off_in_one_write_or_in_two() {
        let (mut device, world) = device();
        device.resume();
        let control = |sleep_type: u16, more: u16| (sleep_type << SLEEP_TYPE_SHIFT | more).to_le_bytes();
        device.write(4, &control(5, 0));
        device.write(4, &control(1, SLEEP));
        assert!(world.ends().is_empty());
        device.write(4, &control(5, SLEEP));
        assert_eq!(world.ends(), [End::PowerOff]);
        device.write(5, &[control(5, SLEEP)[1]]);
        assert_eq!(world.ends().len(), 2);
        assert_eq!(read16(&mut device, 4), SCI_ENABLED | 5 << SLEEP_TYPE_SHIFT);
    }

    #[test]
    fn the_reset_register_resets() {
        let (mut device, world) = device();
        device.resume();
        device.write(RESET_OFFSET, &[0x02]);
        assert!(world.ends().is_empty(), "that only chooses what kind of reset");
        device.write(RESET_OFFSET, &[super::super::RESET_VALUE]);
        assert_eq!(world.ends(), [End::Reset]);
    }
}
