//! Prints the graphs that `docs/phases.md` shows: `cargo run -p umbra-core --example phases`.
#![forbid(unsafe_code)]

use umbra_core::phase::{ShadowPhase, SourcePhase};

fn main() {
    println!("{}\n{}", SourcePhase::dot(), ShadowPhase::dot());
}
