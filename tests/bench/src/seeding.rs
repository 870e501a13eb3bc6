//! The first full copy of a guest whose memory nothing can shrink.

use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::json;
use umbra_e2e::{Guest, World};

use crate::figure::{Aim, Figure};
use crate::usage::{cpu_seconds, pid};

/// `seed_throughput` in MB (10⁶ bytes) of guest memory per second, and the processor seconds per GB at either end, the
/// guest's own left out.
pub(crate) fn incompressible(samples: usize) -> Result<Vec<Figure>> {
    const FILL_MIB: u32 = 768;
    let world = World::new()?;
    let (here, there) = (world.host("here")?, world.host("there")?);
    let guest = Guest::idle()
        .with_memory_mib(1024)
        .with(&format!("content=random fill={FILL_MIB}M scrub=off"));
    let mut vm = here.launch(&guest)?;
    vm.is_ready()?;
    let source = pid(&vm.process)?;
    let gigabytes = f64::from(FILL_MIB) * 1_048_576.0 / 1e9;
    let (mut rates, mut tx, mut rx) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..samples {
        let mut shadow = there.shadow_for(&here)?;
        let sink = pid(&shadow.process)?;
        let used = (cpu_seconds(source)?, cpu_seconds(sink)?);
        let began = Instant::now();
        vm.protect_directly(&shadow)?;
        vm.is_following()?;
        let took = began.elapsed().as_secs_f64();
        rates.push(gigabytes * 1e3 / took);
        tx.push((cpu_seconds(source)? - used.0) / gigabytes);
        rx.push((cpu_seconds(sink)? - used.1) / gigabytes);
        vm.process.put("unprotect", &json!(null)).context("unprotect")?;
        shadow
            .process
            .until("the shadow let go", umbra_e2e::phase("abandoned"))?;
        shadow.process.kill()?;
        vm.process.until("unprotected", umbra_e2e::phase("abandoned"))?;
    }
    Ok(vec![
        Figure::new("seed_throughput", "MB/s", Aim::None, rates),
        Figure::new("seed_cpu_tx", "s/GB", Aim::None, tx),
        Figure::new("seed_cpu_rx", "s/GB", Aim::None, rx),
    ])
}
