//! What being followed costs the guest.

use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::json;
use umbra_e2e::{Guest, Vm, World};

use crate::figure::{Aim, Figure};
use crate::usage::{pid, vcpu_seconds};

/// Over so many beats, a thousand a second.
const BEATS: usize = 4_000;

/// `guest_slowdown_follow`: the share of a vCPU's time, in percent, that the same work takes beyond what it takes alone: by so
/// much a guest without time to spare is slower. It writes 100 MB/s at random in 64 MiB, computes the content and checks
/// all of it, with time to spare, so that what following costs (a fault for each page written again since the last
/// harvest) shows as time and not as less work.
pub(crate) fn slowdown(samples: usize) -> Result<Vec<Figure>> {
    let world = World::new()?;
    let (here, there) = (world.host("here")?, world.host("there")?);
    let guest = Guest::dirty("100M", "mixed").with_memory_mib(256).with("wss=64M");
    let mut vm = here.launch(&guest)?;
    vm.is_ready()?;
    let mut slower = Vec::new();
    for _ in 0..samples {
        let alone = load(&mut vm)?;
        let mut shadow = there.shadow_for(&here)?;
        vm.protect_directly(&shadow)?;
        vm.is_following()?;
        let followed = load(&mut vm)?;
        slower.push((followed - alone) * 100.0);
        vm.process.put("unprotect", &json!(null)).context("unprotect")?;
        shadow
            .process
            .until("the shadow let go", umbra_e2e::phase("abandoned"))?;
        shadow.process.kill()?;
        vm.process.until("unprotected", umbra_e2e::phase("abandoned"))?;
    }
    Ok(vec![Figure::new(
        "guest_slowdown_follow",
        "%",
        Aim::AtMost(3.0),
        slower,
    )])
}

/// The share of time that the guest's vCPUs were at work.
fn load(vm: &mut Vm) -> Result<f64> {
    let pid = pid(&vm.process)?;
    let (before, began) = (vcpu_seconds(pid)?, Instant::now());
    vm.beats_on(BEATS)?;
    Ok((vcpu_seconds(pid)? - before) / began.elapsed().as_secs_f64())
}
