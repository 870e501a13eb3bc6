//! Moving bytes between an image and guest memory, without a copy in between.
//!
//! The kernel reads and writes guest memory in place (`preadv2`, `pwritev2`), and what it wrote there is marked in the
//! bitmap *after* it was written, as every write of the VMM (see [`crate::dirty`]). KVM's own log does not see it.
//!
//! With direct I/O, memory, offset and length must be multiples of what the host's disk wants. A guest that chose its
//! buffers otherwise is served through a buffer of ours.

use std::io;

use vm_memory::bitmap::{BS, BitmapSlice};
use vm_memory::{GuestAddress, GuestMemoryBackend as _, VolatileSlice};

use super::image::Image;
use crate::ioctls::{self, Emptied, Way};
use crate::memory::Ram;

/// A run of guest memory.
pub(crate) type Run = (GuestAddress, u32);

/// Most runs the kernel takes in one call (`UIO_MAXIOV`).
const RUNS_AT_ONCE: usize = 1024;

/// Zeros to write where a file system cannot make them.
const ZEROS: usize = 64 << 10;

/// Whether a transfer may wait for the host's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Only what the page cache can do at once.
    None,
    /// As long as it takes.
    All,
}

/// A slice of guest memory.
type Slice<'a> = VolatileSlice<'a, BS<'a, umbra_devices::virtio::WriteMarks>>;

/// Move bytes between `image`, from `offset`, and `runs`, all of them or an error.
///
/// Without [`Patience`], `WouldBlock` means that nothing can be said to have happened: do it again, with patience. So does
/// `Unsupported`: this file system can never say whether it would wait.
pub(crate) fn transfer(
    image: &Image,
    ram: &Ram,
    way: Way,
    runs: &[Run],
    offset: u64,
    patience: Patience,
) -> io::Result<()> {
    let slices = slices(ram, runs)?;
    let fits = |n: usize| n.is_multiple_of(usize::try_from(image.alignment()).unwrap_or(usize::MAX));
    let aligned = slices
        .iter()
        .all(|slice| fits(slice.ptr_guard().as_ptr() as usize) && fits(slice.len()));
    if aligned {
        in_place(image, way, &slices, offset, patience)
    } else if patience == Patience::None {
        Err(io::ErrorKind::WouldBlock.into())
    } else {
        through_a_buffer(image, way, &slices, offset)
    }
}

/// Make a run of `image` read as zeros; with `unmap` its space may be given back.
pub(crate) fn write_zeroes(image: &Image, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
    let how = if unmap { Emptied::Hole } else { Emptied::Zeros };
    match ioctls::empty(image.file(), how, offset, bytes) {
        Err(error) if cannot(&error) => write_zeros(image, offset, bytes),
        done => done,
    }
}

/// Give the space of a run of `image` back, if the host can; what it reads as afterwards is nobody's promise.
pub(crate) fn discard(image: &Image, offset: u64, bytes: u64) -> io::Result<()> {
    match ioctls::empty(image.file(), Emptied::Hole, offset, bytes) {
        Err(error) if cannot(&error) => Ok(()),
        done => done,
    }
}

fn cannot(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV)
    )
}

fn write_zeros(image: &Image, offset: u64, bytes: u64) -> io::Result<()> {
    let mut zeros = Aligned::new(ZEROS);
    let (mut at, end) = (offset, offset.saturating_add(bytes));
    while at < end {
        let piece = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROS);
        let whole = zeros.slice(piece);
        in_place(image, Way::Out, &[whole], at, Patience::All)?;
        at += piece as u64;
    }
    Ok(())
}

/// The runs as slices, cut where guest memory is.
fn slices<'a>(ram: &'a Ram, runs: &[Run]) -> io::Result<Vec<Slice<'a>>> {
    let mut slices = Vec::with_capacity(runs.len());
    for (at, len) in runs.iter().filter(|(_, len)| *len > 0) {
        let len = usize::try_from(*len).map_err(io::Error::other)?;
        for slice in ram.get_slices(*at, len) {
            slices.push(slice.map_err(io::Error::other)?);
        }
    }
    Ok(slices)
}

