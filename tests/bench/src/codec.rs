//! What pages become, and how quickly: through the encoder that ships them, without guests and networks, but for the last
//! figure.
//!
//! | content | before and after |
//! |---|---|
//! | counter, text, random | the classes of `resources/guest/src/proof.rs`, each page written anew in the next version |
//! | keyvalue | the heap of a [process](store) that keeps values under keys and updates them, read from outside |
//! | mixed | of ten pages four are counters, one is zeros and one the same, two are text, two are random |
//!
//! What is dirty is a page that differs from what it held before, but for *mixed*, where every page counts. Versions are shipped
//! until contents are kept and the choice of compression has settled, at a link of 1 Gbit/s; then each version is a sample.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use umbra_core::choose::Chooser;
use umbra_core::digest::is_zero;
use umbra_core::guest::{GuestError, PageBytes, PageReader, Space};
use umbra_core::ledger::{Base, Owed};
use umbra_core::pack::{Compression, Packer};
use umbra_core::source::{DEFAULT_CACHE, Encoder, Plan};
use umbra_e2e::World;
use umbra_e2e::linux::LinuxGuest;
use umbra_units::{Bandwidth, BatchId, Bytes, Epoch, PAGE_SIZE, PageCount, PageId, Pfn, Rng, SpaceId};

use crate::figure::{Aim, Figure};

/// What the first argument is when this program is to be the store.
pub(crate) const STORE: &str = "--be-a-store";
/// Pages of the generated contents: 16 MiB, more than the processor's caches hold.
const PAGES: u64 = 4096;
/// Pages of a batch, as a source ships them.
const BATCH: usize = 64;
/// Versions shipped before the first sample.
const SETTLING: u64 = 6;

/// An image of memory that is being shipped.
struct Image(Vec<u8>);

impl PageReader for Image {
    fn read_pages(&self, _space: SpaceId, pages: &[Pfn], out: &mut Vec<u8>) -> Result<(), GuestError> {
        for pfn in pages {
            let at = usize::try_from(pfn.0).expect("a page of the image") * PAGE_SIZE;
            out.extend_from_slice(&self.0[at..at + PAGE_SIZE]);
        }
        Ok(())
    }
}

impl Image {
    fn pages(&self) -> u64 {
        (self.0.len() / PAGE_SIZE) as u64
    }

    fn differing(&self, other: &Self) -> Vec<Pfn> {
        let pages = self.0.chunks_exact(PAGE_SIZE).zip(other.0.chunks_exact(PAGE_SIZE));
        let pages = pages.enumerate().filter(|(_, (here, there))| here != there);
        pages.map(|(n, _)| Pfn(n as u64)).collect()
    }
}

/// A source's half, without the source.
struct Shipping {
    encoder: Encoder,
    chooser: Chooser,
    packer: Packer,
    batch: u64,
}

impl Shipping {
    fn new(pages: u64, compression: Compression) -> Self {
        let mut chooser = Chooser::new(compression, 1.0);
        chooser.link(Bandwidth::mbit(1_000));
        Self {
            encoder: Encoder::new(&[Space::ram(PageCount(pages))], DEFAULT_CACHE).keyed(7),
            chooser,
            packer: Packer::new(),
            batch: 0,
        }
    }

    /// Ship these pages; the bytes they became.
    fn ship(&mut self, image: &Image, pages: &[Pfn]) -> Result<u64> {
        let mut shipped = 0;
        for some in pages.chunks(BATCH) {
            self.batch += 1;
            let owed = |pfn: &Pfn| Owed {
                page: PageId::ram(*pfn),
                base: Base::Shipped,
            };
            let plan = Plan {
                batch: BatchId(self.batch),
                epoch: Epoch(1),
                pages: some.iter().map(owed).collect(),
                owed_after: PageCount(0),
                urgent: false,
                captured: false,
                close: None,
                attempt: None,
            };
            let draft = self.encoder.draft(plan, image)?;
            let before = draft.body();
            let method = self.chooser.choose(before, false);
            let began = Instant::now();
            let (bytes, became) = draft.pack(method, &mut self.packer);
            let size = Bytes::of_len(bytes.len());
            self.chooser.packed(method, became, before, size, began.elapsed());
            shipped += size.0;
        }
        Ok(shipped)
    }
}

