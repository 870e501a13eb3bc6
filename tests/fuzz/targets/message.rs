//! A message from a peer that is anything; one that is understood is written as it was read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use umbra_core::wire::Message;

fuzz_target!(|data: &[u8]| {
    if let Ok(message) = Message::decode(data) {
        assert_eq!(message.encode(), data);
    }
});
