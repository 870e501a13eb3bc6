//! A tiny kernel whose memory proves itself, for testing live migration.
//!
//! It boots by PVH under any VMM, dirties memory as told on its command line, checks everything it owns as it
//! goes, and writes one byte per beat to the serial port, so that an outside observer can time the longest
//! silence. What it checks, and what it says, is in the README; what a page looks like is in
//! [`umbra_guest::proof`].
//!
//! # Two halves
//!
//! `boot.s` is all that runs at CPL0; everything here runs at CPL3, 64 bit, with every port and all of memory
//! open to it, and asks for the rest by [`cpu::service`]. On hosts without hardware virtualization CPL0 is
//! emulated (a thousand times slower, no SSE); on hosts with it the split costs nothing that matters.
//!
//! # Lifecycle
//!
//! ```text
//! BSP   options -> first line -> clock -> memory plan -> root page -> start APs -+-> fill -> work ... exit
//! APs                                                      INIT, SIPI, long mode -+-> fill -> work ...
//! ```
//!
//! The BSP beats from the moment it knows the time, also while it fills and waits.
//!
//! # Memory
//!
//! ```text
//! 0x00_8000  AP trampoline, once the loader's data has been read
//! 0x10_0000  root page (umbra_guest::proof::Root): what an observer needs to check memory
//! 0x10_1000  page tables, descriptors, task states
//! ...        text, data, stacks
//! image_end  page directories for RAM above 4 GiB, if any
//!            memory shared with a device, if `work=` drives one
//!            the table: one u64 per proof page
//!            proof pages, up to the end of low RAM; then RAM above 4 GiB
//! ```
//!
//! # Unsafe
//!
//! A kernel is made of it. Three facts carry most of the proofs below. *One owner*: each vCPU has its own
//! partition of proof pages and table entries, its own [`umbra_guest::proof::PerCpu`] and its own tick
//! counter, and others only read the last two. *Identity map*: an address below the end of planned RAM is
//! valid memory. *Exclusive machine*: there is no other code on it, so ports, LAPIC and MSRs are ours.

#![no_std]
#![no_main]

mod beat;
mod blk;
mod blkcheck;
mod boot;
mod clock;
mod console;
mod cpu;
mod health;
mod mem;
mod net;
mod plan;
mod rng;
mod virtio;
mod workload;

use crate::console::{fatal, say, start_line};
use core::sync::atomic::Ordering;
use umbra_guest::config::Config;

/// Exit code when memory, a register or a clock was not what it must be.
pub(crate) const EXIT_CORRUPT: u32 = 1;
/// Exit code when the command line cannot be obeyed.
pub(crate) const EXIT_OPTIONS: u32 = 2;
/// Exit code when the kernel itself is wrong.
pub(crate) const EXIT_PANIC: u32 = 3;

/// The first Rust of each CPU, called by `boot.s` at CPL3 with interrupts off.
///
/// `start_info` is the loader's `hvm_start_info` on the BSP and 0 on APs.
#[unsafe(no_mangle)]
extern "C" fn ring3_main(start_info: u32, cpu: u32) -> ! {
    if cpu == 0 {
        boot_processor(start_info)
    } else {
        application_processor(cpu as usize)
    }
}

fn boot_processor(start_info: u32) -> ! {
    boot::install_gates();
    let loader = boot::Loader::read(start_info);
    let config = match Config::parse(loader.command_line()) {
        Ok(config) => config,
        Err(bad) => refuse(bad.word, format_args!("{}", bad.expected)),
    };
    say!("umbra-guest 1 cpus={} work={}", config.cpus, config.work.name());
    console::enable_fifo();
    cpu::mask_pic();
    let clock = clock::Clock::calibrate();
    let plan = plan::Plan::make(&config, &loader.memory());
    let share = boot::publish(config, clock, plan);
    let mut beat = beat::Beat::new(share);
    for ap in 1..share.config.cpus {
        boot::start_ap(ap, share, &mut beat);
    }
    workload::run(0, share, Some(beat))
}

fn application_processor(cpu: usize) -> ! {
    let share = boot::share();
    share.root_cpu(cpu).set_stage(1);
    workload::run(cpu, share, None)
}

/// Says which option cannot be obeyed, and stops.
pub(crate) fn refuse(word: &str, expected: core::fmt::Arguments<'_>) -> ! {
    say!("umbra-guest: bad option '{word}': expected {expected}");
    cpu::exit(EXIT_OPTIONS)
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    fatal(EXIT_PANIC, format_args!("PANIC {info}"))
}

/// Where `boot.s` comes after a fault, on a stack of its own.
#[unsafe(no_mangle)]
extern "C" fn report_fault() -> ! {
    let [vector, error, rip, rsp, cr2] = boot::FAULT.each_ref().map(|word| word.load(Ordering::Relaxed));
    start_line();
    fatal(
        EXIT_CORRUPT,
        format_args!("CORRUPT what=fault vector={vector} error={error:#x} rip={rip:#x} rsp={rsp:#x} cr2={cr2:#x}"),
    )
}
