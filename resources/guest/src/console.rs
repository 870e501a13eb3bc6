//! COM1: lines of text, and single beats.
//!
//! Each port write leaves the guest, which costs 30 to 80 us on some hosts, so a line is put together first
//! and sent with one `rep outsb` (which KVM, all the same, hands to the VMM byte by byte), and nobody asks the
//! line status register whether there is room: that would double the exits, and an emulated UART takes a byte
//! in the instant it is written, however fast the next one follows (the FIFO is on for those that would rather
//! keep a few). On a real 16550 lines would be cut short after 16 bytes.
//!
//! The BSP writes beats, so its cursor may be in the middle of a row of digits when a line is due; then the
//! line starts with a newline. A CPU with a fatal message silences the others first.

use crate::cpu;
use core::fmt::Write;
use core::sync::atomic::{AtomicBool, Ordering};

const COM1: u16 = 0x3f8;
const LINE_BYTES: usize = 512;

/// The last byte sent was a beat.
static IN_ROW: AtomicBool = AtomicBool::new(false);
/// Some CPU is saying its last words.
static SILENCED: AtomicBool = AtomicBool::new(false);

/// A line being put together; what does not fit is cut off.
struct Line {
    bytes: [u8; LINE_BYTES],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        // One byte is kept for the newline.
        let room = LINE_BYTES - 1 - self.len;
        let taken = &text.as_bytes()[..text.len().min(room)];
        self.bytes[self.len..][..taken.len()].copy_from_slice(taken);
        self.len += taken.len();
        Ok(())
    }
}

/// Sends one line. Use [`say!`].
pub(crate) fn line(text: core::fmt::Arguments<'_>) {
    let mut line = Line {
        bytes: [0; LINE_BYTES],
        len: 0,
    };
    if IN_ROW.swap(false, Ordering::Relaxed) {
        line.bytes[0] = b'\n';
        line.len = 1;
    }
    // Cannot fail: `write_str` above never does.
    let _ = line.write_fmt(text);
    line.bytes[line.len] = b'\n';
    cpu::out_string(COM1, &line.bytes[..=line.len]);
}

/// Sends one line of text.
macro_rules! say {
    ($($text:tt)*) => { $crate::console::line(format_args!($($text)*)) };
}
pub(crate) use say;

/// Makes the next line start on a line of its own, wherever the cursor was.
pub(crate) fn start_line() {
    IN_ROW.store(true, Ordering::Relaxed);
}

/// Sends one beat: a single byte, so that the time between bytes is the time between beats.
#[inline]
pub(crate) fn beat(digit: u8) {
    IN_ROW.store(true, Ordering::Relaxed);
    cpu::out8(COM1, digit);
}

/// Turns the UART's FIFO on (16550: FIFO control register, bit 0).
pub(crate) fn enable_fifo() {
    cpu::out8(COM1 + 2, 1);
}

/// Whether another CPU has the last word; then this one should say nothing more.
#[inline]
pub(crate) fn silenced() -> bool {
    SILENCED.load(Ordering::Relaxed)
}

/// Says why the guest stops, and stops it. The first CPU to get here has the last word.
pub(crate) fn fatal(code: u32, text: core::fmt::Arguments<'_>) -> ! {
    if SILENCED.swap(true, Ordering::SeqCst) {
        cpu::park();
    }
    // Time for the BSP to finish the byte it is sending; in ticks of an unknown clock, a millisecond or so.
    cpu::spin(3_000_000);
    start_line();
    line(text);
    cpu::exit(code)
}
