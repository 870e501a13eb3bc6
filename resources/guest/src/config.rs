//! The command line: `key=value` words, parsed once into a [`Config`] that cannot be wrong.
//!
//! A word that is not understood stops the guest with one clear line: a test that silently ran another
//! workload than it asked for would be worse than one that did not run.

/// Most vCPUs the kernel has stacks, task states and timer vectors for (`boot.s`, CPUS).
pub const CPUS_MAX: usize = 8;

/// What the vCPUs do between beats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Nothing: halt until the next beat.
    Idle,
    /// Rewrite pages of the working set.
    Dirty,
    /// Arithmetic with a checked result.
    Compute,
    /// Disk requests as fast as they are answered, timed.
    Blk,
    /// A disk that proves itself ([`crate::disk`]).
    BlkCheck,
    /// Answers ARP, pings and datagrams, and streams them when asked to.
    Net,
    /// Asks for random numbers and checks that they look like it.
    Rng,
}

impl Work {
    /// The word that selects it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Dirty => "dirty",
            Self::Compute => "compute",
            Self::Blk => "blk",
            Self::BlkCheck => "blkcheck",
            Self::Net => "net",
            Self::Rng => "rng",
        }
    }

    /// Whether it needs a virtio device.
    pub fn drives_a_device(self) -> bool {
        matches!(self, Self::Blk | Self::BlkCheck | Self::Net | Self::Rng)
    }
}

/// What is asked of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// To read.
    Read,
    /// To write.
    Write,
    /// Half of each.
    Mixed,
    /// `work=blkcheck`: to read all of it once, and stop.
    Verify,
}

impl Op {
    /// The word that selects it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Mixed => "mixed",
            Self::Verify => "verify",
        }
    }
}

/// How a driver learns that its device is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// By looking at the ring all the time.
    Poll,
    /// By an interrupt, asleep until then.
    Irq,
}

/// Where a virtio-mmio device is, as the VMM says on the command line (Linux,
/// Documentation/admin-guide/kernel-parameters: `virtio_mmio.device=<size>@<base>:<irq>[:<id>]`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Guest-physical address of its registers.
    pub base: u64,
    /// Its interrupt line.
    pub irq: u32,
}

/// Most windows of which note is taken.
pub const WINDOWS_MAX: usize = 32;

/// Which page of the working set is written next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Any page, equally likely.
    Uniform,
    /// Few pages often, most seldom; the ranking is shuffled over the address space.
    Zipf,
    /// In address order, round after round, which keeps one edge in memory: pages before the cursor are one
    /// version ahead of those after it.
    Seq,
    /// Uniform over a hot eighth of the pages, which moves on every `phase`.
    Phase,
}

/// What pages hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// See [`crate::proof::Class::Zero`].
    Zero,
    /// See [`crate::proof::Class::Counter`].
    Counter,
    /// See [`crate::proof::Class::Text`].
    Text,
    /// See [`crate::proof::Class::Random`].
    Random,
    /// The four classes in turn, by page number.
    Mixed,
}

/// An amount of memory that may also be "whatever is left".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    /// So many bytes.
    Bytes(u64),
    /// All that remains.
    All,
}

