//! End-to-end tests: real processes, real KVM guests, real QUIC.
