//! How many disk requests a second does the model alone handle?
//!
//! Fills a queue, times only what the device's worker does until the queue is answered, and does that for a while: once with a
//! disk that answers at once without doing anything, and once with one in memory that moves 4 KiB per request. What a real disk
//! adds, and what vCPU and interrupts cost, is not in it.
//!
//! ```text
//! cargo run --release -p umbra-devices --example requests
//! ```
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use umbra_devices::virtio::block::{self, Block, Completion, Disk, Geometry, Outcome, Request};
use umbra_devices::virtio::limiter::Limits;
use umbra_devices::virtio::testing::{Driver, MemoryDisk};
use umbra_devices::virtio::{Ram, Wake};

const BATCH: u32 = 256 / 3;

/// A disk that answers at once and does nothing.
#[derive(Default)]
struct Nothing(Mutex<VecDeque<Completion>>);

impl Disk for Nothing {
    fn submit(&self, request: Request, _ram: &Ram) {
        let done = Completion {
            tag: request.tag,
            outcome: Outcome::Done,
        };
        self.0.lock().expect("nobody panics").push_back(done);
    }

    fn completed(&self) -> Option<Completion> {
        self.0.lock().expect("nobody panics").pop_front()
    }

    fn quiesce(&self) {}
}

fn main() {
    println!("disk      batch  requests/s  ns each");
    for batch in [1, BATCH] {
        measure("nothing", Arc::new(Nothing::default()), batch);
        measure("memory", Arc::new(MemoryDisk::new(64)), batch);
    }
}

fn measure(name: &str, disk: Arc<dyn Disk>, batch: u32) {
    let mut driver = Driver::<Block>::at_work(block::Wiring {
        id: "a".to_owned(),
        serial: "a".to_owned(),
        geometry: Geometry::of_sectors(64),
        queues: 1,
        limits: Limits::default(),
        disk,
    });
    // The best of several, because whoever else uses this host takes from the others.
    let each = (0..10).map(|_| slice(&mut driver, batch)).min().unwrap_or_default();
    let rate = 1.0 / each.as_secs_f64();
    println!("{name:8}  {batch:5}  {rate:10.0}  {:7}", each.as_nanos());
}

/// The time of one request, over a tenth of a second.
fn slice(driver: &mut Driver<Block>, batch: u32) -> Duration {
    let work = driver.mmio.work();
    let (mut requests, mut spent) = (0_u32, Duration::ZERO);
    while spent < Duration::from_millis(100) {
        for _ in 0..batch {
            driver.add(0, &[&[0; 16]], &[4096, 1]);
        }
        let began = Instant::now();
        let mut wake = work.notified(0, driver.now);
        while wake == Wake::Again {
            wake = work.world(driver.now);
        }
        spent += began.elapsed();
        while driver.used(0).is_some() {
            requests += 1;
        }
    }
    spent / requests
}
