//! What a socket device is connected to, and what it says over it.

/// One stream to a program of the host. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u64);

/// The host's programs, as byte streams. Nothing here waits: it is called with the device locked.
///
/// A stream whose end is known ([`Progress::Ended`]) still has to be closed.
pub trait Streams: Send + Sync {
    /// Add what happened to `news`: at most [`NEWS`](crate::limits::VSOCK_NEWS) pieces of it, each stream at most once.
    /// What is not acted upon will be told again.
    fn poll(&self, news: &mut Vec<News>);

    /// A stream to the program that serves `port`; `None` when nobody does.
    fn connect(&self, port: u32) -> Option<StreamId>;

    /// Tell the program that asked ([`News::Asked`]) that the guest took its stream, and under which port it appears
    /// there.
    fn accepted(&self, stream: StreamId, port: u32) -> bool;

    /// Bytes from the program.
    fn read(&self, stream: StreamId, bytes: &mut [u8]) -> Progress;

    /// Bytes to the program.
    fn write(&self, stream: StreamId, bytes: &[u8]) -> Progress;

    /// What about `stream` is news: that it can be read, that it can be written. Both are not, at first.
    fn watch(&self, stream: StreamId, interest: Interest);

    /// No more will be written.
    fn finish(&self, stream: StreamId);

    /// Forget the stream.
    fn close(&self, stream: StreamId);
}

/// Something happened outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// A program wants to talk to whoever listens on `port` in the guest.
    Asked {
        /// The stream to it.
        stream: StreamId,
        /// The guest's port.
        port: u32,
    },
    /// Something that was watched for can be done.
    Ready {
        /// The stream.
        stream: StreamId,
        /// What can be done; both may be tried.
        can: Interest,
    },
}

/// Reading and writing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Interest {
    /// There are bytes, or there will be no more.
    pub read: bool,
    /// There is room for bytes, or nobody to take them.
    pub write: bool,
}

/// How far a stream got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// So many bytes, at least one.
    Bytes(usize),
    /// None now.
    Later,
    /// None ever: the program has finished, or is gone.
    Ended,
}
