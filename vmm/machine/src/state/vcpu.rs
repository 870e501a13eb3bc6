//! The state of one vCPU.
//!
//! Version 2, all integers little-endian, `bytes` being a `u32` length and as many bytes:
//!
//! | field | layout |
//! |---|---|
//! | TSC frequency in kHz | `u32` |
//! | CPUID table as KVM gives it back | `u32` count; per leaf function, index, flags, eax, ebx, ecx, edx, each `u32` |
//! | `mp_state`, `regs`, `sregs`, `xcrs`, `debugregs`, `lapic`, `vcpu_events` | `bytes` each: KVM's structure |
//! | XSAVE area | `bytes`: 4096, or what the features need |
//! | MSRs | `u32` count; per MSR its number `u32` and value `u64` |
//! | TSC at the instant of the record `clock` | `u8`: 1 if it is known, else 0; the value `u64` |
//!
//! The CPUID table is the one KVM reports, not the one it was given: KVM keeps some bits of it up to date, and on some
//! hosts adds features of its own.

use std::ops::RangeInclusive;

use kvm_bindings::{
    Msrs, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use umbra_core::guest::StateRecord;
use umbra_units::{Gpa, Malformed, Pfn, Reader, Writer};

use super::time::{HostTsc, Rate, Reading, Tsc, TscPlaced, is_same_khz};
use super::uapi::{bytes_of, read};
use crate::cpu::Cpuid;
use crate::error::Error;
use crate::ioctls::{set_tsc_offset, tsc_offset};
use crate::limits;
use crate::vcpu::Vcpu;

pub(crate) const VERSION: u32 = 2;

pub(crate) const IA32_TSC: u32 = 0x10;
const IA32_TSC_ADJUST: u32 = 0x3b;
const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// MSRs that carry state but are missing from some kernels' `KVM_GET_MSR_INDEX_LIST` (SDM volume 4, AMD APM volume 2).
const BESIDE_THE_LIST: [RangeInclusive<u32>; 8] = [
    0xc000_0080..=0xc000_0080, // EFER
    0xc000_0100..=0xc000_0103, // FS.base, GS.base, kernel GS.base, TSC_AUX
    0x277..=0x277,             // PAT
    0x2ff..=0x2ff,             // MTRRs: default type
    0x250..=0x250,             // the first 512 KiB
    0x258..=0x259,             // the next 256 KiB
    0x268..=0x26f,             // up to 1 MiB
    0x200..=0x20f,             // ranges
];

/// MSRs that hold addresses which KVM writes to on its own account (kvm/x86/msr.rst): wall clock and clock, old and new,
/// asynchronous page faults, stolen time, end of interrupt.
const MSRS_OF_ADDRESSES: [u32; 7] = [
    0x11,
    0x12,
    0x4b56_4d00,
    0x4b56_4d01,
    0x4b56_4d02,
    0x4b56_4d03,
    0x4b56_4d04,
];

/// What saving and restoring needs to know of the host, found out once.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// MSRs that can be read here, `IA32_TSC_DEADLINE` last.
    msrs: Vec<u32>,
    /// 32-bit words of an XSAVE area beyond its first 4096 bytes.
    xsave_extra: usize,
    /// This kernel has `KVM_GET_XSAVE2`.
    xsave2: bool,
    /// What a vCPU can have here.
    pub(crate) cpuid: Cpuid,
    tsc: HostTsc,
}

impl Host {
    /// Find out, with the help of a vCPU that has its CPUID.
    pub(crate) fn learn(kvm: &Kvm, vm: &VmFd, vcpu: &VcpuFd, possible: Processor) -> Result<Self, Error> {
        let size = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let xsave_extra = size.saturating_sub(4096).div_ceil(4);
        Ok(Self {
            msrs: readable_msrs(kvm, vcpu)?,
            xsave_extra,
            xsave2: size > 0,
            // A vCPU that was told nothing else counts as its host does.
            tsc: HostTsc::new(possible.tsc_khz, possible.cpuid.vendor()),
            cpuid: possible.cpuid,
        })
    }

    fn xsave(&self) -> Xsave {
        Xsave::new(self.xsave_extra).expect("a few KiB, as the kernel says")
    }

    /// A stopped vCPU's vector and x87 state.
    pub(crate) fn read_xsave(&self, vcpu: &VcpuFd) -> Result<XsaveArea, Error> {
        read_xsave(vcpu, self).map(XsaveArea)
    }

