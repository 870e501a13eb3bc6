//! Guest memory: mapped once, copied from and to, never referred to.
//!
//! # Why no Rust reference to guest memory ever exists
//!
//! A `&[u8]` promises the compiler that the bytes do not change while it exists, a `&mut [u8]` that nobody else looks.
//! Guest memory keeps neither promise: vCPUs write to it at any instant, the kernel writes to it (kvmclock pages, the
//! dirty log's own page-table updates), another process may have the memfd mapped. A reference held "only for a moment"
//! or "only while paused" is still a false promise, and the compiler may use it: read twice what the source reads once,
//! so that a length is checked in one copy and used in another.
//!
//! So this file keeps raw pointers, hands none out, and offers copies: out to a buffer, in from a buffer, whole pages at
//! a time, by [`copy_page`], whose one instruction is opaque to the compiler. Whoever needs to look at guest data copies
//! it first, looks at the copy, and looks at guest memory only once. Loaders and devices go through `vm-memory`, which
//! works the same way and marks what is written in a bitmap, because KVM's dirty log sees only what vCPUs and KVM itself
//! write.
//!
//! A page copied while the guest writes it may be torn: half old, half new. That is allowed, because the write that
//! tore it is in the next harvest and the page travels again.
//!
//! # Pages that were never touched
//!
//! Memory nobody touched costs nothing, and moving a guest must not change that on either side. Reading a hole of a
//! memfd through a mapping fills it; reading it by `pread` does not. So a page that is not *known* to be backed is read
//! by `pread`, and a page of zeros applied over one that is still a hole is not written. `touched` holds what is known. It
//! grows, except where a guest gives memory back ([`Memory::discard`]).

use std::arch::asm;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use umbra_core::guest::{PageBytes, Space};
use umbra_devices::virtio::WriteMarks;
use umbra_devices::virtio::balloon::MemoryAdvice;
use umbra_units::{Gpa, PAGE_SIZE, PageCount, PageSet, Pfn};
use vm_memory::bitmap::{Bitmap as _, NewBitmap as _};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::backing;
use crate::config::{Backing, HugePages, Shape, Sharing};
use crate::error::Error;
use crate::lazy::{Awaited, Missing};

/// Guest memory as `vm-memory` knows it: for loaders and devices.
pub(crate) type Ram = GuestMemoryMmap<WriteMarks>;

/// All of a guest's RAM.
#[derive(Debug)]
pub(crate) struct Memory {
    /// Points into the blocks' mappings, and so must not outlive this struct: see [`Memory::for_devices`].
    ram: Ram,
    /// Ascending, in the order of `space.present`.
    blocks: Vec<Block>,
    space: Space,
    /// The guest has never run and no loader wrote: what `touched` does not know is zero.
    fresh: AtomicBool,
    /// Pages that come after the guest, if it was ever so.
    awaited: Awaited,
    /// Told of pages that are about to become holes.
    before_discard: BeforeDiscard,
}

/// Who wants to be told of pages before they are given back.
#[derive(Default)]
struct BeforeDiscard(OnceLock<Box<OnDiscard>>);

/// Told the first page, and how many.
type OnDiscard = dyn Fn(Pfn, PageCount) + Send + Sync;

/// One run of RAM, and one memory slot of KVM.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) slot: u32,
    pub(crate) first: Pfn,
    pub(crate) pages: PageCount,
    mapping: Mapping,
    /// The memfd behind a shared block; `None` for private memory.
    file: Option<File>,
    /// Memory that was taken at the start is not given back while the machine lives: the host may not give it again.
    stays_backed: bool,
    /// Pages known to be backed by memory, one bit each.
    touched: Box<[AtomicU64]>,
}

/// A mapping that ends with this value.
#[derive(Debug)]
struct Mapping {
    address: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a `Mapping` is an address and a length; what is at the address is only ever accessed by copies through raw
// pointers, which any thread may do at any time (see the module).
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// Large pages of x86: a mapping that starts at a multiple of it in both address spaces can use them.
const LARGE_PAGE: usize = 2 << 20;

impl Memory {
    /// RAM of this shape, all zeros, of ordinary pages.
    pub(crate) fn new(shape: Shape) -> Result<Self, Error> {
        Self::backed_by(shape, Backing::default())
    }

    /// RAM of this shape, all zeros.
    pub(crate) fn backed_by(shape: Shape, backing: Backing) -> Result<Self, Error> {
        backing.fits(shape)?;
        backing::check(shape, backing)?;
        let space = shape.ram();
        let blocks = (0..)
            .zip(&space.present)
            .map(|(slot, (first, pages))| Block::new(slot, *first, *pages, shape.sharing(), backing))
            .collect::<Result<Vec<_>, _>>()?;
        let regions = blocks.iter().map(Block::region).collect::<Result<Vec<_>, _>>()?;
        let ram = Ram::from_regions(regions).map_err(|error| Error::Host {
            doing: "lay out guest memory",
            source: std::io::Error::other(error),
        })?;
        Ok(Self {
            ram,
            blocks,
            space,
            fresh: AtomicBool::new(true),
            awaited: Awaited::new(),
            before_discard: BeforeDiscard::default(),
        })
    }

    /// Tell of pages before they are made holes, on the thread that does. Only the first call has an effect.
    pub(crate) fn before_discard(&self, tell: impl Fn(Pfn, PageCount) + Send + Sync + 'static) {
        let _ = self.before_discard.0.set(Box::new(tell));
    }

    fn about_to_discard(&self, first: Pfn, pages: PageCount) {
        if let Some(tell) = self.before_discard.0.get() {
            tell(first, pages);
        }
    }

