//! `umbra heat`: which memory is written how often, as text and as a picture; and what it means for the next move.

use core::fmt::Write;
use std::io::BufWriter;
use std::path::Path;

use umbra_core::heat::{Class, ClassCounts, HeatMap};
use umbra_core::source::SourceStatus;
use umbra_units::{Bytes, PAGE_SIZE};

use crate::api::client::Client;
use crate::api::types::{DebtFloor, DirtyWithin, Heat, HeatClasses, Outlook, RegionHeat, SpaceHeat, ms};
use crate::args::HeatArgs;
use crate::exit::{Code, Failure};
use crate::{limits, process, say};

/// Regions in the table of the hottest.
const TOP: usize = 10;
/// Rows of the text: as many as a screen has.
const ROWS: usize = 32;
/// Pixels that a region is wide and high in a picture.
const POINT: usize = 4;

/// `umbra heat`.
pub(crate) fn run(args: &HeatArgs) -> Result<Code, Failure> {
    let client = Client::new(&args.target.api_socket);
    let width = usize::from(args.width);
    let regions = if args.png.is_some() {
        limits::HEAT_REGIONS
    } else {
        width * ROWS
    };
    let ask = format!("heat?regions={}", regions.min(limits::HEAT_REGIONS));
    let runtime = process::small_runtime()?;
    if args.json {
        let bytes = runtime.block_on(client.get_bytes(&ask))?;
        say::line(String::from_utf8_lossy(&bytes));
        return Ok(Code::Success);
    }
    let heat: Heat = runtime.block_on(client.get(&ask))?;
    if let Some(file) = &args.png {
        let memory = heat
            .spaces
            .first()
            .ok_or_else(|| Failure::failed("the guest has no memory"))?;
        let wide = square(memory.regions.len());
        write_png(file, memory, wide).map_err(Failure::on(file.display()))?;
    }
    for space in &heat.spaces {
        say::line(text(&coarser(space, width * ROWS), width));
    }
    Ok(Code::Success)
}

/// The side of the square that holds so many points: a power of two.
fn square(points: usize) -> usize {
    let mut side = 1;
    while side * side < points {
        side *= 2;
    }
    side
}

/// The same in at most so many regions.
fn coarser(space: &SpaceHeat, most: usize) -> SpaceHeat {
    let mut together = 1;
    while space.regions.len().div_ceil(together) > most {
        together *= 2;
    }
    let joined = space.regions.chunks(together).map(|regions| {
        let mut all = RegionHeat::default();
        for region in regions {
            all.classes.add(&region.classes);
            all.writes_per_second += region.writes_per_second;
            all.hottest_per_second = all.hottest_per_second.max(region.hottest_per_second);
        }
        all
    });
    SpaceHeat {
        region_pages: space.region_pages * together as u64,
        regions: joined.collect(),
        ..*space
    }
}

/// A space as rows of characters, the hottest regions, and how much there is of each class.
fn text(space: &SpaceHeat, width: usize) -> String {
    let mut out = String::new();
    let size = |pages: u64| Bytes(pages.saturating_mul(PAGE_SIZE as u64)).to_string();
    let _ = writeln!(
        out,
        "space {}: {}, {} to a character",
        space.space,
        size(space.pages),
        size(space.region_pages)
    );
    for (row, regions) in space.regions.chunks(width).enumerate() {
        let first = (row * width) as u64 * space.region_pages;
        let line: String = regions.iter().map(|region| sign(look(&region.classes))).collect();
        let _ = writeln!(out, "{:>12x}  {line}", first.saturating_mul(PAGE_SIZE as u64));
    }
    let mut all = HeatClasses::default();
    space.regions.iter().for_each(|region| all.add(&region.classes));
    let _ = writeln!(out);
    for (class, (name, pages)) in Class::ALL.into_iter().zip(all.named()) {
        let _ = writeln!(
            out,
            "  {}  {name:<9}{pages:>10} pages  {:>10}",
            sign(Some(class)),
            size(pages)
        );
    }
    let mut hottest: Vec<(usize, &RegionHeat)> = space.regions.iter().enumerate().collect();
    hottest.retain(|(_, region)| region.writes_per_second > 0.0);
    hottest.sort_by(|(_, a), (_, b)| b.writes_per_second.total_cmp(&a.writes_per_second));
    if !hottest.is_empty() {
        let _ = writeln!(out, "\n     address  pages written/s  hottest page/s  hot pages");
    }
    for (at, region) in hottest.into_iter().take(TOP) {
        let address = at as u64 * space.region_pages * PAGE_SIZE as u64;
        let _ = writeln!(
            out,
            "{address:>12x}  {:>15.1}  {:>14.1}  {:>9}",
            region.writes_per_second,
            region.hottest_per_second,
            region.classes.hot + region.classes.deferred
        );
    }
    out.truncate(out.trim_end().len());
    out
}

