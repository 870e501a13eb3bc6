//! Console output, and holding it back.
//!
//! While a guest is protected, what it says to the outside must not be heard before the epoch in which it said it is
//! committed: else a failover could go back to before it spoke. Held bytes wait here, in order, up to
//! [`limits::HELD_OUTPUT_BYTES`]; what comes after that is dropped and counted, because a console that waits would stop
//! the guest, and the guest comes first.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use umbra_devices::Out;

use crate::limits;

/// A way out that can be held shut.
pub(crate) struct Output {
    out: Arc<dyn Out>,
    /// `None` while output flows.
    held: Mutex<Option<Held>>,
}

#[derive(Debug, Default)]
struct Held {
    /// Never longer than [`limits::HELD_OUTPUT_BYTES`].
    bytes: Vec<u8>,
    dropped: u64,
}

impl Output {
    pub(crate) fn new(out: Arc<dyn Out>) -> Self {
        Self {
            out,
            held: Mutex::new(None),
        }
    }

    /// Keep what comes from now on.
    pub(crate) fn hold(&self) {
        self.held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert_default();
    }

    /// Let out what was kept, in order, and whatever comes.
    pub(crate) fn release(&self) {
        // The lock is kept while writing, so that nothing overtakes what was held.
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Held { bytes, dropped }) = held.take() {
            if !bytes.is_empty() {
                self.out.put(&bytes);
            }
            if dropped > 0 {
                self.out
                    .put(format!("\n[{dropped} bytes of held output were dropped]\n").as_bytes());
            }
        }
    }
}

impl Out for Output {
    fn put(&self, bytes: &[u8]) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        match held.as_mut() {
            None => self.out.put(bytes),
            Some(held) => {
                // Once something was dropped, nothing after it is kept: what is released is what was said, up to a point.
                let room = if held.dropped > 0 {
                    0
                } else {
                    limits::HELD_OUTPUT_BYTES - held.bytes.len()
                };
                let kept = bytes.len().min(room);
                held.bytes.extend_from_slice(&bytes[..kept]);
                held.dropped += (bytes.len() - kept) as u64;
            }
        }
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Output({:?})", self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Heard(Mutex<Vec<u8>>);

    impl Out for Heard {
        fn put(&self, bytes: &[u8]) {
            self.0.lock().unwrap().extend_from_slice(bytes);
        }
    }

    #[test]
    fn held_output_is_released_in_order_and_then_flows_again() {
        let heard = Arc::new(Heard::default());
        let output = Output::new(heard.clone());
        output.put(b"a");
        output.hold();
        output.put(b"b");
        output.hold();
        output.put(b"c");
        assert_eq!(*heard.0.lock().unwrap(), b"a");
        output.release();
        output.put(b"d");
        output.release();
        assert_eq!(*heard.0.lock().unwrap(), b"abcd");
    }

    #[test]
    fn output_beyond_the_bound_is_dropped_and_counted_not_kept() {
        let heard = Arc::new(Heard::default());
        let output = Output::new(heard.clone());
        output.hold();
        output.put(&vec![b'x'; limits::HELD_OUTPUT_BYTES - 1]);
        output.put(b"yz");
        output.put(b"w");
        output.release();
        let heard = heard.0.lock().unwrap();
        assert!(heard.ends_with(b"xy\n[2 bytes of held output were dropped]\n"));
        assert_eq!(heard[..limits::HELD_OUTPUT_BYTES].len(), limits::HELD_OUTPUT_BYTES);
    }
}
