//! A batch from a peer that is anything: parsed and applied. Whatever comes of it, every page the shadow holds is what the
//! hash it holds says.
//!
//! Half of the inputs are what they are; the others are the body of a batch whose header fits it, so that what is behind
//! the first check is found too.
#![no_main]

use libfuzzer_sys::fuzz_target;
use umbra_core::batch::Batch;
use umbra_core::shadow::Image;
use umbra_fuzz::Flat;

fuzz_target!(|data: &[u8]| {
    let Some((how, rest)) = data.split_first() else { return };
    let there = Flat::new(&[(0, 16), (3, 4)]);
    let mut image = Image::new(&there.spaces);
    let bytes = if how & 1 == 0 {
        rest.to_vec()
    } else {
        framed(*how, rest)
    };
    if let Ok(batch) = Batch::parse(&bytes) {
        assert!(batch.len() <= umbra_core::limits::BATCH_PAGES);
        let _ = image.apply(batch, &there);
        assert_eq!(image.audit(&there), Ok(Vec::new()));
    }
});

/// The header of batch 1 around this body: flags from `how`, counts from the first bytes.
fn framed(how: u8, body: &[u8]) -> Vec<u8> {
    let (counts, body) = body.split_at(body.len().min(4));
    let count = |n: usize| u32::from(counts.get(n).copied().unwrap_or(0));
    let flags = (how >> 1) & 7;
    let packed = flags & 5 != 0;
    let length = if packed {
        count(0) << 6 | count(1)
    } else {
        body.len() as u32
    };
    let mut bytes = vec![0xb2, flags];
    bytes.extend([1u64, 1, 0].map(u64::to_le_bytes).concat());
    bytes.extend((count(2) % 8).to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend((count(3) << 5).min(length).to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}
