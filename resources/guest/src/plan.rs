//! Where the proof pages lie, and who owns which.

use crate::blk::Timed;
use crate::blkcheck::Check;
use crate::{net, refuse, rng};
use umbra_guest::config::{Amount, Config, Content, Work};
use umbra_guest::proof::{Class, PAGE_BYTES, Page};

/// Only RAM below this counts as low: above lie devices, or RAM the boot page tables map uncached.
const LOW_END_MAX: u64 = 3 << 30;
const HIGH_START: u64 = 4 << 30;
/// As far as one table of page directories reaches.
const HIGH_END_MAX: u64 = 512 << 30;
const WSS_BYTES_DEFAULT: u64 = 64 << 20;

unsafe extern "C" {
    static image_end: u8;
    static page_directories_table: u8;
}

fn image_end_gpa() -> u64 {
    (&raw const image_end) as u64
}

/// RAM this kernel can use: one extent from the image up, and one above 4 GiB.
#[derive(Clone, Copy)]
pub(crate) struct Memory {
    low_end: u64,
    high_start: u64,
    high_end: u64,
}

impl Memory {
    /// The loader said nothing.
    pub(crate) const UNKNOWN: Self = Self {
        low_end: 0,
        high_start: HIGH_START,
        high_end: HIGH_START,
    };

    /// Takes note of a range of RAM.
    pub(crate) fn add(&mut self, start: u64, bytes: u64) {
        let end = start.saturating_add(bytes) & !(PAGE_BYTES - 1);
        if start <= image_end_gpa() && end > image_end_gpa() {
            self.low_end = end.min(LOW_END_MAX);
        } else if start >= HIGH_START && self.high_end == self.high_start {
            self.high_start = start.next_multiple_of(PAGE_BYTES);
            self.high_end = end.clamp(self.high_start, HIGH_END_MAX.max(self.high_start));
        }
    }

    /// Applies `mem=`: less than there is, or what there is if nobody else says.
    fn limit(mut self, bytes: Option<u64>) -> Self {
        let known = self.low_end + (self.high_end - self.high_start);
        match bytes.map(|bytes| bytes & !(PAGE_BYTES - 1)) {
            None if known == 0 => refuse("mem=", format_args!("a size, as the loader gave no memory map")),
            None => {}
            Some(bytes) if known == 0 && bytes > LOW_END_MAX => {
                refuse("mem=", format_args!("at most 3G without a memory map"))
            }
            Some(bytes) if known == 0 => self.low_end = bytes,
            // Loaders keep the last pages for themselves, hence the slack.
            Some(bytes) if bytes > known + (16 << 20) => {
                refuse("mem=", format_args!("at most the {}K of the memory map", known >> 10))
            }
            Some(bytes) => {
                self.low_end = self.low_end.min(bytes);
                self.high_end = self.high_end.min(self.high_start + (bytes - self.low_end));
            }
        }
        self
    }
}

/// Where everything is. Page indices run through the working set first, then the fill.
#[derive(Clone, Copy)]
pub(crate) struct Plan {
    /// All proof pages.
    pub(crate) pages: u64,
    /// Those that are rewritten.
    pub(crate) working: u64,
    /// Where the first lies.
    pub(crate) low_gpa: u64,
    /// How many lie there; the rest is at `high_gpa`.
    pub(crate) low_pages: u64,
    /// Where the others lie.
    pub(crate) high_gpa: u64,
    /// One entry per page: the sequence it should have.
    pub(crate) table: *mut u64,
    /// Where the memory lies that a driver shares with its device.
    pub(crate) shared_gpa: u64,
    /// How much of it.
    pub(crate) shared_bytes: u64,
    content: Content,
    cpus: u64,
}

impl Plan {
    /// Lays out memory, or refuses the option that asks for too much of it.
    pub(crate) fn make(config: &Config, memory: &Memory) -> Self {
        let memory = memory.limit(config.mem_bytes);
        if memory.low_end < image_end_gpa() + (1 << 20) {
            refuse("mem=", format_args!("at least a megabyte more than the image"));
        }
        let shared_gpa = map_high(&memory);
        let shared_bytes = shared_bytes(config).next_multiple_of(PAGE_BYTES);
        let table = shared_gpa + shared_bytes;
        if table + (1 << 20) > memory.low_end {
            refuse(
                "mem=",
                format_args!("{}K more, for this work's device", shared_bytes >> 10),
            );
        }
        // Room for as many entries as there could be pages: 0.2 % more than needed at most.
        let high_pages = (memory.high_end - memory.high_start) / PAGE_BYTES;
        let room = (memory.low_end - table) / PAGE_BYTES + high_pages;
        let low_gpa = (table + room * 8).next_multiple_of(PAGE_BYTES);
        let low_pages = memory.low_end.saturating_sub(low_gpa) / PAGE_BYTES;
        let available = low_pages + high_pages;

        let working = match (config.work, config.wss_bytes) {
            (Work::Dirty, None) => (WSS_BYTES_DEFAULT / PAGE_BYTES).min(available / 2),
            (Work::Dirty, Some(bytes)) => bytes / PAGE_BYTES,
            _ => 0,
        };
        if working > available || (config.work == Work::Dirty && working < config.cpus as u64) {
            refuse(
                "wss=",
                format_args!("a page per cpu, and at most the {}K that are free", available * 4),
            );
        }
        let fill = match config.fill {
            Amount::All => available - working,
            Amount::Bytes(bytes) => bytes / PAGE_BYTES,
        };
        if working + fill > available {
            refuse(
                "fill=",
                format_args!("at most the {}K that are free", (available - working) * 4),
            );
        }
        Self {
            pages: working + fill,
            working,
            low_gpa,
            low_pages,
            high_gpa: memory.high_start,
            table: table as *mut u64,
            shared_gpa,
            shared_bytes,
            content: config.content,
            cpus: config.cpus as u64,
        }
    }

