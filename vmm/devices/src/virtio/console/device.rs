//! What the console does.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use umbra_units::{Malformed, Now, Reader, Writer};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::{QUEUE_SIZE, RECEIVE, TRANSMIT};
use crate::contract::Out;
use crate::limits::{CONSOLE_BYTES_PER_CHAIN, CONSOLE_INPUT_BYTES};
use crate::virtio::{Cause, Chain, Rings, Virtio, Wake, bit};

/// What a console is, and what it is connected to.
#[derive(Clone)]
pub struct Wiring {
    /// Which console this is, the `0` in `console/0`.
    pub index: u32,
    /// Where the guest's text goes.
    pub out: Arc<dyn Out>,
}

/// A console.
pub struct Console {
    kind: String,
    wiring: Wiring,
    /// Columns and rows.
    size: (u16, u16),
    /// Keys the guest has no buffers for yet. At most [`CONSOLE_INPUT_BYTES`].
    waiting: VecDeque<u8>,
}

// Feature bits (virtio 1.2, Console Device, Feature bits).
const F_SIZE: u32 = 0;
const F_EMERG_WRITE: u32 = 2;

/// `emerg_wr` of the configuration.
const EMERGENCY: u64 = 8;

impl Console {
    /// Somebody types. Takes what there is room for and says how much that was.
    pub fn input(&mut self, bytes: &[u8], rings: &mut Rings) -> usize {
        let taken = bytes.len().min(CONSOLE_INPUT_BYTES - self.waiting.len());
        self.waiting.extend(&bytes[..taken]);
        self.receive(rings);
        taken
    }

    /// The terminal has another size.
    pub fn resize(&mut self, columns: u16, rows: u16, rings: &mut Rings) {
        if self.size != (columns, rows) {
            self.size = (columns, rows);
            rings.config_changed();
        }
    }

    /// Columns and rows, as the guest sees them.
    pub const fn size(&self) -> (u16, u16) {
        self.size
    }

    fn receive(&mut self, rings: &mut Rings) {
        while !self.waiting.is_empty()
            && let Some(mut chain) = rings.pop(RECEIVE)
        {
            let room = usize::try_from(chain.writable.bytes()).unwrap_or(usize::MAX);
            let keys: Vec<u8> = self.waiting.iter().copied().take(room).collect();
            let written = chain.writable.write(rings.ram(), &keys).map_or(0, |()| keys.len());
            // Keys that met a buffer outside of memory wait for a better one.
            self.waiting.drain(..written);
            rings.push(chain.token(), u32::try_from(written).expect("keys are few"));
        }
    }

    fn transmit(&self, rings: &mut Rings) {
        while let Some(mut chain) = rings.pop(TRANSMIT) {
            self.put(&mut chain, rings);
            rings.push(chain.token(), 0);
        }
    }

    /// Text of one chain. What is beyond the bound is lost, as on a terminal that is too slow.
    fn put(&self, chain: &mut Chain, rings: &Rings) {
        let bytes = usize::try_from(chain.readable.bytes()).unwrap_or(usize::MAX);
        let mut text = vec![0; bytes.min(CONSOLE_BYTES_PER_CHAIN)];
        if chain.readable.read(rings.ram(), &mut text).is_ok() && !text.is_empty() {
            self.wiring.out.put(&text);
        }
    }

    pub(super) const fn parts(&self) -> ((u16, u16), &VecDeque<u8>) {
        (self.size, &self.waiting)
    }

    pub(super) fn take_up(&mut self, size: (u16, u16), waiting: VecDeque<u8>) {
        self.size = size;
        self.waiting = waiting;
    }
}

impl Virtio for Console {
    const ID: u32 = VIRTIO_ID_CONSOLE;
    const VERSION: u32 = super::state::VERSION;
    type Wiring = Wiring;

    fn new(wiring: Wiring) -> Self {
        Self {
            kind: format!("console/{}", wiring.index),
            wiring,
            size: (80, 25),
            waiting: VecDeque::new(),
        }
    }

    fn kind(&self) -> &str {
        &self.kind
    }

    fn queues(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        bit(F_SIZE) | bit(F_EMERG_WRITE)
    }

    /// `struct virtio_console_config` (virtio 1.2, Console Device, Device configuration layout).
    fn config(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u16(self.size.0).u16(self.size.1).u32(1).u32(0);
        w.into_bytes()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // The character is in the low byte (virtio 1.2, Console Device, Device Initialization).
        if let (EMERGENCY, Some(byte)) = (offset, data.first()) {
            self.wiring.out.put(&[*byte]);
        }
    }

    fn work(&mut self, _now: Now, cause: Cause, rings: &mut Rings) -> Wake {
        match cause {
            Cause::Notified(TRANSMIT) => self.transmit(rings),
            Cause::Notified(_) | Cause::World => self.receive(rings),
        }
        Wake::Idle
    }

    fn reset(&mut self) {
        // The terminal is as large as it was. What was typed for another driver is not for the next.
        self.waiting.clear();
    }

    fn save(&self, w: &mut Writer) {
        super::state::write(self, w);
    }

    fn load(&mut self, r: &mut Reader<'_>) -> Result<(), Malformed> {
        super::state::read(self, r)
    }
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Console({}, {} bytes waiting)", self.kind, self.waiting.len())
    }
}

impl fmt::Debug for Wiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wiring(console/{})", self.index)
    }
}