    /// Change a stopped vCPU's vector and x87 state.
    pub(crate) fn change_xsave(&self, vcpu: &VcpuFd, change: impl FnOnce(&mut XsaveArea)) -> Result<(), Error> {
        let mut area = self.read_xsave(vcpu)?;
        change(&mut area);
        write_xsave(vcpu, self, &area.0)
    }
}

/// An XSAVE area in the standard format (SDM volume 1, 13.4).
pub(crate) struct XsaveArea(Vec<u32>);

impl XsaveArea {
    const MXCSR: usize = 24 / 4;
    const XSTATE_BV: usize = 512 / 4;
    const X87: u32 = 1;
    const SSE: u32 = 2;
    const INITIAL_MXCSR: u32 = 0x1f80;

    pub(crate) fn mxcsr(&self) -> u32 {
        self.0[Self::MXCSR]
    }

    /// Set MXCSR, and have it loaded: it is not, where the area says that all of SSE is as after a reset.
    pub(crate) fn set_mxcsr(&mut self, value: u32) {
        if self.0[Self::XSTATE_BV] & Self::SSE == 0 {
            // What was not saved is zero.
            self.0[160 / 4..416 / 4].fill(0);
        }
        self.0[Self::MXCSR] = value;
        if value != Self::INITIAL_MXCSR {
            self.0[Self::XSTATE_BV] |= Self::SSE;
        }
    }

    /// Mark all x87 registers empty. After a reset they are.
    pub(crate) fn empty_x87(&mut self) {
        if self.0[Self::XSTATE_BV] & Self::X87 != 0 {
            // The abridged tag word is byte 4.
            self.0[1] &= !0xff;
        }
    }
}

fn readable_msrs(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>, Error> {
    let list = kvm.get_msr_index_list().map_err(Error::kvm("list the MSRs"))?;
    let mut wanted: Vec<u32> = list
        .as_slice()
        .iter()
        .copied()
        .chain(BESIDE_THE_LIST.into_iter().flatten())
        .collect();
    wanted.sort_unstable();
    wanted.dedup();
    // Last, because it is refused before the LAPIC is in TSC-deadline mode and the TSC is set.
    wanted.sort_by_key(|msr| *msr == IA32_TSC_DEADLINE);
    let mut readable = Vec::new();
    let mut rest = &wanted[..];
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(limits::MSRS)];
        let read = read_msrs(vcpu, batch)?.len();
        readable.extend_from_slice(&batch[..read]);
        // KVM stops at the first it cannot read: leave that one out.
        rest = &rest[(read + usize::from(read < batch.len()))..];
    }
    readable.truncate(limits::MSRS);
    Ok(readable)
}

/// Read MSRs in one call, up to the first that cannot be.
fn read_msrs(vcpu: &VcpuFd, which: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let entries: Vec<_> = which
        .iter()
        .map(|index| kvm_msr_entry {
            index: *index,
            ..Default::default()
        })
        .collect();
    let mut msrs = Msrs::from_entries(&entries).expect("limits::MSRS is what the wrapper takes");
    let read = vcpu.get_msrs(&mut msrs).map_err(Error::kvm("read MSRs"))?;
    Ok(msrs.as_slice()[..read].to_vec())
}

/// A vCPU's state, decoded.
#[derive(Debug)]
pub(crate) struct VcpuState {
    tsc_khz: u32,
    cpuid: Cpuid,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    /// Little-endian words.
    xsave: Vec<u32>,
    msrs: Vec<kvm_msr_entry>,
    /// At the instant of the clock record.
    tsc: Option<u64>,
}

pub(crate) fn kind(index: u8) -> String {
    format!("vcpu/{index}")
}

