//! What the generation counter does.

use std::fmt;
use std::sync::Arc;

use umbra_units::{Gpa, Malformed, Reader, Writer};
use vm_memory::{Bytes as _, GuestAddress};

use super::BYTES;
use crate::contract::{Device, Line, Restore, RestoreError, SaveError, SavedState};
use crate::virtio::Ram;
use crate::virtio::rng::Entropy;

/// What the counter is connected to.
#[derive(Clone)]
pub struct Wiring {
    /// Guest memory.
    pub ram: Ram,
    /// Where the bytes are in it: at a multiple of [`ALIGNMENT`](super::ALIGNMENT).
    pub at: Gpa,
    /// Where generations come from.
    pub entropy: Arc<dyn Entropy>,
    /// The interrupt of the event that ACPI connects with the counter.
    pub line: Arc<dyn Line>,
}

/// The counter. It answers at no address: the guest reads its memory.
pub struct Generation {
    wiring: Wiring,
    id: [u8; BYTES],
    /// The guest has not been told of this generation.
    untold: bool,
    paused: bool,
}

const KIND: &str = "generation/0";
const VERSION: u32 = 1;

impl Generation {
    /// The counter at power-on, in its first generation. Nothing is in guest memory until it is resumed.
    pub fn new(wiring: Wiring) -> Self {
        let mut id = [0; BYTES];
        wiring.entropy.fill(&mut id);
        Self {
            wiring,
            id,
            untold: false,
            paused: true,
        }
    }

    /// The guest may have become two: a new generation. The guest is told, at once or when it goes on.
    pub fn renew(&mut self) {
        self.wiring.entropy.fill(&mut self.id);
        self.untold = true;
        self.show();
    }

    /// The generation.
    pub const fn id(&self) -> [u8; BYTES] {
        self.id
    }

    /// Put the generation into memory and then say so, unless paused.
    fn show(&mut self) {
        if self.paused {
            return;
        }
        let at = GuestAddress(self.wiring.at.0);
        let mut there = [0; BYTES];
        let known = self.wiring.ram.read_slice(&mut there, at).is_ok() && there == self.id;
        if !known {
            self.wiring
                .ram
                .write_slice(&self.id, at)
                .expect("whoever builds the machine puts the counter into memory");
        }
        if std::mem::take(&mut self.untold) {
            self.wiring.line.pulse();
        }
    }
}

impl Device for Generation {
    fn kind(&self) -> &str {
        KIND
    }

    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {}

    fn reset(&mut self) {
        self.untold = false;
        // A guest that starts anew finds its memory as the loader left it.
        self.show();
    }

    fn pause(&mut self) {
        self.paused = true;
    }

    fn resume(&mut self) {
        self.paused = false;
        self.show();
    }

    /// Version 1: the 16 bytes, and a byte that says whether the guest has still to be told.
    fn save(&self) -> Result<SavedState, SaveError> {
        let mut w = Writer::new();
        w.put(&self.id).u8(self.untold.into());
        Ok(SavedState {
            kind: KIND.to_owned(),
            version: VERSION,
            bytes: w.into_bytes(),
        })
    }
}

impl Restore for Generation {
    type Wiring = Wiring;

    fn restore(saved: &SavedState, wiring: Wiring) -> Result<Self, RestoreError> {
        let (id, untold) = read(saved.expect(KIND, VERSION)?).map_err(RestoreError::malformed(KIND))?;
        Ok(Self {
            wiring,
            id,
            untold,
            paused: true,
        })
    }
}

fn read(bytes: &[u8]) -> Result<([u8; BYTES], bool), Malformed> {
    let mut r = Reader::new(bytes);
    let id = r.array("generation")?;
    let untold = match r.u8("generation untold")? {
        0 => false,
        1 => true,
        _ => return Err(r.malformed("generation untold")),
    };
    r.finish("end of generation state")?;
    Ok((id, untold))
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Generation({:x?})", self.id)
    }
}

