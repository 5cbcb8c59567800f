//! Finds the BPF object that `cargo xtask build-ebpf` made, for `kernel::object` to embed, and compiles
//! the protocols of the admin API, of certificate authorities and of container runtimes.

use std::{env, error::Error, path::PathBuf};

const PROTO: &str = "hitless/admin/v1/admin.proto";
const AUTHORITIES: &[&str] = &["istio/v1/auth/ca.proto", "spiffe/workload/workload.proto"];
const RUNTIME_PROTO: &str = "runtime/v1/api.proto";

/// Fields that are left out of `--output json` when they are not set.
const LEFT_OUT: &[&str] = &[
    "Status.waiting_for",
    "Status.source",
    "Status.objects",
    "Pod.netns_cookie",
    "Pod.error",
    "Endpoint.backend",
    "Backend.suspect_ms",
    "Backend.pod",
    "Event.pod",
    "Event.service",
    "Event.backend",
    "Event.to",
    "Event.cause",
    "Event.signal",
    "Event.errno",
    "Event.after_ns",
    "Event.port",
    "Drain.api_ns",
    "Drain.sigterm_ns",
    "Drain.listener_ns",
    "Drain.control_plane_ns",
    "Status.mesh",
    "Connection.idle_ms",
    "Connection.carried",
    "Carried.service",
    "Carried.source",
    "Carried.destination",
    "Carried.source_identity",
    "Carried.destination_identity",
    "Certificate.serial",
    "Certificate.not_before",
    "Certificate.not_after",
    "Certificate.last_error",
    "Policy.action",
    "Policy.refused",
];

fn main() -> Result<(), Box<dyn Error>> {
    bpf_object();
    admin_api()?;
    authorities()?;
    container_runtime()
}

/// Protocol and JSON by the same types. The compiler of protocols is protox: nothing to install.
fn admin_api() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto/{PROTO}");
    let mut config = tonic_prost_build::configure()
        .btree_map(".")
        .type_attribute(".", "#[derive(serde::Serialize)]")
        .type_attribute(".", "#[serde(rename_all = \"camelCase\")]");
    for field in LEFT_OUT {
        let attribute = "#[serde(skip_serializing_if = \"Option::is_none\")]";
        config = config.field_attribute(format!("hitless.admin.v1.{field}"), attribute);
    }
    Ok(config.compile_fds(protox::compile([PROTO], ["proto"])?)?)
}

/// What certificates are asked for by.
fn authorities() -> Result<(), Box<dyn Error>> {
    for proto in AUTHORITIES {
        println!("cargo::rerun-if-changed=proto/{proto}");
    }
    // Messages that carry keys do not print.
    let config = tonic_prost_build::configure().skip_debug([".X509SVID", ".X509SVIDResponse"]);
    Ok(config.compile_fds(protox::compile(AUTHORITIES, ["proto"])?)?)
}

fn container_runtime() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto/{RUNTIME_PROTO}");
    let client = tonic_prost_build::configure().build_server(false);
    Ok(client.compile_fds(protox::compile([RUNTIME_PROTO], ["proto"])?)?)
}

fn bpf_object() {
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
