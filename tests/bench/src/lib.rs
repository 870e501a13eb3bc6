//! The figures of docs/numbers.md.
