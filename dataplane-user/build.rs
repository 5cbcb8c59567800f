//! Finds the BPF object that `cargo xtask build-ebpf` made, for `kernel::object` to embed.

use std::{env, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=HITLESS_BPF_OBJECT");
    let object = env::var_os("HITLESS_BPF_OBJECT").map_or_else(default_object, PathBuf::from);
    println!("cargo::rerun-if-changed={}", object.display());
    if !object.is_file() {
        println!("cargo::error=no BPF object at {}: run `cargo xtask build-ebpf` first", object.display());
        return;
    }
    println!("cargo::rustc-env=HITLESS_BPF_OBJECT={}", object.display());
}

/// `<target>/bpf/hitless-bpf.o`, beside whatever profile is being built.
fn default_object() -> PathBuf {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts"));
    // <target>/<profile>/build/<crate>/out, one deeper with --target.
    let target = out
        .ancestors()
        .find(|dir| dir.join("CACHEDIR.TAG").is_file())
        .expect("cargo marks its target directory with CACHEDIR.TAG");
    target.join("bpf/hitless-bpf.o")
}