/// What the guest was asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// vCPUs used, 1 ..= [`CPUS_MAX`].
    pub cpus: usize,
    /// RAM to use, if the loader's map is not to be believed or to be used whole.
    pub mem_bytes: Option<u64>,
    /// What the vCPUs do.
    pub work: Work,
    /// Bytes of pages dirtied per second over all vCPUs; 0 means as fast as possible.
    pub rate: u64,
    /// Working set; `None` is 64 MiB or half of what there is.
    pub wss_bytes: Option<u64>,
    /// Which page next.
    pub pattern: Pattern,
    /// How often the hot set of [`Pattern::Phase`] moves.
    pub phase_us: u64,
    /// Exponent of [`Pattern::Zipf`], in thousandths.
    pub zipf_milli: u32,
    /// What pages hold.
    pub content: Content,
    /// Memory beyond the working set, written once.
    pub fill: Amount,
    /// Heartbeat period; 0 means none.
    pub beat_us: u64,
    /// Check each page before rewriting it.
    pub verify: bool,
    /// Check all pages, slowly, in the background.
    pub scrub: bool,
    /// Keep patterns in AVX-512 registers too.
    pub simd: bool,
    /// Stop with exit code 0 after so long.
    pub run_us: Option<u64>,
    /// What is asked of a disk.
    pub op: Op,
    /// Bytes of a disk request of [`Work::Blk`].
    pub request_bytes: u32,
    /// Disk requests at once.
    pub depth: u16,
    /// How much of a disk is used, from its start.
    pub span_bytes: u64,
    /// How long [`Work::Blk`] measures.
    pub measure_us: u64,
    /// How drivers learn that a device is done.
    pub wait: Wait,
    /// Our IPv4 address.
    pub ip: [u8; 4],
    /// Where devices are; the first `window_count` of them.
    pub windows: [Window; WINDOWS_MAX],
    /// How many.
    pub window_count: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cpus: 1,
            mem_bytes: None,
            work: Work::Idle,
            rate: 100 << 20,
            wss_bytes: None,
            pattern: Pattern::Uniform,
            phase_us: 2_000_000,
            zipf_milli: 1000,
            content: Content::Counter,
            fill: Amount::Bytes(0),
            beat_us: 1000,
            verify: true,
            scrub: true,
            simd: false,
            run_us: None,
            op: Op::Mixed,
            request_bytes: 4096,
            depth: 16,
            span_bytes: 64 << 20,
            measure_us: 5_000_000,
            wait: Wait::Poll,
            ip: [10, 0, 0, 2],
            windows: [Window { base: 0, irq: 0 }; WINDOWS_MAX],
            window_count: 0,
        }
    }
}

/// A word of the command line that was not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadOption<'a> {
    /// The word as given.
    pub word: &'a str,
    /// What would have been right in its place.
    pub expected: &'static str,
}

