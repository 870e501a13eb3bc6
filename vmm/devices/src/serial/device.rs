//! What the serial port does.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, SerialState};

use super::REGISTERS;
use crate::contract::{Device, Line, Out, Restore, RestoreError, SaveError, SavedState};
use crate::limits::SERIAL_INPUT_BYTES;

/// What a serial port is connected to.
#[derive(Clone)]
pub struct Wiring {
    /// Which serial port this is, the `0` in `serial/0`.
    pub index: u32,
    /// Where the guest's output goes.
    pub out: Arc<dyn Out>,
    /// The port's interrupt.
    pub line: Arc<dyn Line>,
}

/// A 16550 and the input waiting for it.
pub struct Serial {
    kind: String,
    wiring: Wiring,
    model: Model,
    /// Input the FIFO had no room for, or that came while the device was paused. At most [`SERIAL_INPUT_BYTES`].
    waiting: VecDeque<u8>,
    paused: bool,
}

type Model = vm_superio::Serial<Interrupt, NoEvents, Sink>;

/// The line, unless the model is being built: see the [module](super) on why a restore is silent.
pub(super) struct Interrupt {
    line: Arc<dyn Line>,
    silent: Arc<AtomicBool>,
}

impl Trigger for Interrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        if !self.silent.load(Ordering::Relaxed) {
            self.line.pulse();
        }
        Ok(())
    }
}

pub(super) struct Sink(Arc<dyn Out>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.put(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Serial {
    /// A port at power-on.
    pub fn new(wiring: Wiring) -> Self {
        Self::with_state(wiring, &SerialState::default(), VecDeque::new())
    }

    pub(super) fn with_state(wiring: Wiring, state: &SerialState, waiting: VecDeque<u8>) -> Self {
        let silent = Arc::new(AtomicBool::new(true));
        let interrupt = Interrupt {
            line: wiring.line.clone(),
            silent: silent.clone(),
        };
        let model = Model::from_state(state, interrupt, NoEvents, Sink(wiring.out.clone()))
            .expect("a FIFO within its bound is accepted: decode checks it, power-on has none");
        silent.store(false, Ordering::Relaxed);
        Self {
            kind: format!("serial/{}", wiring.index),
            wiring,
            model,
            waiting,
            paused: true,
        }
    }

    /// Somebody types. Takes what there is room for and says how much that was.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(SERIAL_INPUT_BYTES - self.waiting.len());
        self.waiting.extend(&bytes[..taken]);
        self.fill_fifo();
        taken
    }

    /// Move waiting input to where the guest can read it.
    fn fill_fifo(&mut self) {
        let room = self.model.fifo_capacity().min(self.waiting.len());
        // In loopback the model drops input from the line, as a 16550 does: keep ours until the guest leaves it.
        if self.paused || room == 0 || self.model.state().modem_control & MCR_LOOP != 0 {
            return;
        }
        let bytes: Vec<u8> = self.waiting.drain(..room).collect();
        self.model
            .enqueue_raw_bytes(&bytes)
            .expect("the FIFO has room: counted above; the line cannot fail");
    }

    pub(super) fn parts(&self) -> (SerialState, &VecDeque<u8>) {
        (self.model.state(), &self.waiting)
    }
}

/// Modem control register, loopback mode.
const MCR_LOOP: u8 = 0x10;

impl Device for Serial {
    fn kind(&self) -> &str {
        &self.kind
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..=u64::MAX).zip(data.iter_mut()) {
            *byte = register_of(register).map_or(0xff, |register| self.model.read(register));
        }
        self.fill_fifo();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (register, byte) in (offset..=u64::MAX).zip(data) {
            if let Some(register) = register_of(register) {
                self.model
                    .write(register, *byte)
                    .expect("neither the sink nor the line can fail");
            }
        }
        self.fill_fifo();
    }

    fn reset(&mut self) {
        let paused = self.paused;
        *self = Self::new(self.wiring.clone());
        self.paused = paused;
    }

    fn pause(&mut self) {
        self.paused = true;
    }

    fn resume(&mut self) {
        self.paused = false;
        self.fill_fifo();
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        Ok(super::state::encode(self))
    }
}

