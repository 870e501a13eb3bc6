//! How a guest is booted again after a reset, as far as it travels.
//!
//! Version 1: whether a reset boots again (1) or ends the guest (0) `u8`; the kernel's command line as a length-prefixed
//! text. The kernel and its initial RAM disk do not travel: see `docs/decisions/0011-a-moved-guest-reboots-from-files.md`.

use umbra_core::guest::StateRecord;
use umbra_units::{Malformed, Reader, Writer};

use super::Incoming;
use crate::config::OnReset;
use crate::error::Error;
use crate::limits;

pub(crate) const KIND: &str = "boot";
pub(crate) const VERSION: u32 = 1;

/// What of booting again belongs to the guest, not to the host it is on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Restart {
    pub(crate) on_reset: OnReset,
    /// Always shorter than [`limits::CMDLINE_BYTES`].
    pub(crate) cmdline: String,
}

impl Restart {
    pub(crate) fn encode(&self) -> StateRecord {
        let mut w = Writer::new();
        w.u8(u8::from(self.on_reset == OnReset::Restart))
            .text(&self.cmdline, limits::CMDLINE_BYTES - 1);
        StateRecord {
            kind: KIND.to_owned(),
            version: VERSION,
            bytes: w.into_bytes(),
        }
    }

    pub(crate) fn decode(incoming: &mut Incoming<'_>) -> Result<Self, Error> {
        Self::read(incoming.bytes(KIND, VERSION)?).map_err(Error::malformed(KIND))
    }

    fn read(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        let on_reset = match r.u8("what a reset does")? {
            0 => OnReset::Exit,
            1 => OnReset::Restart,
            _ => return Err(r.malformed("what a reset does")),
        };
        let cmdline = r.text_within(limits::CMDLINE_BYTES - 1, "command line")?.to_owned();
        if cmdline.contains('\0') {
            return Err(r.malformed("command line"));
        }
        r.finish("end of boot record")?;
        Ok(Self { on_reset, cmdline })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_to_boot_again_is_what_was_saved_and_nothing_else_is_believed() {
        for on_reset in [OnReset::Restart, OnReset::Exit] {
            let restart = Restart {
                on_reset,
                cmdline: "console=ttyS0".to_owned(),
            };
            let whole = restart.encode();
            let decode = |record: StateRecord| Restart::decode(&mut Incoming::new(&[record]));
            assert_eq!(decode(whole.clone()).unwrap(), restart);
            for len in 0..whole.bytes.len() {
                let bytes = whole.bytes[..len].to_vec();
                assert!(matches!(
                    decode(StateRecord { bytes, ..whole.clone() }),
                    Err(Error::Malformed(_))
                ));
            }
            let mut bytes = whole.bytes.clone();
            *bytes.last_mut().unwrap() = 0;
            assert!(matches!(
                decode(StateRecord { bytes, ..whole.clone() }),
                Err(Error::Malformed(_))
            ));
            assert!(decode(StateRecord { version: 2, ..whole }).is_err());
        }
    }
}
