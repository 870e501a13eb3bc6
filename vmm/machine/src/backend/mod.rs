//! What of this host is behind a device: files, interfaces, sockets.
//!
//! The device models know none of it; each calls a small trait, and the other half of that trait is here. Nothing here may
//! keep a caller waiting: the callers hold a device's lock.
//!
//! | module | what |
//! |---|---|
//! | [`entropy`] | random numbers |
//! | [`disk`] | a disk's requests, and what waits where |
//! | [`image`] | a disk's file, opened, understood and locked |
//! | [`transfer`] | moving bytes between an image and guest memory |
//! | [`pool`] | the threads that do what takes time |
//! | [`tap`] | a network card's other end, and frames held back |
//! | [`streams`] | the UNIX sockets behind a guest's sockets |

pub(crate) mod disk;
pub(crate) mod entropy;
pub(crate) mod image;
pub(crate) mod pool;
pub(crate) mod streams;
pub(crate) mod tap;
pub(crate) mod transfer;

#[cfg(test)]
mod tests;