impl Config {
    /// Reads a command line.
    ///
    /// ```
    /// # use umbra_guest::config::*;
    /// let config = Config::parse("cpus=2 work=dirty rate=1G").unwrap();
    /// assert_eq!((config.cpus, config.rate), (2, 1 << 30));
    /// assert_eq!(Config::parse("cpus=9").unwrap_err().expected, "1 to 8");
    /// ```
    pub fn parse(line: &str) -> Result<Self, BadOption<'_>> {
        let mut config = Self::default();
        for word in line.split_ascii_whitespace() {
            config.apply(word).map_err(|expected| BadOption { word, expected })?;
        }
        Ok(config)
    }

    fn apply(&mut self, word: &str) -> Result<(), &'static str> {
        let (key, value) = word.split_once('=').ok_or("key=value")?;
        match key {
            "cpus" => {
                let cpus = integer(value)
                    .filter(|n| (1..=CPUS_MAX as u64).contains(n))
                    .ok_or("1 to 8")?;
                self.cpus = cpus as usize;
            }
            "mem" => self.mem_bytes = Some(bytes(value).filter(|&n| n > 0).ok_or(BYTES)?),
            "work" => {
                self.work = match value {
                    "idle" => Work::Idle,
                    "dirty" => Work::Dirty,
                    "compute" => Work::Compute,
                    "blk" => Work::Blk,
                    "blkcheck" => Work::BlkCheck,
                    "net" => Work::Net,
                    "rng" => Work::Rng,
                    _ => return Err("idle, dirty, compute, blk, blkcheck, net or rng"),
                }
            }
            "rate" => self.rate = bytes(value).ok_or("bytes per second such as 100M, or 0 for no limit")?,
            "wss" => self.wss_bytes = Some(bytes(value).filter(|&n| n >= 4096).ok_or(BYTES)?),
            "pattern" => {
                self.pattern = match value {
                    "uniform" => Pattern::Uniform,
                    "zipf" => Pattern::Zipf,
                    "seq" => Pattern::Seq,
                    "phase" => Pattern::Phase,
                    _ => return Err("uniform, zipf, seq or phase"),
                }
            }
            "phase" => self.phase_us = duration_us(value).filter(|&us| us > 0).ok_or(DURATION)?,
            "zipf" => {
                self.zipf_milli = thousandths(value)
                    .filter(|&s| s <= 4000)
                    .ok_or("an exponent from 0 to 4, such as 1.0")?;
            }
            "content" => {
                self.content = match value {
                    "zero" => Content::Zero,
                    "counter" => Content::Counter,
                    "text" => Content::Text,
                    "random" => Content::Random,
                    "mixed" => Content::Mixed,
                    _ => return Err("zero, counter, text, random or mixed"),
                }
            }
            "fill" if value == "all" => self.fill = Amount::All,
            "fill" => self.fill = Amount::Bytes(bytes(value).ok_or("bytes such as 64M, or all")?),
            "beat" => {
                self.beat_us = integer(value)
                    .filter(|&us| us == 0 || (200..=1_000_000).contains(&us))
                    .ok_or("a period in us from 200 to 1000000, or 0 for none")?;
            }
            "verify" => self.verify = switch(value)?,
            "scrub" => self.scrub = switch(value)?,
            "simd" => self.simd = switch(value)?,
            "run" => self.run_us = Some(duration_us(value).filter(|&us| us > 0).ok_or(DURATION)?),
            "op" => {
                self.op = match value {
                    "read" => Op::Read,
                    "write" => Op::Write,
                    "mixed" => Op::Mixed,
                    "verify" => Op::Verify,
                    _ => return Err("read, write, mixed or verify"),
                }
            }
            "bs" => {
                let right = bytes(value).filter(|&n| n > 0 && n % 512 == 0 && n <= REQUEST_BYTES_MAX);
                self.request_bytes = right.ok_or("a multiple of 512 up to 256K")? as u32;
            }
            "depth" => {
                let right = integer(value).filter(|n| (1..=u64::from(DEPTH_MAX)).contains(n));
                self.depth = right.ok_or("1 to 64")? as u16;
            }
            "span" => {
                let right = bytes(value).filter(|n| (4096..=SPAN_BYTES_MAX).contains(n));
                self.span_bytes = right.ok_or("bytes such as 64M, from 4K to 16G")? & !4095;
            }
            "seconds" => self.measure_us = duration_us(value).filter(|&us| us > 0).ok_or(DURATION)?,
            "wait" => {
                self.wait = match value {
                    "poll" => Wait::Poll,
                    "irq" => Wait::Irq,
                    _ => return Err("poll or irq"),
                }
            }
            "ip" => self.ip = ipv4(value).ok_or("an address such as 10.0.0.2")?,
            "virtio_mmio.device" => {
                let window = window(value).ok_or("size@address:irq, such as 4K@0xd0000000:5")?;
                let place = self.windows.get_mut(self.window_count).ok_or("at most 32 devices")?;
                *place = window;
                self.window_count += 1;
            }
            _ => {
                return Err(
                    "cpus, mem, work, rate, wss, pattern, phase, zipf, content, fill, beat, verify, scrub, simd, run, \
                     op, bs, depth, span, seconds, wait, ip or virtio_mmio.device",
                );
            }
        }
        Ok(())
    }

    /// Where devices are.
    pub fn windows(&self) -> &[Window] {
        &self.windows[..self.window_count]
    }
}

/// Most disk requests at once.
pub const DEPTH_MAX: u16 = 64;
/// Largest disk request.
pub const REQUEST_BYTES_MAX: u64 = 256 << 10;
/// A disk that proves itself has eight bytes of guest memory per block.
const SPAN_BYTES_MAX: u64 = 16 << 30;

fn ipv4(text: &str) -> Option<[u8; 4]> {
    let mut address = [0; 4];
    let mut parts = text.split('.');
    for byte in &mut address {
        *byte = u8::try_from(integer(parts.next()?)?).ok()?;
    }
    parts.next().is_none().then_some(address)
}

/// The size of a window is always a page or less: it is read and not used.
fn window(text: &str) -> Option<Window> {
    let (size, rest) = text.split_once('@')?;
    let (base, rest) = rest.split_once(':')?;
    bytes(size)?;
    let irq = rest.split(':').next()?;
    let base = u64::from_str_radix(base.strip_prefix("0x")?, 16).ok()?;
    // Below 4 GiB: the boot page tables reach no further.
    let fits = (1 << 20..(1 << 32) - 4096).contains(&base);
    let irq = u32::try_from(integer(irq)?).ok()?;
    fits.then_some(Window { base, irq })
}

const BYTES: &str = "bytes such as 64M";
const DURATION: &str = "a time such as 2s or 500ms";