    /// The space this memory is.
    pub(crate) const fn space(&self) -> &Space {
        &self.space
    }

    /// The blocks, ascending.
    pub(crate) fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// For loaders, which mark what they write.
    pub(crate) fn ram(&self) -> &Ram {
        self.written_by_others();
        &self.ram
    }

    /// For devices, which mark what they write. Whoever has it must also have this memory's `Arc`, and keep it for longer:
    /// what is handed out points into the mappings that end with it.
    pub(crate) fn for_devices(&self) -> Ram {
        self.ram.clone()
    }

    /// From now on somebody may write without telling: the guest runs, or a loader or device was given access.
    pub(crate) fn written_by_others(&self) {
        self.fresh.store(false, Ordering::Release);
    }

    /// Write as a device does: marked in the VMM's own dirty bitmap.
    pub(crate) fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), Error> {
        self.ram()
            .write_slice(bytes, GuestAddress(at.0))
            .map_err(|error| Error::Incompatible(error.to_string()))
    }

    /// Give the memory behind these pages back to the host: they read as zeros until somebody writes to them again. What is not
    /// this guest's memory is left alone. The pages count as written, because a shadow still holds what was in them.
    pub(crate) fn discard(&self, first: Pfn, pages: PageCount) -> Result<(), Error> {
        let end = first.0.saturating_add(pages.0);
        for block in &self.blocks {
            let from = first.0.max(block.first.0);
            let to = end.min(block.first.0 + block.pages.0);
            // Memory that was taken at the start is not given back; what the guest does not use may hold anything.
            if from >= to || block.stays_backed {
                continue;
            }
            let run = index(from - block.first.0)..index(to - block.first.0);
            self.about_to_discard(Pfn(from), PageCount(to - from));
            let done = block.discard(&run);
            // Marked after they became zeros, as any write is, and also if only some did: a harvest in between finds them in
            // the next.
            let bytes = run.start * PAGE_SIZE;
            self.mapped(block).bitmap().mark_dirty(bytes, run.len() * PAGE_SIZE);
            done?;
        }
        Ok(())
    }

    /// What devices and loaders wrote since this was last asked: tells words of the block that have bits, and their number.
    pub(crate) fn take_device_writes(&self, block: &Block, found: impl FnMut(usize, u64)) {
        self.mapped(block).bitmap().take(found);
    }

    /// Make all of it zeros, as it was before the guest was first booted, and give back to the host what was backed.
    /// Whatever may have held something is recorded as written. Nobody else may write meanwhile.
    pub(crate) fn clear(&self) -> Result<(), Error> {
        self.written_by_others();
        if let Some(missing) = self.awaited.get() {
            missing.forget();
        }
        for block in &self.blocks {
            let region = self.mapped(block);
            self.about_to_discard(block.first, block.pages);
            for run in block.clear()? {
                let (first, pages) = (index(run.start), index(run.end - run.start));
                region.bitmap().mark_pages(first, pages);
            }
        }
        Ok(())
    }

    /// Forget what devices and loaders wrote.
    pub(crate) fn forget_device_writes(&self) {
        for block in &self.blocks {
            self.mapped(block).bitmap().take(|_, _| {});
        }
    }

    fn mapped(&self, block: &Block) -> Arc<vm_memory::MmapRegion<WriteMarks>> {
        use vm_memory::GuestMemoryBackend as _;
        self.ram
            .find_region(GuestAddress(block.first.gpa().0))
            .expect("a region was made for each block")
            .get_mmap()
    }

    /// Pages that certainly hold zeros: holes of a memfd, which nobody has written since the guest was built. None of
    /// private memory, of which the kernel does not tell.
    pub(crate) fn holes(&self) -> PageSet {
        let mut holes = PageSet::new(self.space.pages);
        if self.is_waiting() {
            return holes; // some are pages that have not come
        }
        for block in &self.blocks {
            for hole in block.holes() {
                (hole.start..hole.end).for_each(|n| {
                    holes.insert(block.first + PageCount(n));
                });
            }
        }
        holes
    }

    /// Copy pages to the end of `out`, in order.
    pub(crate) fn read_pages(&self, pages: &[Pfn], out: &mut Vec<u8>) -> Result<(), Error> {
        out.reserve(pages.len() * PAGE_SIZE);
        let mut rest = pages;
        while let Some(first) = rest.first() {
            let (block, index) = self.find(*first)?;
            // What has not come is a hole that must not be read as one: the mapping makes the reader wait.
            let run = if self.is_waiting() {
                0
            } else {
                block.untouched_run(index, rest)
            };
            if run == 0 {
                block.append(index, out);
                rest = &rest[1..];
            } else {
                block.append_from_file(index, run, out)?;
                rest = &rest[run..];
            }
        }
        Ok(())
    }

    /// Copy pages in a row out, as many as fit.
    pub(crate) fn read_run(&self, first: Pfn, out: &mut [u8]) -> Result<(), Error> {
        let (pages, rest) = out.as_chunks_mut::<PAGE_SIZE>();
        assert!(rest.is_empty(), "whole pages");
        let (block, at) = self.find(first)?;
        if at + pages.len() > index_range(block.pages) {
            return Err(no_such_page(block.first + block.pages));
        }
        let mut n = 0;
        let waiting = self.is_waiting();
        while n < pages.len() {
            // As in `read_pages`: what has not come is waited for.
            let unknown = if waiting {
                0
            } else {
                block.unknown_run(at + n, pages.len() - n)
            };
            if unknown == 0 {
                block.read_mapped(at + n, &mut pages[n]);
                n += 1;
            } else {
                block.read_file(at + n, pages[n..n + unknown].as_flattened_mut())?;
                (n..n + unknown)
                    .filter(|n| !is_zero(&pages[*n]))
                    .for_each(|n| block.touch(at + n));
                n += unknown;
            }
        }
        Ok(())
    }

