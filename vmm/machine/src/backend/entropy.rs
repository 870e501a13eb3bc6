//! Random numbers for the guest: the host's.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;

use umbra_devices::virtio::rng::Entropy;

use crate::config::devices::RngConfig;
use crate::error::Error;

/// A file of random bytes.
#[derive(Debug)]
pub(crate) struct HostEntropy {
    source: File,
    /// What never runs dry, should the source: `/dev/urandom`.
    kernel: File,
}

impl HostEntropy {
    /// The kernel's own.
    pub(crate) fn kernel() -> Result<Self, Error> {
        Self::open(&RngConfig::default())
    }

    /// Open it.
    pub(crate) fn open(config: &RngConfig) -> Result<Self, Error> {
        let open = |path: &std::path::Path| {
            // A hardware generator may make its reader wait; a FIFO its opener.
            let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
            opened.map_err(|error| Error::File {
                path: path.to_owned(),
                why: format!("cannot open the source of random numbers of rng/0: {error}"),
            })
        };
        let entropy = Self {
            source: open(&config.src)?,
            kernel: open("/dev/urandom".as_ref())?,
        };
        let mut probe = [0; 16];
        match (&entropy.source).read(&mut probe) {
            Ok(1..) => Ok(entropy),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(entropy),
            other => Err(Error::File {
                path: config.src.clone(),
                why: format!(
                    "cannot be the source of random numbers of rng/0: {}",
                    other
                        .err()
                        .map_or_else(|| "it is empty".to_owned(), |error| error.to_string())
                ),
            }),
        }
    }
}

impl Entropy for HostEntropy {
    fn fill(&self, out: &mut [u8]) {
        if (&self.source).read_exact(out).is_err() && (&self.kernel).read_exact(out).is_err() {
            // Cannot happen on Linux; should it, a guest that gets zeros would believe them to be random.
            std::panic::panic_any("/dev/urandom cannot be read");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_runs_dry_is_made_up_for_and_one_that_is_none_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let config = RngConfig {
            src: file.path().to_owned(),
        };
        let line = HostEntropy::open(&config).unwrap_err().to_string();
        assert!(
            line.ends_with("cannot be the source of random numbers of rng/0: it is empty"),
            "{line}"
        );
        std::fs::write(file.path(), [7; 32]).unwrap();
        let entropy = HostEntropy::open(&config).unwrap();
        let mut out = [0; 64];
        entropy.fill(&mut out);
        assert!(out[32..].iter().any(|byte| *byte != 0), "{out:?}");
        let config = RngConfig { src: "/nowhere".into() };
        assert!(
            HostEntropy::open(&config)
                .unwrap_err()
                .to_string()
                .starts_with("/nowhere: cannot open")
        );
    }
}
