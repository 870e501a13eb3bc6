//! The small parts of a snapshot: its manifest, its index and its state. The checksum at a manifest's end is made to fit,
//! because nothing behind it would be reached otherwise.
#![no_main]

use libfuzzer_sys::fuzz_target;
use umbra_core::snapshot::{Checksum, Index, Manifest, decode_state};

fuzz_target!(|data: &[u8]| {
    let _ = decode_state(data);
    let _ = Index::decode(data, data.len() as u64 / 4, 1 << 20);
    let mut text = data.to_vec();
    if text.last() != Some(&b'\n') {
        text.push(b'\n');
    }
    let sum = Checksum::of(&text);
    text.extend_from_slice(format!("checksum {sum}\n").as_bytes());
    for text in [data, &text] {
        if let Ok((manifest, checksum)) = Manifest::decode(text) {
            let (again, sum) = manifest.encode();
            assert_eq!((again.as_bytes(), sum), (text, checksum));
        }
    }
});
