//! Link arguments for the kernel binary alone: a static image at fixed addresses, no libc, no start files.
//! Given here rather than in `.cargo/config.toml`, so that a plain `cargo build` from any directory works.

fn main() {
    let here = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let script = format!("-Wl,-T{here}/link.ld");
    // -n: pages of the file need not align with pages of memory, which keeps the image small.
    let linker = "-Wl,--build-id=none,-z,noexecstack,-n,--no-dynamic-linker,--gc-sections";
    for arg in ["-nostdlib", "-nostartfiles", "-static", "-no-pie", &script, linker] {
        println!("cargo:rustc-link-arg-bins={arg}");
    }
    println!("cargo:rerun-if-changed=link.ld");
    println!("cargo:rerun-if-changed=src/boot.s");
}