impl VcpuState {
    /// Read it all from a stopped vCPU, the clocks having been read just before. See [`super`] on the order.
    pub(crate) fn of(vcpu: &Vcpu, host: &Host, clocks: &Reading) -> Result<Self, Error> {
        let Processor { tsc_khz, cpuid } = vcpu.processor.clone();
        let vcpu = &vcpu.fd;
        let mp_state = vcpu.get_mp_state().map_err(Error::kvm("read a vCPU's run state"))?;
        let regs = vcpu.get_regs().map_err(Error::kvm("read registers"))?;
        let sregs = vcpu.get_sregs().map_err(Error::kvm("read special registers"))?;
        let xcrs = vcpu.get_xcrs().map_err(Error::kvm("read extended control registers"))?;
        let xsave = read_xsave(vcpu, host)?;
        let debugregs = vcpu.get_debug_regs().map_err(Error::kvm("read debug registers"))?;
        let lapic = vcpu.get_lapic().map_err(Error::kvm("read a LAPIC"))?;
        let msrs = save_msrs(vcpu, &host.msrs)?;
        let rate = Rate {
            guest_khz: tsc_khz,
            host: host.tsc,
        };
        let told = tsc_offset(vcpu).and_then(|offset| clocks.guest_tsc(offset, rate));
        let found = msrs.iter().find(|msr| msr.index == IA32_TSC).map(|msr| msr.data);
        let tsc = Tsc::at_the_clock(told, found, tsc_khz);
        let events = vcpu.get_vcpu_events().map_err(Error::kvm("read pending events"))?;
        Ok(Self {
            tsc_khz,
            cpuid,
            mp_state,
            regs,
            sregs,
            xcrs,
            debugregs,
            lapic,
            events,
            xsave,
            msrs,
            tsc,
        })
    }

    /// Write it all to a stopped vCPU; `then` and `now` are the clocks when it was saved and when they were set here. Says
    /// how its TSC went on. See [`super`] on the order.
    pub(crate) fn apply(
        &self,
        vcpu: &mut Vcpu,
        host: &Host,
        then: &Reading,
        now: &Reading,
    ) -> Result<TscPlaced, Error> {
        vcpu.processor.become_like(
            &Processor {
                tsc_khz: self.tsc_khz,
                cpuid: self.cpuid.clone(),
            },
            &vcpu.fd,
        )?;
        let rate = Rate {
            guest_khz: vcpu.processor.tsc_khz,
            host: host.tsc,
        };
        let mut msrs = self.msrs.clone();
        let placed = match self.tsc() {
            None => TscPlaced::AsSaved,
            Some(tsc) => {
                let offset = now.tsc_offset(tsc, then, rate);
                if offset.is_some_and(|offset| set_tsc_offset(&vcpu.fd, offset)) {
                    // Written now, its value would only set it back.
                    msrs.retain(|msr| msr.index != IA32_TSC);
                    TscPlaced::Offset
                } else {
                    for msr in msrs.iter_mut().filter(|msr| msr.index == IA32_TSC) {
                        msr.data = tsc.due(then, now);
                    }
                    TscPlaced::Value
                }
            }
        };
        self.write(&vcpu.fd, host, &msrs)?;
        Ok(placed)
    }

    /// Its TSC at the instant of the clock record, if that is known.
    pub(crate) fn tsc(&self) -> Option<Tsc> {
        let khz = self.tsc_khz;
        self.tsc.map(|value| Tsc { value, khz })
    }

    /// Leave out the time-stamp counter: what is left, given to the vCPU it came from, resets all but its clock. The
    /// counters of a machine's vCPUs agree, and writing them one after the other could only disturb that.
    pub(crate) fn without_counter(mut self) -> Self {
        self.msrs
            .retain(|msr| ![IA32_TSC, IA32_TSC_ADJUST].contains(&msr.index));
        self.tsc = None;
        self
    }

    /// Write everything but what the processor is, which stays.
    pub(crate) fn put(&self, vcpu: &VcpuFd, host: &Host) -> Result<(), Error> {
        self.write(vcpu, host, &self.msrs)
    }

