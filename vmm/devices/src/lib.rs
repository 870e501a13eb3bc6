//! Device models: no KVM, no threads, no async.
