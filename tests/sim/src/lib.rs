//! Deterministic simulation: one seed, one world.
