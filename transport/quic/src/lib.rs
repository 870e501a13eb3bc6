//! QUIC connections for Umbra's links: quinn and nothing clever.