impl Restore for Serial {
    type Wiring = Wiring;

    fn restore(saved: &SavedState, wiring: Wiring) -> Result<Self, RestoreError> {
        super::state::decode(saved, wiring)
    }
}

fn register_of(offset: u64) -> Option<u8> {
    u8::try_from(offset)
        .ok()
        .filter(|register| u64::from(*register) < REGISTERS)
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Serial({}, {} bytes waiting)", self.kind, self.waiting.len())
    }
}

impl fmt::Debug for Wiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wiring(serial/{})", self.index)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::contract::contract_tests;

    #[derive(Default)]
    struct World {
        out: Mutex<Vec<u8>>,
        pulses: AtomicUsize,
    }

    impl Out for World {
        fn put(&self, bytes: &[u8]) {
            self.out.lock().unwrap().extend_from_slice(bytes);
        }
    }

    impl Line for World {
        fn pulse(&self) {
            self.pulses.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn wiring(world: &Arc<World>) -> Wiring {
        Wiring {
            index: 0,
            out: world.clone(),
            line: world.clone(),
        }
    }

    fn lonely() -> Wiring {
        wiring(&Arc::new(World::default()))
    }

    fn read(serial: &mut Serial, register: u64) -> u8 {
        let mut data = [0];
        serial.read(register, &mut data);
        data[0]
    }

    fn poke(serial: &mut Serial) {
        serial.write(1, &[0x0f]);
        serial.write(7, &[0x42]);
        serial.input(&[7; 100]);
    }

    contract_tests!(
        contract,
        make: || Serial::new(lonely()),
        restore: |saved| Serial::restore(saved, lonely()),
        poke: poke
    );

    #[test]
    fn what_the_guest_writes_comes_out() {
        let world = Arc::new(World::default());
        let mut serial = Serial::new(wiring(&world));
        serial.resume();
        for byte in b"hello" {
            serial.write(0, &[*byte]);
        }
        assert_eq!(*world.out.lock().unwrap(), b"hello");
    }

    #[test]
    fn typed_input_reaches_the_guest_in_order_however_long_and_interrupts_it() {
        let world = Arc::new(World::default());
        let mut serial = Serial::new(wiring(&world));
        serial.resume();
        serial.write(1, &[1]);
        let line: Vec<u8> = (0..200).collect();
        assert_eq!(serial.input(&line), 200);
        assert_eq!(world.pulses.load(Ordering::Relaxed), 1);
        let read: Vec<u8> = (0..200).map(|_| read(&mut serial, 0)).collect();
        assert_eq!(read, line);
    }

    #[test]
    fn input_beyond_the_bound_is_refused_not_kept() {
        let mut serial = Serial::new(lonely());
        assert_eq!(serial.input(&vec![0; SERIAL_INPUT_BYTES + 1]), SERIAL_INPUT_BYTES);
        assert_eq!(serial.input(b"x"), 0);
    }

    #[test]
    fn a_paused_port_accepts_input_but_neither_shows_it_nor_interrupts() {
        let world = Arc::new(World::default());
        let mut serial = Serial::new(wiring(&world));
        serial.resume();
        serial.write(1, &[1]);
        serial.pause();
        serial.input(b"k");
        assert_eq!((world.pulses.load(Ordering::Relaxed), read(&mut serial, 5) & 1), (0, 0));
        serial.resume();
        assert_eq!((world.pulses.load(Ordering::Relaxed), read(&mut serial, 5) & 1), (1, 1));
    }

    #[test]
    fn unread_input_travels_and_the_restored_port_raises_no_second_interrupt() {
        let world = Arc::new(World::default());
        let mut serial = Serial::new(wiring(&world));
        serial.resume();
        serial.write(1, &[1]);
        let line = [3; 90];
        serial.input(&line);
        serial.pause();
        let there = Arc::new(World::default());
        let mut twin = Serial::restore(&serial.save().unwrap(), wiring(&there)).unwrap();
        twin.resume();
        assert_eq!(there.pulses.load(Ordering::Relaxed), 0);
        let read: Vec<u8> = (0..90).map(|_| read(&mut twin, 0)).collect();
        assert_eq!(read, line);
    }
}