/// What a region looks like: the hottest class that an eighth of its pages has; `None` where there is no memory.
fn look(classes: &HeatClasses) -> Option<Class> {
    let pages: Vec<(Class, u64)> = Class::ALL
        .into_iter()
        .zip(classes.named().map(|(_, pages)| pages))
        .collect();
    let all: u64 = pages.iter().map(|(_, pages)| pages).sum();
    let heated = pages
        .iter()
        .rev()
        .take(3)
        .find(|(_, pages)| all > 0 && pages * 8 >= all);
    let most = || pages.iter().max_by_key(|(_, pages)| *pages).filter(|_| all > 0);
    heated.or_else(most).map(|(class, _)| *class)
}

const fn sign(class: Option<Class>) -> char {
    match class {
        None => ' ',
        Some(Class::Free) => '.',
        Some(Class::Cold) => '-',
        Some(Class::Warm) => '+',
        Some(Class::Hot) => '#',
        Some(Class::Deferred) => 'D',
    }
}

/// From black over blue and red to white.
fn colour(region: &RegionHeat) -> [u8; 3] {
    match look(&region.classes) {
        None => [0, 0, 0],
        Some(Class::Free) => [24, 24, 32],
        Some(Class::Cold) => [32, 48, 128],
        Some(Class::Warm) => [160, 64, 128],
        Some(Class::Hot) => [240, 96, 32],
        Some(Class::Deferred) => [255, 224, 96],
    }
}

/// Write a space as a picture, `wide` regions in a row.
fn write_png(file: &Path, space: &SpaceHeat, wide: usize) -> Result<(), Box<dyn std::error::Error>> {
    let high = space.regions.len().div_ceil(wide).max(1);
    let mut pixels = Vec::with_capacity(wide * high * POINT * POINT * 3);
    for row in 0..high {
        let points: Vec<[u8; 3]> = (0..wide)
            .map(|column| space.regions.get(row * wide + column).map_or([0; 3], colour))
            .collect();
        let line: Vec<u8> = points.iter().flat_map(|point| point.repeat(POINT)).collect();
        (0..POINT).for_each(|_| pixels.extend_from_slice(&line));
    }
    let out = BufWriter::new(std::fs::File::create(file)?);
    let side = |regions: usize| u32::try_from(regions * POINT);
    let mut encoder = png::Encoder::new(out, side(wide)?, side(high)?);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels)?;
    writer.finish()?;
    Ok(())
}

/// What an operator wants to know before a move: lines for the status.
pub(crate) fn outlook(outlook: &Outlook) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    let classes: Vec<String> = outlook
        .classes
        .named()
        .iter()
        .map(|(name, pages)| format!("{pages} {name}"))
        .collect();
    lines.push(("heat", classes.join(", ")));
    if !outlook.dirty.is_empty() {
        let rates: Vec<String> = outlook
            .dirty
            .iter()
            .map(|dirty| format!("{:.0} over {:.0} ms", dirty.pages_per_second, dirty.span_ms))
            .collect();
        lines.push(("pages written/s", rates.join(", ")));
    }
    if let Some(floor) = outlook.floor {
        let pause = floor
            .pause_ms
            .map_or_else(|| "no link".to_owned(), |ms| format!("{ms:.1} ms"));
        let verdict = match (outlook.converges, outlook.needs_mbit) {
            (Some(true), _) => "within the limit".to_owned(),
            (Some(false), Some(needs)) => format!("beyond the limit; {needs:.0} Mbit/s would do"),
            (Some(false), None) => "beyond the limit over any link".to_owned(),
            (None, _) => "not known yet".to_owned(),
        };
        lines.push(("comes down to", format!("{} pages, {pause}: {verdict}", floor.pages)));
    }
    if let Some(obstacle) = &outlook.obstacle {
        lines.push(("waits because", obstacle.clone()));
    }
    lines
}