/// `bytes_per_dirty_*`: bytes that travel for each byte of a dirty page.
pub(crate) fn bytes(samples: usize) -> Result<Vec<Figure>> {
    let all: Vec<Pfn> = (0..PAGES).map(Pfn).collect();
    let generated = |content: fn(u64, u64) -> Content| -> Result<Vec<f64>> {
        let mut shipping = Shipping::new(PAGES, Compression::Auto);
        let mut ratios = Vec::new();
        for version in 0..SETTLING + samples as u64 {
            let shipped = shipping.ship(&image(version, content), &all)?;
            if version >= SETTLING {
                ratios.push(ratio(shipped, PAGES));
            }
        }
        Ok(ratios)
    };
    let figure = |name, most, ratios| Figure::new(name, "bytes/byte", Aim::AtMost(most), ratios);
    Ok(vec![
        figure("bytes_per_dirty_counter", 0.05, generated(|_, _| Content::Counter)?),
        figure("bytes_per_dirty_keyvalue", 0.06, keyvalue(samples)?),
        figure("bytes_per_dirty_text", 0.35, generated(|_, _| Content::Text)?),
        figure("bytes_per_dirty_mixed", 0.25, generated(mixed)?),
        figure("bytes_per_dirty_random", 1.02, generated(|_, _| Content::Random)?),
    ])
}

#[expect(clippy::cast_precision_loss, reason = "a ratio")]
fn ratio(shipped: u64, dirty_pages: u64) -> f64 {
    shipped as f64 / (dirty_pages.max(1) * PAGE_SIZE as u64) as f64
}

/// `encode_throughput`: memory that one core takes in, by lz4. `zero_scan`: how quickly zeros are found, beside reading the
/// same memory and adding it up.
pub(crate) fn speed(samples: usize) -> Result<Vec<Figure>> {
    let all: Vec<Pfn> = (0..PAGES).map(Pfn).collect();
    let mut shipping = Shipping::new(PAGES, Compression::Lz4);
    let mut rates = Vec::new();
    for version in 0..SETTLING + samples as u64 {
        let image = image(version, mixed);
        let began = Instant::now();
        shipping.ship(&image, &all)?;
        let took = began.elapsed();
        if version >= SETTLING {
            rates.push(gigabytes(image.0.len(), took));
        }
    }
    // Written once with something else: memory that was never written is one page of zeros, many times.
    let mut zeros = vec![1u8; 256 << 20];
    zeros.fill(0);
    let mut shares = Vec::new();
    for _ in 0..samples {
        let began = Instant::now();
        let sum = zeros
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
            .fold(0, u64::wrapping_add);
        let read = began.elapsed();
        let began = Instant::now();
        let found = zeros.chunks_exact(PAGE_SIZE).all(|page| {
            let page: &PageBytes = page.try_into().expect("a page");
            is_zero(page)
        });
        let scanned = began.elapsed();
        ensure!(sum == 0 && found, "zeros are zeros");
        shares.push(read.as_secs_f64() / scanned.as_secs_f64());
    }
    Ok(vec![
        Figure::new("encode_throughput", "GB/s", Aim::AtLeast(1.5), rates),
        Figure::new("zero_scan", "ratio", Aim::None, shares),
    ])
}

#[expect(clippy::cast_precision_loss, reason = "a rate")]
fn gigabytes(bytes: usize, took: Duration) -> f64 {
    bytes as f64 / 1e9 / took.as_secs_f64()
}

/// `seed_bytes_linux`: bytes of the first copy of an idle Linux, by lz4, over its memory that is not zeros.
pub(crate) fn linux(samples: usize) -> Result<Vec<Figure>> {
    let world = World::new()?;
    let (here, there) = (world.host("here")?, world.host("there")?);
    let mut ratios = Vec::new();
    for _ in 0..samples {
        let mut linux = here.launch_linux(&LinuxGuest::doing("idle"), &[])?;
        linux.says("umbra-linux: init")?;
        let shadow = there.shadow_for(&here)?;
        // Loopback is quicker than any compression, and would be left alone.
        let protect = json!({ "to": shadow.listen, "peers": [shadow.fingerprint()], "compression": "lz4" });
        linux.vm.process.put("protect", &protect)?;
        linux.vm.is_following()?;
        let status = linux.vm.process.status()?;
        let count = |name: &str| status["counts"][name].as_u64().context("a count of pages");
        let shipped = status["shipped_bytes"].as_u64().context("bytes shipped")?;
        ratios.push(ratio(shipped, count("raw")? + count("dup")?));
        linux.vm.process.kill()?;
        shadow.process.kill()?;
    }
    Ok(vec![Figure::new(
        "seed_bytes_linux",
        "bytes/byte",
        Aim::AtMost(0.5),
        ratios,
    )])
}