    fn write(&self, vcpu: &VcpuFd, host: &Host, msrs: &[kvm_msr_entry]) -> Result<(), Error> {
        vcpu.set_mp_state(self.mp_state)
            .map_err(Error::kvm("restore a vCPU's run state"))?;
        vcpu.set_regs(&self.regs).map_err(Error::kvm("restore registers"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(Error::kvm("restore special registers"))?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(Error::kvm("restore extended control registers"))?;
        write_xsave(vcpu, host, &self.xsave)?;
        vcpu.set_debug_regs(&self.debugregs)
            .map_err(Error::kvm("restore debug registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(Error::kvm("restore a LAPIC"))?;
        write_msrs(vcpu, msrs)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(Error::kvm("restore pending events"))
    }

    /// The pages that KVM itself writes for this vCPU: its MSRs say where the guest wants its clocks and other news.
    pub(crate) fn written_by_kvm(&self) -> impl Iterator<Item = Pfn> + '_ {
        let wanted = self
            .msrs
            .iter()
            .filter(|msr| MSRS_OF_ADDRESSES.contains(&msr.index) && msr.data != 0);
        // The low bits say whether it is wanted, and how.
        wanted.map(|msr| Gpa(msr.data).pfn())
    }

    /// Whether this host can take the state on; if not, what it lacks.
    pub(crate) fn check(&self, kind: &str, host: &Host) -> Result<(), Error> {
        let lacks = |what: String| Err(Error::Incompatible(format!("{kind}: {what}")));
        if let Some(missing) = self.cpuid.beyond(&host.cpuid) {
            return lacks(format!("this host lacks {missing}"));
        }
        let can = host.cpuid.xcr0();
        for xcr in self
            .xcrs
            .xcrs
            .iter()
            .take(usize::try_from(self.xcrs.nr_xcrs).unwrap_or(usize::MAX))
        {
            let missing = xcr.value & !can;
            if xcr.xcr == 0 && missing != 0 {
                return lacks(format!("this host lacks XCR0 bits {missing:#x}"));
            }
        }
        let room = XSAVE_WORDS + host.xsave_extra;
        if self.xsave.iter().skip(room).any(|word| *word != 0) {
            return lacks(format!(
                "its XSAVE area of {} bytes exceeds this host's {}",
                self.xsave.len() * 4,
                room * 4
            ));
        }
        Ok(())
    }

    pub(crate) fn encode(&self, index: u8) -> StateRecord {
        let mut w = Writer::with_capacity(16 << 10);
        w.u32(self.tsc_khz);
        self.cpuid.encode(&mut w);
        w.bytes(bytes_of(&self.mp_state))
            .bytes(bytes_of(&self.regs))
            .bytes(bytes_of(&self.sregs));
        w.bytes(bytes_of(&self.xcrs))
            .bytes(bytes_of(&self.debugregs))
            .bytes(bytes_of(&self.lapic));
        w.bytes(bytes_of(&self.events));
        let xsave: Vec<u8> = self.xsave.iter().flat_map(|word| word.to_le_bytes()).collect();
        w.bytes(&xsave);
        w.u32(u32::try_from(self.msrs.len()).expect("limits::MSRS at most"));
        for msr in &self.msrs {
            w.u32(msr.index).u64(msr.data);
        }
        w.u8(u8::from(self.tsc.is_some())).u64(self.tsc.unwrap_or(0));
        StateRecord {
            kind: kind(index),
            version: VERSION,
            bytes: w.into_bytes(),
        }
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        let tsc_khz = r.u32("TSC frequency")?;
        let cpuid = Cpuid::decode(&mut r)?;
        let mp_state = read(&mut r, "mp_state")?;
        let regs = read(&mut r, "regs")?;
        let sregs = read(&mut r, "sregs")?;
        let xcrs = read(&mut r, "xcrs")?;
        let debugregs = read(&mut r, "debugregs")?;
        let lapic = read(&mut r, "lapic")?;
        let events = read(&mut r, "vcpu_events")?;
        let xsave = r.bytes_within(limits::XSAVE_BYTES, "XSAVE area")?;
        let (words, []) = xsave.as_chunks::<4>() else {
            return Err(r.malformed("XSAVE area"));
        };
        if words.len() < XSAVE_WORDS {
            return Err(r.malformed("XSAVE area"));
        }
        let xsave = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let count = r.len_within(limits::MSRS, "MSRs")?;
        let msrs = (0..count)
            .map(|_| {
                Ok(kvm_msr_entry {
                    index: r.u32("MSR")?,
                    data: r.u64("MSR")?,
                    ..Default::default()
                })
            })
            .collect::<Result<_, Malformed>>()?;
        let tsc = match (r.u8("TSC")?, r.u64("TSC")?) {
            (0, _) => None,
            (1, tsc) => Some(tsc),
            _ => return Err(r.malformed("TSC")),
        };
        r.finish("end of vCPU state")?;
        Ok(Self {
            tsc_khz,
            cpuid,
            mp_state,
            regs,
            sregs,
            xcrs,
            debugregs,
            lapic,
            events,
            xsave,
            msrs,
            tsc,
        })
    }
}

/// All in one call; where KVM stops, that one is skipped with a warning. An MSR this host cannot set is, for all we
/// know, one this guest does not use: what it does use and cannot have was refused by CPUID.
fn write_msrs(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<(), Error> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let msrs = Msrs::from_entries(rest).expect("decode keeps within limits::MSRS");
        let written = vcpu
            .set_msrs(&msrs)
            .map_err(Error::kvm("restore MSRs"))?
            .min(rest.len());
        rest = &rest[written..];
        if let Some((refused, others)) = rest.split_first() {
            tracing::warn!(
                msr = format_args!("{:#x}", refused.index),
                value = format_args!("{:#x}", refused.data),
                "this host does not take the value of an MSR"
            );
            rest = others;
        }
    }
    Ok(())
}

/// 32-bit words of the fixed part of an XSAVE area.
const XSAVE_WORDS: usize = 1024;

fn read_xsave(vcpu: &VcpuFd, host: &Host) -> Result<Vec<u32>, Error> {
    if !host.xsave2 {
        let area = vcpu.get_xsave().map_err(Error::kvm("read the XSAVE area"))?;
        return Ok(area.region.to_vec());
    }
    let mut area = host.xsave();
    // SAFETY: KVM writes as much as KVM_CAP_XSAVE2 says, and `host.xsave()` made the area that long.
    unsafe { vcpu.get_xsave2(&mut area) }.map_err(Error::kvm("read the XSAVE area"))?;
    let mut words = area.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(area.as_slice());
    Ok(words)
}

/// Write an XSAVE area, at least its fixed part long.
fn write_xsave(vcpu: &VcpuFd, host: &Host, words: &[u32]) -> Result<(), Error> {
    let mut area = host.xsave();
    let (head, tail) = words.split_at(XSAVE_WORDS);
    area.as_mut_slice()
        .iter_mut()
        .zip(tail)
        .for_each(|(place, word)| *place = *word);
    // SAFETY: only the area's fixed part is written; its length, which the wrapper relies on, is not touched.
    unsafe { area.as_mut_fam_struct() }.xsave.region.copy_from_slice(head);
    // SAFETY: KVM reads as much as KVM_CAP_XSAVE2 says, and `host.xsave()` made the area that long.
    unsafe { vcpu.set_xsave2(&area) }.map_err(Error::kvm("restore the XSAVE area"))
}

/// One MSR, if it can be read.
pub(crate) fn read_msr(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, Error> {
    Ok(read_msrs(vcpu, &[index])?.first().map(|msr| msr.data))
}

/// All MSRs in one call, and those behind one that has become unreadable in further calls.
fn save_msrs(vcpu: &VcpuFd, which: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut saved = Vec::with_capacity(which.len());
    let mut rest = which;
    while !rest.is_empty() {
        let read = read_msrs(vcpu, rest)?;
        rest = &rest[read.len()..];
        saved.extend(read);
        if let Some((refused, others)) = rest.split_first() {
            tracing::warn!(
                msr = format_args!("{refused:#x}"),
                "an MSR can no longer be read and is left out"
            );
            rest = others;
        }
    }
    Ok(saved)
}

/// What a vCPU is, as opposed to what it is doing: set before it first runs, then the same for its life.
///
/// Kept here because asking KVM again would cost two calls per vCPU of every pause.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Processor {
    pub(crate) tsc_khz: u32,
    /// As KVM gave it back when it was set.
    pub(crate) cpuid: Cpuid,
}

impl Processor {
    /// What `vcpu` is.
    pub(crate) fn of(vcpu: &VcpuFd) -> Result<Self, Error> {
        let tsc_khz = vcpu.get_tsc_khz().map_err(Error::kvm("read the TSC frequency"))?;
        Ok(Self {
            tsc_khz,
            cpuid: Cpuid::of_vcpu(vcpu)?,
        })
    }

    /// Make `vcpu`, which is this, the processor that is wanted.
    pub(crate) fn become_like(&mut self, wanted: &Self, vcpu: &VcpuFd) -> Result<(), Error> {
        if *wanted == *self {
            return Ok(());
        }
        if wanted.tsc_khz != self.tsc_khz {
            set_tsc_khz(vcpu, wanted.tsc_khz, self.tsc_khz)?;
        }
        if !wanted.cpuid.same_for_the_guest(&self.cpuid) {
            wanted.cpuid.give_to(vcpu)?;
        }
        *self = Self::of(vcpu)?;
        Ok(())
    }
}

/// Give a vCPU another TSC frequency than it has.
fn set_tsc_khz(vcpu: &VcpuFd, wanted: u32, here: u32) -> Result<(), Error> {
    if vcpu.set_tsc_khz(wanted).is_ok() {
        return Ok(());
    }
    if is_same_khz(wanted, here) {
        return Ok(());
    }
    Err(Error::Incompatible(format!(
        "tsc_khz: the guest's time-stamp counter runs at {wanted} kHz, this host's at {here} kHz and KVM cannot scale it"
    )))
}