impl Outlook {
    /// What a source expects of its debt.
    pub(crate) fn of(source: &SourceStatus) -> Self {
        use umbra_core::convergence::Floor;
        let core = &source.outlook;
        let floor = |floor: Floor| DebtFloor {
            pages: floor.pages.0,
            pause_ms: (floor.pause < core::time::Duration::MAX).then(|| ms(floor.pause)),
        };
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let dirty = core.dirty.iter().map(|(span, pages)| DirtyWithin {
            span_ms: ms(*span),
            pages: pages.0,
            pages_per_second: pages.0 as f64 / span.as_secs_f64().max(1e-6),
        });
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let needs_mbit = core.needs.map(|rate| rate.0 as f64 * 8.0 / 1e6);
        Self {
            order: source.order.into(),
            harvest_ms: ms(source.pace),
            dirty: dirty.collect(),
            link_pages_per_second: core.capacity,
            floor_round: core.floor_round.map(floor),
            floor_cold: core.floor_cold.map(floor),
            floor: core.floor.map(floor),
            converges: core.converges,
            needs_mbit,
            obstacle: source.obstacle.clone(),
            classes: source.classes.into(),
        }
    }
}

impl HeatClasses {
    /// Each class by its name, coldest first.
    pub(crate) fn named(&self) -> [(&'static str, u64); 5] {
        let pages = [self.free, self.cold, self.warm, self.hot, self.deferred];
        core::array::from_fn(|n| (Class::ALL[n].name(), pages[n]))
    }

    fn add(&mut self, other: &Self) {
        self.free += other.free;
        self.cold += other.cold;
        self.warm += other.warm;
        self.hot += other.hot;
        self.deferred += other.deferred;
    }
}

impl From<ClassCounts> for HeatClasses {
    fn from(counts: ClassCounts) -> Self {
        let [free, cold, warm, hot, deferred] = counts.0;
        Self {
            free,
            cold,
            warm,
            hot,
            deferred,
        }
    }
}

impl From<HeatMap> for Heat {
    fn from(map: HeatMap) -> Self {
        let region = |region: &umbra_core::heat::Region| RegionHeat {
            classes: region.classes.into(),
            writes_per_second: region.rate.0,
            hottest_per_second: region.hottest.0,
        };
        let space = |space: umbra_core::heat::SpaceHeat| SpaceHeat {
            space: space.space.0,
            pages: space.pages.0,
            region_pages: space.region.0,
            regions: space.regions.iter().map(region).collect(),
        };
        Self {
            spaces: map.spaces.into_iter().map(space).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classes(free: u64, cold: u64, hot: u64) -> HeatClasses {
        HeatClasses {
            free,
            cold,
            hot,
            ..HeatClasses::default()
        }
    }

    fn space() -> SpaceHeat {
        let region = |classes, rate| RegionHeat {
            classes,
            writes_per_second: rate,
            hottest_per_second: rate / 2.0,
        };
        SpaceHeat {
            space: 0,
            pages: 64,
            region_pages: 16,
            regions: vec![
                region(classes(16, 0, 0), 0.0),
                region(classes(0, 14, 2), 30.0),
                region(classes(0, 0, 0), 0.0),
                region(classes(0, 15, 1), 3.5),
            ],
        }
    }

    #[test]
    fn a_map_is_a_character_a_region_with_its_legend_and_the_hottest() {
        let expected = "\
space 0: 256.0 KiB, 64.0 KiB to a character
           0  .#
       20000   -

  .  free             16 pages    64.0 KiB
  -  cold             29 pages   116.0 KiB
  +  warm              0 pages         0 B
  #  hot               3 pages    12.0 KiB
  D  deferred          0 pages         0 B

     address  pages written/s  hottest page/s  hot pages
       10000             30.0            15.0          2
       30000              3.5             1.8          1";
        assert_eq!(text(&space(), 2), expected);
    }

    #[test]
    fn a_coarser_map_has_the_same_pages() {
        let coarse = coarser(&space(), 2);
        assert_eq!((coarse.regions.len(), coarse.region_pages), (2, 32));
        assert_eq!(coarse.regions[0].classes, classes(16, 14, 2));
        assert!((coarse.regions[1].hottest_per_second - 1.75).abs() < 1e-6);
        assert_eq!(coarser(&space(), 100), space());
    }

    #[test]
    fn a_picture_has_a_point_for_each_region() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("heat.png");
        write_png(&file, &space(), 2).unwrap();
        let decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&file).unwrap()));
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width, info.height), (8, 8));
        assert_eq!(&pixels[4 * 3..5 * 3], [240, 96, 32], "the second region is hot");
        let missing = write_png(&dir.path().join("no/such/dir.png"), &space(), 2);
        assert!(missing.is_err());
    }
}
