//! What a guest is given and what it is to do.

/// A guest: the tiny kernel, how much of a machine it gets, and its command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// vCPUs.
    pub cpus: u8,
    /// MiB of memory.
    pub memory_mib: u32,
    /// The kernel's options, see `resources/guest/README.md`.
    pub options: String,
}

impl Guest {
    /// One that only beats, a thousand times a second.
    pub fn idle() -> Self {
        Self {
            cpus: 1,
            memory_mib: 64,
            options: "work=idle".to_owned(),
        }
    }

    /// One that rewrites this many bytes of pages each second with content of this class.
    pub fn dirty(rate: &str, content: &str) -> Self {
        let options = format!("work=dirty rate={rate} wss=24M content={content}");
        Self {
            cpus: 1,
            memory_mib: 96,
            options,
        }
    }

    /// One that computes and checks its results.
    pub fn compute() -> Self {
        Self {
            cpus: 1,
            memory_mib: 64,
            options: "work=compute".to_owned(),
        }
    }

    /// The same with so many vCPUs, all of which it uses.
    #[must_use]
    pub fn with_cpus(mut self, cpus: u8) -> Self {
        self.cpus = cpus;
        self.with(&format!("cpus={cpus}"))
    }

    /// The same with so much memory.
    #[must_use]
    pub const fn with_memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// The same with more options.
    #[must_use]
    pub fn with(mut self, options: &str) -> Self {
        self.options = format!("{} {options}", self.options);
        self
    }
}
