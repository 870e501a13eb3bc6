//! Several unreliable paths as one good one, without I/O.
