//! One source and one shadow, without I/O.
#![forbid(unsafe_code)]

pub mod guest;
pub mod limits;