impl fmt::Debug for Wiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wiring({KIND} at {:?})", self.at)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

    use super::*;
    use crate::contract::contract_tests;

    #[derive(Default)]
    struct World {
        drawn: AtomicU8,
        pulses: AtomicUsize,
    }

    impl Entropy for World {
        fn fill(&self, out: &mut [u8]) {
            out.fill(self.drawn.fetch_add(1, Ordering::Relaxed) + 1);
        }
    }

    impl Line for World {
        fn pulse(&self) {
            self.pulses.fetch_add(1, Ordering::Relaxed);
        }
    }

    const AT: Gpa = Gpa(0xff0);

    fn wiring(world: &Arc<World>, ram: &Ram) -> Wiring {
        Wiring {
            ram: ram.clone(),
            at: AT,
            entropy: world.clone(),
            line: world.clone(),
        }
    }

    fn ram() -> Ram {
        Ram::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap()
    }

    fn there(ram: &Ram) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        ram.read_slice(&mut bytes, GuestAddress(AT.0)).unwrap();
        bytes
    }

    fn alone() -> Wiring {
        wiring(&Arc::new(World::default()), &ram())
    }

    fn same() -> Generation {
        Generation::restore(&Generation::new(alone()).save().unwrap(), alone()).unwrap()
    }

    // A reset does not change the generation, and so the state of a renewed one is not that at power-on: what changes is
    // only whether the guest has been told.
    contract_tests!(
        contract,
        make: same,
        restore: |saved| Generation::restore(saved, alone()),
        poke: |generation: &mut Generation| {
            generation.pause();
            generation.untold = true;
        }
    );

    #[test]
    fn the_generation_is_in_memory_when_the_guest_runs_and_not_before() {
        let (world, ram) = (Arc::new(World::default()), ram());
        let mut generation = Generation::new(wiring(&world, &ram));
        assert_eq!(there(&ram), [0; BYTES]);
        generation.resume();
        assert_eq!((there(&ram), world.pulses.load(Ordering::Relaxed)), ([1; BYTES], 0));
    }

    #[test]
    fn a_planned_move_keeps_the_generation_and_interrupts_nobody() {
        let (world, memory) = (Arc::new(World::default()), ram());
        let mut generation = Generation::new(wiring(&world, &memory));
        generation.resume();
        generation.pause();
        let there_memory = ram();
        let mut twin = Generation::restore(&generation.save().unwrap(), wiring(&world, &there_memory)).unwrap();
        twin.resume();
        assert_eq!((twin.id(), there(&there_memory)), ([1; BYTES], [1; BYTES]));
        assert_eq!(world.pulses.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_guest_restored_from_a_snapshot_finds_another_generation_and_is_told_once() {
        let (world, ram) = (Arc::new(World::default()), ram());
        let saved = Generation::new(wiring(&world, &ram)).save().unwrap();
        let mut restored = Generation::restore(&saved, wiring(&world, &ram)).unwrap();
        restored.renew();
        assert_eq!(world.pulses.load(Ordering::Relaxed), 0, "a paused device is silent");
        // Also when it is saved once more before it ran.
        let mut restored = Generation::restore(&restored.save().unwrap(), wiring(&world, &ram)).unwrap();
        restored.resume();
        restored.pause();
        restored.resume();
        assert_eq!((there(&ram), world.pulses.load(Ordering::Relaxed)), ([2; BYTES], 1));
    }

    #[test]
    fn a_write_to_memory_is_marked_and_nothing_is_written_twice() {
        use vm_memory::GuestMemoryBackend as _;
        let (world, ram) = (Arc::new(World::default()), ram());
        let mut generation = Generation::new(wiring(&world, &ram));
        let marked = || {
            let region = ram.iter().next().unwrap().get_mmap();
            let bits = region.bitmap().take_words();
            bits[0]
        };
        marked();
        generation.resume();
        assert_eq!(marked(), 1);
        generation.pause();
        generation.resume();
        assert_eq!(marked(), 0);
    }
}
