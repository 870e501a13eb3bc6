//! The codec both ways: what is written to pages of two spaces, and when it is shipped, is the input. Afterwards the shadow's
//! pages are the source's.
#![no_main]

use libfuzzer_sys::fuzz_target;
use umbra_core::batch::Batch;
use umbra_core::guest::Guest;
use umbra_core::ledger::{Base, Owed};
use umbra_core::pack::{Level, Method, Packer};
use umbra_core::shadow::Image;
use umbra_core::source::{Encoder, Plan};
use umbra_fuzz::Flat;
use umbra_units::{BatchId, Bytes, PAGE_SIZE, PageId, Pfn, Rng, SpaceId};

const SPACES: [(u16, u64); 2] = [(0, 12), (3, 4)];

fuzz_target!(|data: &[u8]| {
    let (here, there) = (Flat::new(&SPACES), Flat::new(&SPACES));
    let mut encoder = Encoder::new(&here.spaces, Bytes(5 * PAGE_SIZE as u64));
    let mut image = Image::new(&there.spaces);
    let mut packer = Packer::new();
    let mut written: Vec<PageId> = Vec::new();
    let mut batch = 0;
    let ship = [0xff, 0, 0, 0];
    for op in data.chunks_exact(4).chain([&ship[..]]) {
        if op[0] >= 0xe0 {
            batch += 1;
            written.sort_unstable();
            written.dedup();
            let owed = |page| Owed {
                page,
                base: if op[1] & 0x80 == 0 {
                    Base::Shipped
                } else {
                    Base::Unknown
                },
            };
            let plan = Plan {
                batch: BatchId(batch),
                pages: written.drain(..).map(owed).collect(),
                ..umbra_fuzz::plan()
            };
            let draft = encoder.draft(plan, &here).expect("pages are there");
            let method = [
                Method::None,
                Method::Lz4,
                Method::Zstd(Level::QUICK),
                Method::Zstd(Level::ONE),
            ];
            let (bytes, _) = draft.pack(method[usize::from(op[1] & 3)], &mut packer);
            let batch = Batch::parse(&bytes).expect("our own");
            image.apply(batch, &there).expect("our own");
        } else {
            let page = place(op[0]);
            written.push(page);
            write(&here, page, op);
        }
    }
    for page in (0..16).map(place) {
        let (mut a, mut b) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        here.read_page(page, &mut a).expect("there");
        there.read_page(page, &mut b).expect("there");
        assert!(a == b, "{page}");
    }
    assert_eq!(encoder.digest(), image.digest());
    assert_eq!(image.audit(&there), Ok(Vec::new()));
});

fn place(n: u8) -> PageId {
    let n = u64::from(n % 16);
    match n.checked_sub(12) {
        None => PageId::ram(Pfn(n)),
        Some(pfn) => PageId {
            space: SpaceId(3),
            pfn: Pfn(pfn),
        },
    }
}

/// One of the things that happen to a page.
fn write(here: &Flat, page: PageId, op: &[u8]) {
    let mut content = [0; PAGE_SIZE];
    here.read_page(page, &mut content).expect("there");
    match op[1] % 8 {
        0 => content.fill(0),
        1 => here.read_page(place(op[2]), &mut content).expect("there"),
        2 => content.fill(op[2]),
        3 => Rng::new(op[2].into()).fill(&mut content),
        4 => content[usize::from(op[2]) * 16..][..16].fill(op[3]),
        _ => content[usize::from(u16::from_le_bytes([op[2], op[3]])) % PAGE_SIZE] ^= op[1] | 1,
    }
    here.apply_page(page, &content).expect("there");
}