    /// Where pages in a row lie in this process, if they are all there.
    pub(crate) fn addresses(&self, pages: &Range<u64>) -> Result<Range<usize>, Error> {
        let (block, at) = self.find(Pfn(pages.start))?;
        let count = pages.end - pages.start;
        if at as u64 + count > block.pages.0 {
            return Err(no_such_page(block.first + block.pages));
        }
        let start = block.addresses().start + at * PAGE_SIZE;
        Ok(start..start + index(count) * PAGE_SIZE)
    }

    /// The page that lies at an address of this process, if one does.
    pub(crate) fn page_at(&self, address: usize) -> Option<Pfn> {
        self.blocks.iter().find_map(|block| {
            let addresses = block.addresses();
            let offset = addresses.contains(&address).then(|| address - addresses.start)?;
            Some(block.first + PageCount((offset / PAGE_SIZE) as u64))
        })
    }

    /// Copy one page out.
    pub(crate) fn read_page(&self, page: Pfn, out: &mut PageBytes) -> Result<(), Error> {
        let (block, index) = self.find(page)?;
        if self.is_waiting() {
            block.read_mapped(index, out);
            return Ok(());
        }
        block.read(index, out)
    }

    /// Whether there are pages that have not come.
    pub(crate) fn is_waiting(&self) -> bool {
        self.awaited
            .get()
            .is_some_and(|missing| missing.left() > PageCount::ZERO)
    }

    /// Refuse memory whose pages cannot come one by one after the guest.
    pub(crate) fn can_be_lazy(&self) -> Result<(), Error> {
        if self.blocks.iter().any(|block| block.stays_backed) {
            let text = "memory: huge pages and memory taken at the start (prefault) cannot come after the guest";
            return Err(Error::Incompatible(text.to_owned()));
        }
        if self.awaited.get().is_some() {
            return Err(Error::WrongState("the guest's pages were left behind once already"));
        }
        Ok(())
    }

    /// Make holes of these pages, whatever is in them, without a record: they are about to come.
    pub(crate) fn make_holes(&self, pages: &PageSet) -> Result<(), Error> {
        for block in &self.blocks {
            let mut run: Range<usize> = 0..0;
            let of_block = pages
                .from(block.first)
                .take_while(|page| page.0 < block.first.0 + block.pages.0)
                .map(|page| index(page.0 - block.first.0));
            for page in of_block {
                if page != run.end {
                    block.discard_some(&run)?;
                    run = page..page;
                }
                run.end = page + 1;
            }
            block.discard_some(&run)?;
        }
        Ok(())
    }

    /// From now on these pages are waited for.
    pub(crate) fn awaits(&self, missing: Arc<Missing>) -> Result<(), Error> {
        let again = |_| Error::WrongState("the guest's pages were left behind once already");
        self.awaited.set(missing).map_err(again)
    }

    /// This page was put in its place by the kernel.
    pub(crate) fn filled(&self, page: Pfn) {
        if let Ok((block, index)) = self.find(page) {
            block.touch(index);
        }
    }

    /// Copy one page in.
    pub(crate) fn apply_page(&self, page: Pfn, bytes: &PageBytes) -> Result<(), Error> {
        let (block, index) = self.find(page)?;
        if is_zero(bytes) && !block.is_touched(index) {
            if self.fresh.load(Ordering::Acquire) {
                return Ok(());
            }
            let mut here = [0; PAGE_SIZE];
            block.read(index, &mut here)?;
            if is_zero(&here) {
                return Ok(());
            }
        }
        block.write(index, bytes);
        // What is applied is what somebody else already has, but only the caller knows whether that somebody is still
        // interested: report it, as every other write of the VMM.
        self.mapped(block).bitmap().mark_pages(index, 1);
        Ok(())
    }

    /// The block `page` lies in, and its index there.
    fn find(&self, page: Pfn) -> Result<(&Block, usize), Error> {
        self.blocks
            .iter()
            .find(|block| page >= block.first && page.0 - block.first.0 < block.pages.0)
            .map(|block| (block, index(page.0 - block.first.0)))
            .ok_or_else(|| no_such_page(page))
    }
}

fn no_such_page(page: Pfn) -> Error {
    Error::Incompatible(format!("page {page}: this guest has no such page"))
}

impl fmt::Debug for BeforeDiscard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BeforeDiscard")
    }
}

/// Memory of this process alone, for other things than guests: zeros, of large pages where there are some.
#[derive(Debug)]
pub(crate) struct Anonymous(Mapping);