fn integer(text: &str) -> Option<u64> {
    // `parse` alone would also take a leading '+'.
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Digits with an optional binary suffix: K, M or G.
fn bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let n = integer(digits)?;
    // No machine has an exabyte: refusing it here keeps every later sum from overflowing.
    n.checked_mul(1 << shift).filter(|&n| n < 1 << 60)
}

/// Seconds, or a number with `s`, `ms` or `us`.
fn duration_us(text: &str) -> Option<u64> {
    let (digits, unit_us) = if let Some(digits) = text.strip_suffix("us") {
        (digits, 1)
    } else if let Some(digits) = text.strip_suffix("ms") {
        (digits, 1000)
    } else {
        (text.strip_suffix('s').unwrap_or(text), 1_000_000)
    };
    // A century is enough, and its TSC ticks still fit in 64 bits.
    integer(digits)?
        .checked_mul(unit_us)
        .filter(|&us| us < 3_200_000_000_000_000)
}

/// A decimal number with at most three places, in thousandths.
fn thousandths(text: &str) -> Option<u32> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if fraction.len() > 3 {
        return None;
    }
    let mut milli = integer(whole)?.checked_mul(1000)?;
    let mut place = 100;
    for digit in fraction.bytes() {
        milli += u64::from((digit as char).to_digit(10)?) * place;
        place /= 10;
    }
    u32::try_from(milli).ok()
}

fn switch(text: &str) -> Result<bool, &'static str> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("on or off"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_line_means_the_defaults() {
        assert_eq!(Config::parse("").unwrap(), Config::default());
        assert_eq!(Config::parse("  \t ").unwrap(), Config::default());
    }

    #[test]
    fn every_key_is_understood() {
        let line = "cpus=4 mem=256M work=dirty rate=0 wss=8M pattern=zipf phase=500ms zipf=0.75 content=mixed \
                    fill=all beat=200 verify=off scrub=off simd=on run=10 op=write bs=64K depth=32 span=1M \
                    seconds=500ms wait=irq ip=192.168.0.9 virtio_mmio.device=4K@0xd0000000:5 \
                    virtio_mmio.device=512@0xfeb00e00:12:3";
        let mut windows = Config::default().windows;
        windows[0] = Window {
            base: 0xd000_0000,
            irq: 5,
        };
        windows[1] = Window {
            base: 0xfeb0_0e00,
            irq: 12,
        };
        let expected = Config {
            cpus: 4,
            mem_bytes: Some(256 << 20),
            work: Work::Dirty,
            rate: 0,
            wss_bytes: Some(8 << 20),
            pattern: Pattern::Zipf,
            phase_us: 500_000,
            zipf_milli: 750,
            content: Content::Mixed,
            fill: Amount::All,
            beat_us: 200,
            verify: false,
            scrub: false,
            simd: true,
            run_us: Some(10_000_000),
            op: Op::Write,
            request_bytes: 64 << 10,
            depth: 32,
            span_bytes: 1 << 20,
            measure_us: 500_000,
            wait: Wait::Irq,
            ip: [192, 168, 0, 9],
            windows,
            window_count: 2,
        };
        assert_eq!(Config::parse(line).unwrap(), expected);
    }

    #[test]
    fn a_word_not_understood_is_named() {
        for word in [
            "cpus=0",
            "cpus=9",
            "cpus=+1",
            "cpus",
            "mem=",
            "mem=0",
            "work=Dirty",
            "rate=-1",
            "rate=99999999999G",
            "wss=4095",
            "zipf=4.001",
            "zipf=1.0000",
            "zipf=",
            "beat=199",
            "beat=1000001",
            "verify=yes",
            "run=0",
            "phase=2m",
            "quiet",
            "color=red",
            "content=",
            "fill=some",
            "pattern=lru",
            "mem=M",
            "op=erase",
            "bs=0",
            "bs=511",
            "bs=1M",
            "depth=0",
            "depth=65",
            "span=4095",
            "wait=maybe",
            "ip=10.0.0",
            "ip=10.0.0.256",
            "ip=10.0.0.1.2",
            "virtio_mmio.device=4K@d0000000:5",
            "virtio_mmio.device=4K@0xd0000000",
            "virtio_mmio.device=4K@0x1d0000000:5",
        ] {
            let line = format!("beat=500 {word} cpus=2");
            assert_eq!(Config::parse(&line).unwrap_err().word, word);
        }
    }
}
