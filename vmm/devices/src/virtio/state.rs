//! The saved layout of a virtio device: one record, the transport's part first.
//!
//! The record's version is the transport's (below) in the upper 16 bits and the device's own ([`Virtio::VERSION`]) in the lower.
//! Transport version 1, little-endian:
//!
//! ```text
//!   u32 device features selector   u32 driver features selector   u64 driver features
//!   u32 queue selector             u32 status, NEEDS_RESET included
//!   u32 interrupt status           u32 configuration generation
//!   u32 queues, and for each:      u32 size  u8 ready  u64 descriptors  u64 available  u64 used
//!                                  u16 next available  u16 next used
//!   the device's own part, to the end
//! ```
//!
//! A record comes from a peer. Features that this host does not offer and queues that do not lie in guest memory are
//! refused here; anything else a driver could have done to the device itself, and is handled as if it had.

use umbra_units::{Malformed, Reader, Writer};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};

use super::Virtio;
use super::engine::Engine;
use super::interrupt::Interrupt;
use super::mmio::Registers;
use super::rings::{Position, Setup};
use crate::contract::{RestoreError, SaveError, SavedState};
use crate::limits::VIRTIO_QUEUES;

const TRANSPORT_VERSION: u32 = 1;

const fn version<D: Virtio>() -> u32 {
    assert!(D::VERSION <= 0xffff, "a device's version has 16 bits");
    TRANSPORT_VERSION << 16 | D::VERSION
}

pub(super) fn encode<D: Virtio>(
    kind: &str,
    registers: &Registers,
    interrupt: &Interrupt,
    engine: &Engine<D>,
) -> Result<SavedState, SaveError> {
    if engine.busy() > 0 {
        return Err(SaveError::Refused {
            kind: kind.to_owned(),
            why: format!("{} requests are not finished", engine.busy()),
        });
    }
    let needs_reset = if engine.is_broken() {
        VIRTIO_CONFIG_S_NEEDS_RESET
    } else {
        0
    };
    let mut w = Writer::new();
    w.u32(registers.device_features_sel)
        .u32(registers.driver_features_sel)
        .u64(registers.driver_features)
        .u32(registers.queue_sel)
        .u32(registers.status | needs_reset)
        .u32(interrupt.status())
        .u32(interrupt.config_generation())
        .u32(u32::try_from(registers.queues.len()).expect("a device has few queues: asserted when it is built"));
    for (n, queue) in registers.queues.iter().enumerate() {
        let position = engine.position(n);
        w.u32(queue.size)
            .u8(queue.ready.into())
            .u64(queue.descriptors)
            .u64(queue.available)
            .u64(queue.used)
            .u16(position.available)
            .u16(position.used);
    }
    engine.device().save(&mut w);
    Ok(SavedState {
        kind: kind.to_owned(),
        version: version::<D>(),
        bytes: w.into_bytes(),
    })
}

/// Bring a device at power-on, which offers the features `offered`, to the saved state.
pub(super) fn decode<D: Virtio>(
    saved: &SavedState,
    kind: &str,
    offered: u64,
    interrupt: &Interrupt,
    engine: &mut Engine<D>,
) -> Result<Registers, RestoreError> {
    let mut r = Reader::new(saved.expect(kind, version::<D>())?);
    let transport = Transport::read(&mut r).map_err(RestoreError::malformed(kind))?;
    let (mut registers, positions) = (transport.registers, transport.positions);
    let refused = |why: String| RestoreError::Refused {
        kind: kind.to_owned(),
        why,
    };
    let here = engine.device().queues().len();
    if registers.queues.len() != here {
        let there = registers.queues.len();
        return Err(refused(format!("it was saved with {there} queues, here it has {here}")));
    }
    let status = registers.status;
    registers.status &= !VIRTIO_CONFIG_S_NEEDS_RESET;
    let strange = registers.driver_features & !offered;
    if status & (VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK) != 0 {
        if strange != 0 {
            return Err(refused(format!(
                "its driver uses features {strange:#x}, which are not offered here"
            )));
        }
        engine.device_mut().accept(registers.driver_features);
    }
    if status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
        let queues: Vec<_> = registers.queues.iter().copied().zip(positions).collect();
        engine
            .go_on(
                registers.driver_features,
                &queues,
                status & VIRTIO_CONFIG_S_NEEDS_RESET != 0,
            )
            .map_err(|what| refused(format!("{what} does not lie in guest memory, or is in disorder")))?;
    }
    interrupt.set(transport.interrupt_status, transport.config_generation);
    engine
        .device_mut()
        .load(&mut r)
        .map_err(RestoreError::malformed(kind))?;
    r.finish("end of virtio state").map_err(RestoreError::malformed(kind))?;
    Ok(registers)
}

struct Transport {
    registers: Registers,
    positions: Vec<Position>,
    interrupt_status: u32,
    config_generation: u32,
}

impl Transport {
    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        let mut registers = Registers {
            device_features_sel: r.u32("device features selector")?,
            driver_features_sel: r.u32("driver features selector")?,
            driver_features: r.u64("driver features")?,
            queue_sel: r.u32("queue selector")?,
            status: r.u32("status")?,
            queues: Vec::new(),
        };
        let interrupt_status = r.u32("interrupt status")?;
        let config_generation = r.u32("configuration generation")?;
        let mut positions = Vec::new();
        for _ in 0..r.len_within(VIRTIO_QUEUES, "queues")? {
            registers.queues.push(Setup {
                size: r.u32("queue size")?,
                ready: r.u8("queue ready")? != 0,
                descriptors: r.u64("descriptor table")?,
                available: r.u64("available ring")?,
                used: r.u64("used ring")?,
            });
            positions.push(Position {
                available: r.u16("next available")?,
                used: r.u16("next used")?,
            });
        }
        Ok(Self {
            registers,
            positions,
            interrupt_status,
            config_generation,
        })
    }
}