impl Anonymous {
    pub(crate) fn new(bytes: usize) -> Result<Self, Error> {
        Mapping::new(bytes, None, Backing::default()).map(Self)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is that long and readable for as long as `self` lives, its bytes are initialised (the kernel
        // clears them), and nobody writes to them but by `bytes_mut` and `touch`, which need `self` exclusively.
        unsafe { std::slice::from_raw_parts(self.0.address.as_ptr(), self.0.bytes) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and writable; `self` is borrowed exclusively, so there is no other reference.
        unsafe { std::slice::from_raw_parts_mut(self.0.address.as_ptr(), self.0.bytes) }
    }

    /// Where it lies.
    pub(crate) fn addresses(&self) -> Range<usize> {
        let start = self.0.address.as_ptr() as usize;
        start..start + self.0.bytes
    }

    /// Have it of ordinary pages, before it is touched.
    pub(crate) fn without_large_pages(&mut self) {
        // SAFETY: advice about a mapping we own, which changes no content.
        unsafe { libc::madvise(self.0.address.as_ptr().cast(), self.0.bytes, libc::MADV_NOHUGEPAGE) };
    }

    /// Write to a page, whatever the compiler thinks of it.
    pub(crate) fn touch(&mut self, page: usize) {
        let byte = std::ptr::from_mut(&mut self.bytes_mut()[page * PAGE_SIZE]);
        // SAFETY: a byte of ours, borrowed exclusively.
        unsafe { byte.write_volatile(2) };
    }
}

impl MemoryAdvice for Memory {
    fn discard(&self, first: Pfn, pages: PageCount) {
        // Advice that is not taken costs memory of the host, and nothing else.
        if let Err(error) = Self::discard(self, first, pages) {
            tracing::debug!(%error, "the host does not take memory back");
        }
    }
}

impl Block {
    fn new(slot: u32, first: Pfn, pages: PageCount, sharing: Sharing, backing: Backing) -> Result<Self, Error> {
        let bytes = index(pages.bytes());
        let file = match sharing {
            Sharing::Shared => Some(memfd(bytes, backing.huge_pages)?),
            Sharing::Private => None,
        };
        let mapping = Mapping::new(bytes, file.as_ref(), backing)?;
        let touched = (0..pages.0.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Ok(Self {
            slot,
            first,
            pages,
            mapping,
            file,
            stays_backed: backing != Backing::default(),
            touched,
        })
    }

    /// Where the block begins in this process, for KVM.
    pub(crate) fn host_address(&self) -> u64 {
        self.mapping.address.as_ptr() as u64
    }

    /// Where the block is in this process.
    pub(crate) fn addresses(&self) -> Range<usize> {
        let first = self.mapping.address.as_ptr() as usize;
        first..first + self.mapping.bytes
    }

    fn region(&self) -> Result<GuestRegionMmap<WriteMarks>, Error> {
        let builder = MmapRegionBuilder::new_with_bitmap(self.mapping.bytes, WriteMarks::with_len(self.mapping.bytes))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: the mapping is `bytes` long, readable and writable, and outlives the region: both are owned by one
        // `Memory`, which hands the region out only to those who keep the `Memory` for longer.
        let builder = unsafe { builder.with_raw_mmap_pointer(self.mapping.address.as_ptr()) };
        let region = builder.build().map_err(|error| Error::Host {
            doing: "describe guest memory",
            source: std::io::Error::other(error),
        })?;
        GuestRegionMmap::new(region, GuestAddress(self.first.gpa().0)).ok_or_else(|| Error::Host {
            doing: "place guest memory",
            source: std::io::Error::other("it ends beyond the address space"),
        })
    }

    /// The runs of pages that are not backed, ascending. What cannot be found out is left out.
    fn holes(&self) -> Vec<Range<u64>> {
        let mut holes = Vec::new();
        let Some(file) = &self.file else { return holes };
        let end = self.pages.bytes();
        let mut at = 0;
        while at < end {
            let Some(hole) = seek(file, at, libc::SEEK_HOLE).filter(|hole| *hole < end) else {
                break;
            };
            // No data behind a hole is reported as an error (ENXIO, lseek(2)): the hole reaches to the end.
            let data = seek(file, hole, libc::SEEK_DATA).unwrap_or(end);
            holes.push(PageCount::holding(hole).0..data / PAGE_SIZE as u64);
            at = data;
        }
        holes
    }

    /// Fill with zeros; says which runs of pages may have held something else.
    fn clear(&self) -> Result<Vec<Range<u64>>, Error> {
        if self.stays_backed {
            return self.clear_in_place();
        }
        // What is not a hole; memory that cannot tell is one run of data.
        let mut backed: Vec<_> = std::iter::once(0..self.pages.0).collect();
        for hole in self.holes() {
            let last = backed.pop().expect("it ends with what lies behind the last hole");
            backed.push(last.start..hole.start);
            backed.push(hole.end..last.end);
        }
        backed.retain(|run| !run.is_empty());
        for run in &backed {
            self.discard(&(index(run.start)..index(run.end)))?;
        }
        Ok(backed)
    }

    /// Write zeros over what is not zero; says which runs that was.
    fn clear_in_place(&self) -> Result<Vec<Range<u64>>, Error> {
        let mut cleared: Vec<Range<u64>> = Vec::new();
        let mut here = [0; PAGE_SIZE];
        for page in 0..self.pages.0 {
            self.read(index(page), &mut here)?;
            if !is_zero(&here) {
                self.write(index(page), &[0; PAGE_SIZE]);
                match cleared.last_mut() {
                    Some(run) if run.end == page => run.end += 1,
                    _ => cleared.push(page..page + 1),
                }
            }
        }
        Ok(cleared)
    }

    fn is_touched(&self, index: usize) -> bool {
        self.touched[index / 64].load(Ordering::Relaxed) >> (index % 64) & 1 == 1
    }

    fn touch(&self, index: usize) {
        // Only a hint for who reads: no other memory is ordered by it.
        self.touched[index / 64].fetch_or(1 << (index % 64), Ordering::Relaxed);
    }

    fn forget(&self, index: usize) {
        self.touched[index / 64].fetch_and(!(1 << (index % 64)), Ordering::Relaxed);
    }

    /// Make holes of these pages, if there are any.
    fn discard_some(&self, run: &Range<usize>) -> Result<(), Error> {
        if run.is_empty() { Ok(()) } else { self.discard(run) }
    }

    /// Make holes of these pages.
    fn discard(&self, run: &Range<usize>) -> Result<(), Error> {
        let bytes = run.len() * PAGE_SIZE;
        let done = match &self.file {
            Some(file) => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let offset = |bytes| libc::off_t::try_from(bytes).expect("a block is far shorter than 8 EiB");
                // SAFETY: changes a file of ours that is only ever accessed by copies, which any page may change under at any
                // time (see the module); no memory of this process but the mapping of it is touched.
                unsafe { libc::fallocate(file.as_raw_fd(), mode, offset(run.start * PAGE_SIZE), offset(bytes)) }
            }
            None => {
                assert!(run.end <= index_range(self.pages), "pages of this block");
                // SAFETY: the range is within our mapping (asserted), which is private and anonymous: its pages become zeros, which
                // whoever copies from it must expect at any time (see the module).
                unsafe { libc::madvise(self.page(run.start).cast(), bytes, libc::MADV_DONTNEED) }
            }
        };
        if done != 0 {
            return Err(Error::last_os("give memory back to the host"));
        }
        if self.file.is_some() {
            // A page the guest has written to meanwhile is backed though not known to be: it is then read by `pread`, which
            // sees the same.
            run.clone().for_each(|index| self.forget(index));
        }
        Ok(())
    }

    /// How many of `pages`, from the first (which is `index` here), follow each other in this block and are not known
    /// to be backed. Always none for private memory, where reading a hole shows the kernel's one page of zeros.
    fn untouched_run(&self, index: usize, pages: &[Pfn]) -> usize {
        if self.file.is_none() {
            return 0;
        }
        let left = index_range(self.pages) - index;
        pages
            .iter()
            .zip(pages[0].0..)
            .take(left)
            .enumerate()
            .take_while(|(n, (page, expected))| page.0 == *expected && !self.is_touched(index + n))
            .count()
    }

    /// How many of `pages` pages from `index` on are not known to be backed: see [`Block::untouched_run`].
    fn unknown_run(&self, index: usize, pages: usize) -> usize {
        if self.file.is_none() {
            return 0;
        }
        (index..index + pages).take_while(|n| !self.is_touched(*n)).count()
    }

    /// Where page `index` begins.
    fn page(&self, index: usize) -> *mut u8 {
        assert!(
            index < index_range(self.pages),
            "page {index} of a block of {}",
            self.pages
        );
        // SAFETY: the index was just checked, so the offset is within the mapping, which is `pages` long.
        unsafe { self.mapping.address.as_ptr().add(index * PAGE_SIZE) }
    }

    /// Copy a page to the end of `out`.
    fn append(&self, index: usize, out: &mut Vec<u8>) {
        out.reserve(PAGE_SIZE);
        let end = out.spare_capacity_mut().as_mut_ptr().cast();
        // SAFETY: `page` is a whole mapped page, `end` has room for one (reserved above), and they cannot overlap: one
        // is guest memory, the other a vector's.
        unsafe { copy_page(self.page(index), end) };
        // SAFETY: the copy initialised exactly these bytes, which are within the reserved capacity.
        unsafe { out.set_len(out.len() + PAGE_SIZE) };
    }

    /// Copy `run` pages to the end of `out` without filling holes.
    fn append_from_file(&self, index: usize, run: usize, out: &mut Vec<u8>) -> Result<(), Error> {
        let begin = out.len();
        out.resize(begin + run * PAGE_SIZE, 0);
        self.read_file(index, &mut out[begin..])?;
        for (n, bytes) in (index..).zip(out[begin..].as_chunks::<PAGE_SIZE>().0) {
            if !is_zero(bytes) {
                self.touch(n);
            }
        }
        Ok(())
    }

    fn read_file(&self, index: usize, out: &mut [u8]) -> Result<(), Error> {
        let file = self.file.as_ref().expect("only shared memory has untouched runs");
        file.read_exact_at(out, (index * PAGE_SIZE) as u64)
            .map_err(|source| Error::Host {
                doing: "read guest memory",
                source,
            })
    }

    /// Copy a page out, without filling a hole.
    fn read(&self, index: usize, out: &mut PageBytes) -> Result<(), Error> {
        if self.file.is_some() && !self.is_touched(index) {
            return self.read_file(index, out);
        }
        self.read_mapped(index, out);
        Ok(())
    }

    /// Copy a page out through the mapping.
    fn read_mapped(&self, index: usize, out: &mut PageBytes) {
        // SAFETY: a whole mapped page to a page-sized array of ours; guest memory and the array cannot overlap.
        unsafe { copy_page(self.page(index), out.as_mut_ptr()) };
    }

    /// Copy a page in.
    fn write(&self, index: usize, bytes: &PageBytes) {
        self.touch(index);
        // SAFETY: a page-sized array of ours to a whole mapped page; the array and guest memory cannot overlap.
        unsafe { copy_page(bytes.as_ptr(), self.page(index)) };
    }
}

impl Mapping {
    /// Map `bytes` of `file`, or of anonymous memory, at a multiple of [`LARGE_PAGE`] or of its huge pages.
    fn new(bytes: usize, file: Option<&File>, backing: Backing) -> Result<Self, Error> {
        let alignment = backing.huge_pages.map_or(LARGE_PAGE, |huge| index(huge.bytes().0));
        let room = bytes + alignment;
        let reserve = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping wherever the kernel likes replaces nothing.
        let reserved = unsafe { libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, reserve, -1, 0) };
        if reserved == libc::MAP_FAILED {
            return Err(Error::last_os("reserve address space for guest memory"));
        }
        let skip = reserved.align_offset(alignment);
        let aligned = reserved.wrapping_byte_add(skip);
        let (kind, fd) = match file {
            Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        // Huge pages are promised by mapping them: without the promise, a touch may end in a bus error.
        let of_a_kind = match (backing.huge_pages, file) {
            (None, _) => libc::MAP_NORESERVE,
            (Some(_), Some(_)) => 0,
            (Some(huge), None) => libc::MAP_HUGETLB | size_flag(huge),
        };
        let flags = kind | libc::MAP_FIXED | of_a_kind;
        // SAFETY: MAP_FIXED replaces only part of the reservation just made, which nobody else knows: `skip` is less
        // than `alignment`, and the reservation is that much longer than `bytes`.
        let mapped = unsafe { libc::mmap(aligned, bytes, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
        let failed = (mapped == libc::MAP_FAILED).then(|| Error::last_os("map guest memory"));
        let (kept, keep) = if failed.is_some() {
            (reserved, 0)
        } else {
            (aligned, bytes)
        };
        // SAFETY: what is before the kept part is ours, reserved above and used by nobody.
        unsafe { unmap(reserved, kept as usize - reserved as usize) };
        let end = kept.wrapping_byte_add(keep);
        // SAFETY: as above, for what is behind the kept part.
        unsafe { unmap(end, reserved as usize + room - end as usize) };
        if let Some(error) = failed {
            return Err(error);
        }
        let address = NonNull::new(aligned.cast()).expect("the kernel maps nothing at address zero");
        // SAFETY: advice about a mapping we own. It may be refused (no large pages in this kernel), which costs speed only.
        unsafe { libc::madvise(aligned, bytes, libc::MADV_HUGEPAGE) };
        // SAFETY: as above: guest memory does not belong in a core dump.
        unsafe { libc::madvise(aligned, bytes, libc::MADV_DONTDUMP) };
        let mapping = Self { address, bytes };
        if backing.prefault {
            mapping.prefault()?;
        }
        Ok(mapping)
    }

    /// Take every page now.
    fn prefault(&self) -> Result<(), Error> {
        // SAFETY: of a mapping we own; the kernel does what a write to each page would, and changes no content.
        let done = unsafe { libc::madvise(self.address.as_ptr().cast(), self.bytes, libc::MADV_POPULATE_WRITE) };
        if done != 0 {
            return Err(Error::last_os(
                "take guest memory at once (prefault, which needs Linux 5.14)",
            ));
        }
        Ok(())
    }
}

/// How mmap(2) and memfd_create(2) are told the size of huge pages: its logarithm, in the same bits for both.
const fn size_flag(huge: HugePages) -> libc::c_int {
    match huge {
        HugePages::TwoMib => libc::MAP_HUGE_2MB,
        HugePages::OneGib => libc::MAP_HUGE_1GB,
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and its users (the block's copies, the `Ram` region, KVM's slot) live in structs
        // that are dropped before or together with it.
        unsafe { unmap(self.address.as_ptr().cast(), self.bytes) };
    }
}

/// End a mapping, if there is one.
///
/// # Safety
/// Nobody may use these addresses any more.
unsafe fn unmap(address: *mut libc::c_void, bytes: usize) {
    if bytes > 0 {
        // SAFETY: the caller's.
        unsafe { libc::munmap(address, bytes) };
    }
}

/// Copy one page, at most one of the two being guest memory that changes meanwhile.
///
/// The copy is one instruction the compiler cannot look into, so that it can neither assume that the source holds still
/// nor read it twice. `rep movsb` is what processors of the last ten years make fastest (ERMS, FSRM).
///
/// # Safety
/// `from` must be readable and `to` writable for [`PAGE_SIZE`] bytes, and they must not overlap.
unsafe fn copy_page(from: *const u8, to: *mut u8) {
    // SAFETY: the caller's; the direction flag is clear on entry to every asm block (Rust reference, inline assembly).
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") PAGE_SIZE => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
}

/// Where the next hole or data of `file` begins, at or after `from`.
fn seek(file: &File, from: u64, whence: libc::c_int) -> Option<u64> {
    let from = libc::off_t::try_from(from).ok()?;
    // SAFETY: only moves the descriptor's offset, which nothing else here uses: files are read by position.
    let found = unsafe { libc::lseek(file.as_raw_fd(), from, whence) };
    u64::try_from(found).ok()
}

/// A file in memory, `bytes` long and empty.
fn memfd(bytes: usize, huge_pages: Option<HugePages>) -> Result<File, Error> {
    let huge = huge_pages.map_or(0, |huge| libc::MFD_HUGETLB | size_flag(huge).cast_unsigned());
    // SAFETY: the name is a C string; no other memory is involved.
    let fd = unsafe { libc::memfd_create(c"umbra-guest".as_ptr(), libc::MFD_CLOEXEC | huge) };
    if fd < 0 {
        return Err(Error::last_os("create a memfd for guest memory"));
    }
    // SAFETY: the kernel just made this descriptor for us and nobody else knows it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes as u64).map_err(|source| Error::Host {
        doing: "size the memfd for guest memory",
        source,
    })?;
    Ok(file)
}

fn is_zero(bytes: &PageBytes) -> bool {
    bytes.as_chunks::<64>().0.iter().all(|chunk| *chunk == [0; 64])
}

/// A page index or byte count of a block: blocks are mapped, so they fit the address space.
fn index(n: u64) -> usize {
    usize::try_from(n).expect("a mapped block fits the address space")
}

fn index_range(pages: PageCount) -> usize {
    index(pages.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_units::Bytes;

    fn memory(mib: u64, sharing: Sharing) -> Memory {
        Memory::new(Shape::new(1, Bytes::mib(mib), sharing).unwrap()).unwrap()
    }

    /// What devices wrote to the first block.
    fn marked(memory: &Memory) -> Vec<u64> {
        memory.mapped(&memory.blocks[0]).bitmap().take_words()
    }

    /// Bytes of memory behind a shared block.
    fn backed(memory: &Memory) -> u64 {
        use std::os::unix::fs::MetadataExt;
        memory
            .blocks
            .iter()
            .map(|block| block.file.as_ref().unwrap().metadata().unwrap().blocks() * 512)
            .sum()
    }

    #[test]
    fn what_is_applied_is_what_is_read() {
        for sharing in [Sharing::Shared, Sharing::Private] {
            let memory = memory(8, sharing);
            let pages = [Pfn(3), Pfn(0), Pfn(2047), Pfn(1), Pfn(2)];
            memory.apply_page(Pfn(3), &[3; PAGE_SIZE]).unwrap();
            memory.apply_page(Pfn(1), &[1; PAGE_SIZE]).unwrap();
            memory.apply_page(Pfn(2047), &[9; PAGE_SIZE]).unwrap();
            memory.apply_page(Pfn(3), &[0; PAGE_SIZE]).unwrap();
            let mut out = vec![7];
            memory.read_pages(&pages, &mut out).unwrap();
            let expected: Vec<u8> = [7]
                .into_iter()
                .chain([0, 0, 9, 1, 0].into_iter().flat_map(|b| [b; PAGE_SIZE]))
                .collect();
            assert!(out == expected, "{sharing:?}");
            let mut page = [0; PAGE_SIZE];
            memory.read_page(Pfn(2047), &mut page).unwrap();
            assert_eq!(page, [9; PAGE_SIZE]);
        }
    }

    #[test]
    fn memory_nobody_touched_stays_unbacked_when_read_or_zeroed() {
        let memory = memory(64, Sharing::Shared);
        let all: Vec<Pfn> = (0..memory.space.pages.0).map(Pfn).collect();
        let mut out = Vec::new();
        memory.read_pages(&all, &mut out).unwrap();
        for page in &all {
            memory.apply_page(*page, &[0; PAGE_SIZE]).unwrap();
        }
        memory.written_by_others();
        for page in &all {
            memory.apply_page(*page, &[0; PAGE_SIZE]).unwrap();
        }
        assert!(out.len() == 64 << 20 && out.iter().all(|byte| *byte == 0));
        assert_eq!(backed(&memory), 0);
        memory.apply_page(Pfn(5), &[1; PAGE_SIZE]).unwrap();
        assert_ne!(backed(&memory), 0);
    }

    #[test]
    fn discarded_pages_are_zeros_count_as_written_and_cost_nothing() {
        for sharing in [Sharing::Shared, Sharing::Private] {
            let memory = memory(8, sharing);
            for page in 0..20 {
                memory.apply_page(Pfn(page), &[7; PAGE_SIZE]).unwrap();
            }
            memory.forget_device_writes();
            memory.discard(Pfn(4), PageCount(8)).unwrap();
            let written = marked(&memory);
            assert_eq!(written[0], 0xff0, "{sharing:?}");
            let mut out = Vec::new();
            let pages: Vec<Pfn> = (0..20).map(Pfn).collect();
            memory.read_pages(&pages, &mut out).unwrap();
            for (page, bytes) in out.chunks(PAGE_SIZE).enumerate() {
                let expected = if (4..12).contains(&page) { 0 } else { 7 };
                assert!(bytes.iter().all(|byte| *byte == expected), "{sharing:?}, page {page}");
            }
            if sharing == Sharing::Shared {
                assert_eq!(backed(&memory), 12 * PAGE_SIZE as u64, "also after they were read");
            }
            // And they are memory again as soon as somebody writes to them.
            memory.write(Pfn(5).gpa(), &[9; PAGE_SIZE]).unwrap();
            let mut page = [0; PAGE_SIZE];
            memory.read_page(Pfn(5), &mut page).unwrap();
            assert_eq!(page, [9; PAGE_SIZE]);
            assert_eq!(marked(&memory)[0], 1 << 5);
        }
    }

    #[test]
    fn discarding_what_is_no_memory_changes_nothing() {
        let memory = memory(8, Sharing::Shared);
        let last = Pfn(memory.space.pages.0 - 1);
        memory.apply_page(last, &[7; PAGE_SIZE]).unwrap();
        memory.discard(Pfn(u64::MAX), PageCount(5)).unwrap();
        memory.discard(Pfn(memory.space.pages.0), PageCount(u64::MAX)).unwrap();
        memory.discard(last, PageCount(0)).unwrap();
        let mut page = [0; PAGE_SIZE];
        memory.read_page(last, &mut page).unwrap();
        assert_eq!(page, [7; PAGE_SIZE]);
        memory.discard(last, PageCount(u64::MAX)).unwrap();
        memory.read_page(last, &mut page).unwrap();
        assert_eq!(page, [0; PAGE_SIZE]);
    }

    #[test]
    fn holes_are_exactly_the_pages_nobody_wrote() {
        let shared = memory(8, Sharing::Shared);
        assert_eq!(shared.holes().count(), shared.space.pages);
        for page in [0, 700, 701, shared.space.pages.0 - 1] {
            shared.apply_page(Pfn(page), &[1; PAGE_SIZE]).unwrap();
        }
        let mut written = PageSet::full(shared.space.pages);
        written.subtract(&shared.holes());
        assert_eq!(
            written.iter().map(|page| page.0).collect::<Vec<_>>(),
            [0, 700, 701, shared.space.pages.0 - 1]
        );
        assert!(memory(8, Sharing::Private).holes().is_empty(), "nobody knows");
    }

    #[test]
    fn a_zero_page_replaces_what_a_device_or_the_guest_wrote() {
        for sharing in [Sharing::Shared, Sharing::Private] {
            let memory = memory(8, sharing);
            memory.write(Gpa(0x5008), b"x").unwrap();
            memory.apply_page(Pfn(5), &[0; PAGE_SIZE]).unwrap();
            let mut out = Vec::new();
            memory.read_pages(&[Pfn(5)], &mut out).unwrap();
            assert_eq!(out, [0; PAGE_SIZE]);
        }
    }

    #[test]
    fn cleared_memory_is_zero_and_unbacked_and_what_it_held_is_recorded() {
        for sharing in [Sharing::Shared, Sharing::Private] {
            let memory = memory(8, sharing);
            for page in [0, 7, 8, 2047] {
                memory.apply_page(Pfn(page), &[1; PAGE_SIZE]).unwrap();
            }
            memory.forget_device_writes();
            memory.clear().unwrap();
            let all: Vec<Pfn> = (0..2048).map(Pfn).collect();
            let mut out = Vec::new();
            memory.read_pages(&all, &mut out).unwrap();
            assert!(out.iter().all(|byte| *byte == 0));
            let written = PageSet::from_words(marked(&memory), PageCount(2048));
            if sharing == Sharing::Shared {
                assert_eq!(backed(&memory), 0);
                assert_eq!(written.iter().map(|page| page.0).collect::<Vec<_>>(), [0, 7, 8, 2047]);
            } else {
                assert_eq!(written.count(), PageCount(2048), "nobody knows");
            }
        }
    }

    #[test]
    fn memory_taken_at_the_start_is_all_there_and_stays_when_it_is_cleared() {
        let backing = Backing {
            prefault: true,
            ..Backing::default()
        };
        for sharing in [Sharing::Shared, Sharing::Private] {
            let shape = Shape::new(1, Bytes::mib(8), sharing).unwrap();
            let memory = Memory::backed_by(shape, backing).unwrap();
            memory.apply_page(Pfn(7), &[1; PAGE_SIZE]).unwrap();
            memory.forget_device_writes();
            memory.clear().unwrap();
            let written = marked(&memory);
            assert_eq!((written[0], written[1..].iter().sum::<u64>()), (1 << 7, 0));
            let mut page = [1; PAGE_SIZE];
            memory.read_page(Pfn(7), &mut page).unwrap();
            assert!(is_zero(&page));
            if sharing == Sharing::Shared {
                assert_eq!(backed(&memory), 8 << 20);
            }
        }
    }

    #[test]
    fn huge_pages_are_what_memory_is_made_of_or_the_host_has_none() {
        for sharing in [Sharing::Shared, Sharing::Private] {
            let backing = Backing {
                huge_pages: Some(HugePages::TwoMib),
                prefault: false,
            };
            let shape = Shape::new(1, Bytes::mib(8), sharing).unwrap();
            let memory = match Memory::backed_by(shape, backing) {
                Ok(memory) => memory,
                Err(error) => {
                    assert!(
                        error
                            .to_string()
                            .starts_with("memory: 4 huge pages of 2.0 MiB needed, "),
                        "{error}"
                    );
                    eprintln!("SKIPPED: {error}");
                    continue;
                }
            };
            memory.apply_page(Pfn(513), &[1; PAGE_SIZE]).unwrap();
            let mut out = Vec::new();
            memory.read_pages(&[Pfn(512), Pfn(513)], &mut out).unwrap();
            assert_eq!(out, [[0; PAGE_SIZE], [1; PAGE_SIZE]].concat());
            memory.forget_device_writes();
            memory.clear().unwrap();
            assert_eq!(marked(&memory)[8], 2);
        }
    }

    #[test]
    fn a_device_write_is_remembered_once() {
        let memory = memory(8, Sharing::Shared);
        memory.write(Gpa(0x41ffe), b"four").unwrap();
        let bits = marked(&memory);
        assert_eq!(
            (bits[1], bits.iter().map(|word| word.count_ones()).sum::<u32>()),
            (0b110, 2)
        );
        assert!(marked(&memory).iter().all(|word| *word == 0));
    }

    #[test]
    fn a_page_that_does_not_exist_is_refused_by_number() {
        let memory = memory(4096, Sharing::Private);
        let mut out = Vec::new();
        for hole in [Pfn(0xc_0000), Pfn(0xf_ffff), memory.space.pages.pfn()] {
            let error = memory.read_pages(&[hole], &mut out).unwrap_err();
            assert_eq!(error.to_string(), format!("page {hole}: this guest has no such page"));
        }
        memory.apply_page(Pfn(1 << 20), &[1; PAGE_SIZE]).unwrap();
        memory.read_pages(&[Pfn(1 << 20)], &mut out).unwrap();
        assert_eq!(out, [1; PAGE_SIZE]);
    }

    #[test]
    fn mappings_are_aligned_for_large_pages() {
        for sharing in [Sharing::Shared, Sharing::Private] {
            for block in memory(8, sharing).blocks() {
                assert_eq!(block.host_address() % LARGE_PAGE as u64, 0);
            }
        }
    }

    trait Last {
        fn pfn(self) -> Pfn;
    }

    impl Last for PageCount {
        fn pfn(self) -> Pfn {
            Pfn(self.0)
        }
    }
}