    /// What this page holds.
    #[inline(always)]
    pub(crate) fn class(&self, page: u64) -> Class {
        match self.content {
            Content::Zero => Class::Zero,
            Content::Counter => Class::Counter,
            Content::Text => Class::Text,
            Content::Random => Class::Random,
            Content::Mixed => Class::in_turn(page),
        }
    }

    /// Where this page lies.
    #[inline(always)]
    pub(crate) fn address(&self, page: u64) -> *mut Page {
        debug_assert!(page < self.pages, "page {page}");
        let gpa = match page.checked_sub(self.low_pages) {
            None => self.low_gpa + page * PAGE_BYTES,
            Some(high) => self.high_gpa + high * PAGE_BYTES,
        };
        gpa as *mut Page
    }

    /// The sequence the table wants of this page.
    #[inline(always)]
    pub(crate) fn sequence(&self, page: u64) -> u64 {
        // SAFETY: the table has an entry for every page. Volatile: a migration may be what changed it.
        unsafe { self.table.add(page as usize).read_volatile() }
    }

    /// Notes a new sequence.
    ///
    /// # Safety
    /// The caller's CPU must own the page.
    #[inline(always)]
    pub(crate) unsafe fn set_sequence(&self, page: u64, sequence: u64) {
        // SAFETY: as above; one owner.
        unsafe { self.table.add(page as usize).write_volatile(sequence) };
    }

    /// A CPU's part of the working set and of the fill.
    pub(crate) fn partition(&self, cpu: usize) -> Partition {
        let part = |first: u64, pages: u64| {
            let cpu = cpu as u64;
            let (from, to) = (pages * cpu / self.cpus, pages * (cpu + 1) / self.cpus);
            Extent {
                first: first + from,
                pages: to - from,
            }
        };
        Partition {
            working: part(0, self.working),
            fill: part(self.working, self.pages - self.working),
        }
    }
}

/// Consecutive page indices.
#[derive(Clone, Copy)]
pub(crate) struct Extent {
    /// The first.
    pub(crate) first: u64,
    /// How many.
    pub(crate) pages: u64,
}

/// The pages one CPU owns.
#[derive(Clone, Copy)]
pub(crate) struct Partition {
    /// To be rewritten.
    pub(crate) working: Extent,
    /// Static.
    pub(crate) fill: Extent,
}

impl Partition {
    /// How many pages in all.
    pub(crate) fn pages(&self) -> u64 {
        self.working.pages + self.fill.pages
    }

    /// The n-th of them.
    pub(crate) fn page(&self, n: u64) -> u64 {
        match n.checked_sub(self.working.pages) {
            None => self.working.first + n,
            Some(n) => self.fill.first + n,
        }
    }
}

/// What the driver of this work's device needs.
fn shared_bytes(config: &Config) -> u64 {
    match config.work {
        Work::Idle | Work::Dirty | Work::Compute => 0,
        Work::Blk => Timed::shared_bytes(config.depth, config.request_bytes),
        Work::BlkCheck => Check::shared_bytes(config.span_bytes),
        Work::Net => net::SHARED_BYTES,
        Work::Rng => rng::SHARED_BYTES,
    }
}

/// Maps RAM above 4 GiB, one page directory per GiB, and returns where free memory starts after those.
///
/// CPL3 can do this: the page tables are ordinary memory to it, and entries that were not present need no
/// flush.
fn map_high(memory: &Memory) -> u64 {
    let mut free = image_end_gpa();
    if memory.high_end == memory.high_start {
        return free;
    }
    let directories = (&raw const page_directories_table) as *mut u64;
    for gib in 4..memory.high_end.div_ceil(1 << 30) {
        if free + (1 << 20) > memory.low_end {
            refuse(
                "mem=",
                format_args!("more low memory for the page tables of high memory"),
            );
        }
        let directory = free as *mut u64;
        for i in 0..512 {
            // SAFETY: a free page of low RAM. Present, writable, user, 2 MiB.
            unsafe { directory.add(i).write_volatile((gib << 30) | ((i as u64) << 21) | 0x87) };
        }
        // SAFETY: `gib` < 512, as HIGH_END_MAX says.
        unsafe { directories.add(gib as usize).write_volatile(free | 7) };
        free += PAGE_BYTES;
    }
    free
}
