//! Identities and counters. Each is its own type, so that an epoch cannot be handed in where a term is wanted.

use core::fmt;

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl $name {
            /// The one after this.
            ///
            /// # Panics
            /// When the counter is exhausted, which at a million a second takes longer than any guest lives.
            #[must_use]
            pub const fn next(self) -> Self {
                match self.0.checked_add(1) {
                    Some(next) => Self(next),
                    None => panic!("counter exhausted"),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

counter! {
    /// A consistent cut of one guest: memory, vCPUs, devices and disks at one paused instant. Grows by one per cut.
    Epoch(u64)
}
counter! {
    /// Who may run the guest. Only grows; the holder of the highest granted term is the one runner (DESIGN §3.1).
    Term(u64)
}
counter! {
    /// A batch of page copies, numbered in the order the source made them. A page copy's age is its batch's number.
    BatchId(u64)
}

/// One network route between two nodes, by its place in the operator's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PathId(pub u16);

impl fmt::Display for PathId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "path {}", self.0)
    }
}

macro_rules! opaque {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

opaque! {
    /// A guest, the same wherever it runs: 16 random bytes drawn at its first launch.
    GuestId
}
opaque! {
    /// One source and one shadow working together: 16 random bytes drawn by the source for each attempt.
    SessionId
}
opaque! {
    /// A guest's state kept in files: 16 random bytes drawn for each snapshot.
    SnapshotId
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_read_as_hex() {
        let mut id = [0u8; 16];
        id[0] = 0xab;
        assert_eq!(GuestId(id).to_string(), "ab000000000000000000000000000000");
        assert_eq!(
            format!("{:?}", SessionId(id)),
            "SessionId(ab000000000000000000000000000000)"
        );
        assert_eq!(Epoch(3).next(), Epoch(4));
    }
}