/// What a page holds.
#[derive(Clone, Copy)]
enum Content {
    Zero,
    Counter,
    Text,
    Random,
}

/// Of ten pages: four counters, one of zeros and one that stays as it is, two of text, two of noise.
const fn mixed(page: u64, _version: u64) -> Content {
    match page % 10 {
        0..=3 | 5 => Content::Counter,
        4 => Content::Zero,
        6 | 7 => Content::Text,
        _ => Content::Random,
    }
}

/// Every page in this version.
fn image(version: u64, content: fn(u64, u64) -> Content) -> Image {
    let mut image = vec![0; usize::try_from(PAGES).expect("few") * PAGE_SIZE];
    for (n, page) in (0u64..).zip(image.chunks_exact_mut(PAGE_SIZE)) {
        let kind = content(n, version);
        // Of a mix, one counter in five does not count.
        let stays = n % 10 == 5 && matches!(content(4, 0), Content::Zero);
        fill(page, n, if stays { 1 } else { version + 1 }, kind);
    }
    Image(image)
}

/// A page as the tiny kernel writes it: a header of eight words, and a body by its content.
fn fill(page: &mut [u8], number: u64, sequence: u64, content: Content) {
    const WORDS: [&[u8; 8]; 32] = [
        b"the     ",
        b"guest   ",
        b"moves   ",
        b"while   ",
        b"running,",
        b" memory ",
        b"follows ",
        b"pages\n  ",
        b"written ",
        b"before  ",
        b"arrive; ",
        b"after   ",
        b"others, ",
        b"and     ",
        b"nothing ",
        b"is lost\n",
        b"shadow  ",
        b"holds   ",
        b"version ",
        b"number  ",
        b"of each ",
        b"until   ",
        b"network ",
        b"fails,\n ",
        b"then    ",
        b"takes   ",
        b"over.   ",
        b"Nobody  ",
        b"notices ",
        b"except  ",
        b"those   ",
        b"watching",
    ];
    let mut body = Rng::new(number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ sequence << 40);
    let mut place = Rng::new(number);
    let base = place.next_u64();
    let (head, rest) = page.split_at_mut(64);
    match content {
        Content::Zero => return,
        Content::Random => body.fill(rest),
        Content::Text => {
            for word in rest.chunks_exact_mut(8) {
                word.copy_from_slice(WORDS[usize::try_from(body.below(32)).expect("below 32")]);
            }
        }
        Content::Counter => {
            for (n, word) in (8u64..).zip(rest.chunks_exact_mut(8)) {
                let counts = if n % 64 == 63 { sequence } else { 0 };
                let value = base
                    .wrapping_add(n / 8 * 0x1003 + n % 8 * 0x0101_0101)
                    .wrapping_add(counts);
                word.copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    let checksum = body.next_u64();
    let header = [u64::from_le_bytes(*b"UmbraPg1"), number, sequence, 1, checksum, 0, 0, 0];
    for (word, value) in head.chunks_exact_mut(8).zip(header) {
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// Ship a store's memory, again and again while it works.
fn keyvalue(samples: usize) -> Result<Vec<f64>> {
    let mut store = Store::start()?;
    let mut before = store.memory()?;
    let mut shipping = Shipping::new(before.pages(), Compression::Auto);
    let all: Vec<Pfn> = (0..before.pages()).map(Pfn).collect();
    shipping.ship(&before, &all)?;
    let mut ratios = Vec::new();
    for round in 0..SETTLING + samples as u64 {
        store.works()?;
        let after = store.memory()?;
        ensure!(after.pages() == before.pages(), "the store grew");
        let dirty = after.differing(&before);
        let shipped = shipping.ship(&after, &dirty)?;
        if round >= SETTLING {
            ratios.push(ratio(shipped, dirty.len() as u64));
        }
        before = after;
    }
    Ok(ratios)
}

/// The process that keeps values, seen from outside.
struct Store {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<std::process::ChildStdout>,
    /// Where its writable memory is, as it was once it was filled.
    regions: Vec<(u64, u64)>,
}

impl Store {
    fn start() -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg(STORE)
            // One heap that grows in place: nothing of it moves while it is watched.
            .env("MALLOC_MMAP_THRESHOLD_", "1000000000")
            .env("MALLOC_TOP_PAD_", "67108864")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("the store")?;
        let (orders, answers) = (
            child.stdin.take().context("a pipe")?,
            child.stdout.take().context("a pipe")?,
        );
        let mut store = Self {
            child,
            orders,
            answers: BufReader::new(answers),
            regions: Vec::new(),
        };
        store.hears()?;
        store.works()?;
        let maps = fs::read_to_string(format!("/proc/{}/maps", store.child.id()))?;
        let heap = maps.lines().filter(|line| line.ends_with("[heap]"));
        for line in heap {
            let (from, to) = line
                .split_whitespace()
                .next()
                .and_then(|range| range.split_once('-'))
                .context("a range")?;
            store
                .regions
                .push((u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?));
        }
        ensure!(!store.regions.is_empty(), "the store has no heap");
        Ok(store)
    }

    fn hears(&mut self) -> Result<()> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(line == "done\n", "the store said {line:?}");
        Ok(())
    }

    /// One round of updates, after which it waits.
    fn works(&mut self) -> Result<()> {
        self.orders.write_all(b"work\n")?;
        self.hears()
    }

    fn memory(&self) -> Result<Image> {
        let file = File::open(format!("/proc/{}/mem", self.child.id()))?;
        let mut memory = Vec::new();
        for (from, to) in &self.regions {
            let at = memory.len();
            memory.resize(at + usize::try_from(to - from)?, 0);
            file.read_exact_at(&mut memory[at..], *from)?;
        }
        Ok(Image(memory))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // It ends with its standard input anyway; whether it has ended already does not matter.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Be the store: 100,000 sessions under text keys in a hash map, each value an allocation of its own with an identity, a
/// token, a counter and a time, padded to 120 to 376 bytes. A round updates 4,000 of them, the busy ones more often: four in
/// five count and take the time in place, as a store does that increments; one in five gets a new value in a new
/// allocation, as a store does that sets.
pub(crate) fn store() -> Result<()> {
    const SESSIONS: u64 = 100_000;
    const UPDATES: u64 = 4_000;
    let mut rng = Rng::new(1);
    let mut clock = 1_700_000_000_000u64;
    let mut sessions = HashMap::new();
    for n in 0..SESSIONS {
        sessions.insert(format!("session:{n:08}"), value(&mut rng, n, clock));
    }
    println!("done");
    for _ in std::io::stdin().lines() {
        for _ in 0..UPDATES {
            // The product of two chances: a tenth of the sessions get half of the updates.
            let n = rng.below(SESSIONS) * rng.below(SESSIONS) / SESSIONS;
            let session = sessions.get_mut(&format!("session:{n:08}")).context("a session")?;
            clock += rng.below(50);
            if rng.below(5) == 0 {
                *session = value(&mut rng, n, clock);
            } else {
                let count = u64::from_le_bytes(session[40..48].try_into()?) + 1;
                session[40..48].copy_from_slice(&count.to_le_bytes());
                session[48..56].copy_from_slice(&clock.to_le_bytes());
            }
        }
        println!("done");
    }
    Ok(())
}

fn value(rng: &mut Rng, n: u64, clock: u64) -> Vec<u8> {
    let mut value = format!("{{\"user\":{n:08},\"lang\":\"en\"}}").into_bytes();
    value.resize(56, b' ');
    value[40..48].fill(0);
    value[48..56].copy_from_slice(&clock.to_le_bytes());
    let mut token = [0; 16];
    rng.fill(&mut token);
    value.extend_from_slice(&token);
    let len = 120 + usize::try_from(n * 7919 % 257).expect("small");
    value.extend(
        "{\"cart\":[],\"seen\":[\"/\",\"/list\",\"/item\"],\"flags\":0}"
            .bytes()
            .cycle()
            .take(len - value.len()),
    );
    value
}