fn in_place<B: BitmapSlice>(
    image: &Image,
    way: Way,
    slices: &[VolatileSlice<'_, B>],
    mut offset: u64,
    patience: Patience,
) -> io::Result<()> {
    let mut rest = slices.to_vec();
    let mut first = 0;
    while first < rest.len() {
        let last = rest.len().min(first + RUNS_AT_ONCE);
        let runs: Vec<libc::iovec> = rest[first..last]
            .iter()
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect();
        let at_once = patience == Patience::None;
        // SAFETY: the slices borrow the memory they lie in, so it stays mapped across the call; guest memory is never
        // referred to by Rust references (see `crate::memory`), and a buffer of ours is borrowed by its slice.
        let moved = match unsafe { ioctls::transfer(image.file(), way, &runs, offset, at_once) } {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Not every file system can say whether it would wait.
            Err(error) if at_once && cannot(&error) => return Err(io::ErrorKind::Unsupported.into()),
            Err(error) => return Err(error),
            Ok(0) if way == Way::In => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(moved) => moved,
        };
        offset += moved as u64;
        let mut left = moved;
        while left > 0 {
            let slice = &rest[first];
            let here = left.min(slice.len());
            if way == Way::In {
                slice.bitmap().mark_dirty(0, here);
            }
            left -= here;
            if here == slice.len() {
                first += 1;
            } else {
                rest[first] = slice.offset(here).map_err(io::Error::other)?;
            }
        }
        if at_once && first < rest.len() {
            // The rest is not in the page cache.
            return Err(io::ErrorKind::WouldBlock.into());
        }
    }
    Ok(())
}

fn through_a_buffer(image: &Image, way: Way, slices: &[Slice<'_>], offset: u64) -> io::Result<()> {
    let bytes: usize = slices.iter().map(VolatileSlice::len).sum();
    let mut buffer = Aligned::new(bytes);
    let copy = |buffer: &mut Aligned| {
        let mut at = 0;
        let whole = buffer.slice(bytes);
        for slice in slices {
            let part = whole.subslice(at, slice.len()).map_err(io::Error::other)?;
            match way {
                Way::In => part.copy_to_volatile_slice(*slice),
                Way::Out => slice.copy_to_volatile_slice(part),
            }
            at += slice.len();
        }
        Ok::<(), io::Error>(())
    };
    if way == Way::Out {
        copy(&mut buffer)?;
    }
    in_place(image, way, &[buffer.slice(bytes)], offset, Patience::All)?;
    if way == Way::In {
        copy(&mut buffer)?;
    }
    Ok(())
}

/// Zeros at an address that every disk accepts for direct I/O.
struct Aligned(Vec<Page>);

#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; 4096]);

impl Aligned {
    fn new(bytes: usize) -> Self {
        Self(vec![Page([0; 4096]); bytes.div_ceil(4096)])
    }

    fn slice(&mut self, bytes: usize) -> VolatileSlice<'_, ()> {
        assert!(bytes <= self.0.len() * 4096, "a slice lies within its buffer");
        // SAFETY: the pages are one allocation of at least `bytes` bytes (asserted above), borrowed exclusively for as
        // long as the slice lives.
        unsafe { VolatileSlice::new(self.0.as_mut_ptr().cast(), bytes) }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use vm_memory::{Bytes as _, GuestMemoryRegion as _};

    use super::*;
    use crate::config::devices::DiskConfig;

    const SECOND: u64 = 0x20_0000;

    fn ram() -> Ram {
        Ram::from_ranges(&[(GuestAddress(0), 0x10_0000), (GuestAddress(SECOND), 0x10_0000)]).unwrap()
    }

    /// An image whose byte `n` is a function of `n`, and its file.
    fn image(pages: u64, direct: bool) -> (Image, tempfile::NamedTempFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..pages * 4096).map(byte).collect();
        file.as_file().write_all_at(&bytes, 0).unwrap();
        let config = DiskConfig {
            path: file.path().to_owned(),
            direct,
            ..DiskConfig::default()
        };
        (Image::open("disk/0", &config, false).unwrap(), file)
    }

    fn byte(n: u64) -> u8 {
        n.wrapping_mul(0x9e37_79b9).to_le_bytes()[2]
    }

    fn at(address: u64, len: u32) -> Run {
        (GuestAddress(address), len)
    }

    fn bytes(ram: &Ram, address: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        ram.read_slice(&mut out, GuestAddress(address)).unwrap();
        out
    }

    fn dirty(ram: &Ram) -> Vec<u64> {
        let mut pages = Vec::new();
        for region in ram.iter() {
            let mapping: &vm_memory::MmapRegion<umbra_devices::virtio::WriteMarks> = region;
            for (word, bits) in (0_u64..).zip(mapping.bitmap().take_words()) {
                let first = region.start_addr().0 / 4096 + word * 64;
                pages.extend((0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| first + bit));
            }
        }
        pages
    }

    #[test]
    fn what_is_read_lands_in_its_runs_and_every_page_of_it_is_dirty() {
        for direct in [false, true] {
            let (image, _file) = image(16, direct);
            let ram = ram();
            let runs = [
                at(0x1000, 4096),
                at(SECOND + 0x3000, 8192),
                at(0x8000, 0),
                at(0x5000, 512),
            ];
            transfer(&image, &ram, Way::In, &runs, 512, Patience::All).unwrap();
            let expected: Vec<u8> = (512..512 + 4096 + 8192 + 512).map(byte).collect();
            let mut got = bytes(&ram, 0x1000, 4096);
            got.extend(bytes(&ram, SECOND + 0x3000, 8192));
            got.extend(bytes(&ram, 0x5000, 512));
            assert!(got == expected, "direct {direct}");
            let second = SECOND / 4096;
            assert_eq!(dirty(&ram), [1, 5, second + 3, second + 4], "direct {direct}");
        }
    }

    #[test]
    fn what_is_written_is_in_the_file_and_makes_no_page_dirty() {
        for direct in [false, true] {
            let (image, file) = image(16, direct);
            let ram = ram();
            ram.write_slice(&[7; 512], GuestAddress(0x1000)).unwrap();
            ram.write_slice(&[8; 512], GuestAddress(0x7000)).unwrap();
            dirty(&ram);
            transfer(
                &image,
                &ram,
                Way::Out,
                &[at(0x1000, 512), at(0x7000, 512)],
                1024,
                Patience::All,
            )
            .unwrap();
            assert_eq!(dirty(&ram), Vec::<u64>::new(), "direct {direct}");
            let mut written = [0; 1026];
            file.as_file().read_exact_at(&mut written, 1023).unwrap();
            assert_eq!(
                (written[0], &written[1..513], &written[513..1025], written[1025]),
                (byte(1023), &[7; 512][..], &[8; 512][..], byte(2048)),
                "direct {direct}"
            );
        }
    }

    #[test]
    fn a_buffer_at_any_address_is_served_also_with_direct_io() {
        let (image, file) = image(16, true);
        let ram = ram();
        transfer(
            &image,
            &ram,
            Way::In,
            &[at(0x1ffd, 100), at(0x4001, 412)],
            512,
            Patience::All,
        )
        .unwrap();
        let mut got = bytes(&ram, 0x1ffd, 100);
        got.extend(bytes(&ram, 0x4001, 412));
        assert_eq!(got, (512..1024).map(byte).collect::<Vec<_>>());
        assert_eq!(dirty(&ram), [1, 2, 4]);
        transfer(
            &image,
            &ram,
            Way::Out,
            &[at(0x1ffd, 100), at(0x4001, 412)],
            8192,
            Patience::All,
        )
        .unwrap();
        let mut written = [0; 512];
        file.as_file().read_exact_at(&mut written, 8192).unwrap();
        assert_eq!(written.to_vec(), got);
    }

    #[test]
    fn a_file_that_shrank_under_a_guest_is_an_error_and_no_short_read() {
        let (image, file) = image(2, false);
        file.as_file().set_len(4096).unwrap();
        let ram = ram();
        let error = transfer(&image, &ram, Way::In, &[at(0, 8192)], 0, Patience::All).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(dirty(&ram), [0], "what arrived is in memory all the same");
        assert!(transfer(&image, &ram, Way::In, &[at(0xf_f000, 8192)], 0, Patience::All).is_err());
    }

    #[test]
    fn more_runs_than_the_kernel_takes_at_once_are_moved_all_the_same() {
        let (image, _file) = image(300, false);
        let ram = ram();
        let runs: Vec<Run> = (0..2100).map(|n| at(n * 480, 479)).collect();
        transfer(&image, &ram, Way::In, &runs, 0, Patience::All).unwrap();
        for (n, (GuestAddress(address), len)) in (0_u64..).zip(&runs) {
            let expected: Vec<u8> = (n * 479..(n + 1) * 479).map(byte).collect();
            assert!(bytes(&ram, *address, *len as usize) == expected, "run {n}");
        }
    }

    #[test]
    fn impatience_moves_everything_or_would_block() {
        let (image, _file) = image(16, false);
        let ram = ram();
        // Just written, and so in the page cache; a file system that cannot tell says that it would block.
        match transfer(&image, &ram, Way::In, &[at(0, 65_536)], 0, Patience::None) {
            Ok(()) => assert_eq!(bytes(&ram, 0, 65_536), (0..65_536).map(byte).collect::<Vec<_>>()),
            Err(error) => assert!(matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Unsupported
            )),
        }
    }

    #[test]
    fn what_is_emptied_reads_as_zeros_and_its_neighbours_as_before() {
        let (image, file) = image(16, false);
        for (from, unmap) in [(4096, false), (3 * 4096, true)] {
            write_zeroes(&image, from, 4096, unmap).unwrap();
            let mut around = vec![0; 4096 + 2];
            file.as_file().read_exact_at(&mut around, from - 1).unwrap();
            assert_eq!((around[0], around[4097]), (byte(from - 1), byte(from + 4096)));
            assert!(around[1..4097].iter().all(|byte| *byte == 0));
        }
        discard(&image, 8 * 4096, 4096).unwrap();
        write_zeros(&image, 5 * 4096 + 512, 512).unwrap();
        let mut around = [0; 514];
        file.as_file().read_exact_at(&mut around, 5 * 4096 + 511).unwrap();
        assert_eq!((around[0], around[513]), (byte(5 * 4096 + 511), byte(5 * 4096 + 1024)));
        assert!(around[1..513].iter().all(|byte| *byte == 0));
        assert_eq!(file.as_file().metadata().unwrap().len(), 16 * 4096);
    }
}
