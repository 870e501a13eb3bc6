//! A guest's driver that does not behave, with a disk: chance from the input's first bytes, requests from the rest. The disk
//! comes back from every call, and answers a driver that starts again and behaves.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use umbra_devices::virtio::block::{Block, Geometry, Wiring};
use umbra_devices::virtio::limiter::Limits;
use umbra_devices::virtio::testing::hostile::{Storm, recover};
use umbra_devices::virtio::testing::{Driver, MemoryDisk};

fuzz_target!(|data: &[u8]| {
    let (seed, rest) = data.split_at(data.len().min(8));
    let seed = seed.iter().fold(0, |seed, byte| seed << 8 | u64::from(*byte));
    let messages: Vec<Vec<u8>> = rest.chunks(48).map(<[u8]>::to_vec).collect();
    let wiring = Wiring {
        id: "fuzz".to_owned(),
        serial: String::new(),
        geometry: Geometry::of_sectors(64),
        queues: 2,
        limits: Limits::default(),
        disk: Arc::new(MemoryDisk::new(64)),
    };
    let mut driver = Driver::<Block>::at_work(wiring);
    Storm::new(seed).knowing(messages).rage(&mut driver, 40);
    recover(&mut driver);
    // A read of the first sector: request 0, reserved, sector 0.
    let answer = driver.request(0, &[&[0; 16]], 513).expect("an answer");
    assert_eq!(answer.last(), Some(&0), "it went well");
});
