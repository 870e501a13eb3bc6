//! What processor the guest sees, and whether another host can be that processor.
//!
//! ```text
//!   what KVM supports here ── template ──▶ what the guest is shown ── description ──▶ what a twin must be able to be
//!                                                     └── compare ──▶ each difference, by name
//! ```
//!
//! A [`Template`] says what a guest may see of its host. [`Features`] are what is left, or what any host has, by the names
//! operators know them by; [`compare`] tells two of them apart. A guest's description holds what KVM says the vCPU *has*,
//! which on some hosts is more than it was asked to show: there KVM adds what the processor itself shows user code.

mod features;
mod table;
mod template;

pub use features::{Difference, Features, Side, compare};
pub use template::Template;

pub(crate) use table::Cpuid;
pub(crate) use template::MsrRange;

use std::sync::Once;

use kvm_ioctls::{Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

use crate::error::Error;
use crate::probe;

/// The features that a guest launched with `template` has here, or all that KVM supports.
pub fn features_here(template: Option<&Template>) -> Result<Features, Error> {
    let kvm = probe::open_kvm()?;
    let supported = Cpuid::supported(&kvm, 1)?;
    let shown = match template {
        Some(template) => supported.shown_by(template),
        None => supported,
    };
    // What a vCPU then has, which on some hosts is more than it was given.
    let vm = kvm.create_vm().map_err(Error::kvm("create a VM"))?;
    let vcpu = vm.create_vcpu(0).map_err(Error::kvm("create a vCPU"))?;
    shown.for_vcpu(0, 1).give_to(&vcpu)?;
    Ok(Cpuid::of_vcpu(&vcpu)?.features())
}

/// The template for a guest that asks for none.
pub(crate) fn suitable(kvm: &Kvm) -> Template {
    let emulating = probe::emulates_kernels(kvm);
    if emulating {
        tracing::info!("KVM emulates the guest's kernel here: template emulated, unless another is asked for");
    }
    let name = if emulating { "emulated" } else { "host" };
    Template::named(name).expect("the program carries it")
}

/// Have the guest's accesses to these MSRs raise a general protection fault.
pub(crate) fn hide_msrs(vm: &VmFd, hidden: &[MsrRange]) -> Result<(), Error> {
    if hidden.is_empty() {
        return Ok(());
    }
    if !vm.check_extension(Cap::X86MsrFilter) {
        static TOLD: Once = Once::new();
        TOLD.call_once(|| {
            tracing::warn!("this kernel cannot filter MSRs: the guest sees those that its template hides")
        });
        return Ok(());
    }
    // A zero bit denies.
    let count = |range: &MsrRange| range.last - range.first + 1;
    let most = hidden.iter().map(count).max().unwrap_or(0).div_ceil(8);
    let nothing = vec![0_u8; usize::try_from(most).unwrap_or(usize::MAX)];
    let ranges: Vec<_> = hidden
        .iter()
        .map(|range| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: range.first,
            msr_count: count(range),
            bitmap: &nothing,
        })
        .collect();
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
        .map_err(Error::kvm("hide MSRs"))
}

/// Say, once per process, which features the guest sees although they were to be hidden.
pub(crate) fn tell_of_what_shows_anyway(has: &Cpuid, shown: &Cpuid) {
    static TOLD: Once = Once::new();
    if let Some(features) = has.beyond(shown) {
        TOLD.call_once(|| tracing::info!(%features, "this host's KVM shows guests what their template does not"));
    }
}
