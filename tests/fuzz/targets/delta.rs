//! A delta from a peer that is anything, applied; and one of our own between two pages made of the input, which must lead
//! from one to the other.
#![no_main]

use libfuzzer_sys::fuzz_target;
use umbra_core::page::{apply_delta, encode_delta};
use umbra_units::{PAGE_SIZE, Writer};

fuzz_target!(|data: &[u8]| {
    let mut page = [3; PAGE_SIZE];
    let _ = apply_delta(&mut page, data);

    let old = page;
    let mut new = old;
    for change in data.chunks_exact(3) {
        new[usize::from(u16::from_le_bytes([change[0], change[1]])) % PAGE_SIZE] = change[2];
    }
    let mut out = Writer::new();
    if encode_delta(&old, &new, &mut out) {
        apply_delta(&mut page, out.as_slice()).expect("our own");
        assert!(page == new);
    } else {
        assert!(out.is_empty());
    }
});
