//! What the exit port does. It keeps next to nothing; that is saved all the same, so that a twin
//! without the device is noticed before the guest moves there.

use std::fmt;
use std::sync::Arc;

use umbra_units::Reader;

use crate::contract::{Device, End, Ending, Restore, RestoreError, SaveError, SavedState};

const KIND: &str = "exit/0";
/// Version 1: how many writes were seen, eight bytes.
const VERSION: u32 = 1;

/// What an exit port is connected to.
#[derive(Clone)]
pub struct Wiring {
    /// Who is told.
    pub ending: Arc<dyn Ending>,
}

/// The exit port.
pub struct ExitPort {
    wiring: Wiring,
    /// Writes so far: more than one means that something let the guest run on.
    writes: u64,
}

impl ExitPort {
    /// A port nobody has written to.
    pub const fn new(wiring: Wiring) -> Self {
        Self { wiring, writes: 0 }
    }
}

impl Device for ExitPort {
    fn kind(&self) -> &str {
        KIND
    }

    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset != 0 {
            return;
        }
        self.writes += 1;
        let code = data
            .iter()
            .take(4)
            .rev()
            .fold(0, |code, byte| code << 8 | u32::from(*byte));
        self.wiring.ending.end(End::Code(code));
    }

    fn reset(&mut self) {
        self.writes = 0;
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}

    fn save(&self) -> Result<SavedState, SaveError> {
        Ok(SavedState {
            kind: KIND.to_owned(),
            version: VERSION,
            bytes: self.writes.to_le_bytes().to_vec(),
        })
    }
}

impl Restore for ExitPort {
    type Wiring = Wiring;

    fn restore(saved: &SavedState, wiring: Wiring) -> Result<Self, RestoreError> {
        let mut r = Reader::new(saved.expect(KIND, VERSION)?);
        let writes = r.u64("writes").map_err(RestoreError::malformed(KIND))?;
        r.finish("end of exit state").map_err(RestoreError::malformed(KIND))?;
        Ok(Self { wiring, writes })
    }
}

impl fmt::Debug for ExitPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ExitPort({} writes)", self.writes)
    }
}

impl fmt::Debug for Wiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wiring(exit/0)")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::contract::contract_tests;

    #[derive(Default)]
    struct Told(Mutex<Vec<End>>);

    impl Ending for Told {
        fn end(&self, why: End) {
            self.0.lock().unwrap().push(why);
        }
    }

    fn wiring() -> Wiring {
        Wiring {
            ending: Arc::new(Told::default()),
        }
    }

    contract_tests!(
        contract,
        make: || ExitPort::new(wiring()),
        restore: |saved| ExitPort::restore(saved, wiring()),
        poke: |device: &mut ExitPort| device.write(0, &[1])
    );

    #[test]
    fn the_code_written_ends_the_guest() {
        let told = Arc::new(Told::default());
        let mut port = ExitPort::new(Wiring { ending: told.clone() });
        port.write(0, &[0x10]);
        port.write(0, &[0xad, 0xde, 0, 0]);
        port.write(1, &[3]);
        assert_eq!(*told.0.lock().unwrap(), [End::Code(0x10), End::Code(0xdead)]);
    }
}
