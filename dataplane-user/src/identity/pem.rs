//! Certificates and keys as files hold them: PEM, in the names of a Kubernetes TLS Secret.

use std::{fs, io, path::Path};

use rustls_pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{Error as PemError, PemObject as _},
};
use zeroize::Zeroizing;

use super::authority::SecretKey;

/// A chain, leaf first.
pub const CERTIFICATE: &str = "tls.crt";
pub const KEY: &str = "tls.key";
/// The roots.
pub const ROOTS: &str = "ca.crt";

/// A file of certificates is a few kilobytes.
const MAX_LEN: u64 = 1 << 20;

/// Reads a file of PEM; what was read is overwritten when dropped, as it may be a key.
pub fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, String> {
    let failed = |error: io::Error| format!("{}: {error}", path.display());
    let len = fs::metadata(path).map_err(failed)?.len();
    if len > MAX_LEN {
        return Err(format!("{}: {len} bytes are too long for certificates", path.display()));
    }
    fs::read(path).map(Zeroizing::new).map_err(failed)
}

/// All certificates of a PEM text; none is a mistake.
pub fn certificates(pem: &[u8], what: &dyn std::fmt::Display) -> Result<Vec<CertificateDer<'static>>, String> {
    let all = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| format!("{what}: {}", explain(&error)))?;
    if all.is_empty() {
        return Err(format!("{what}: no certificate in PEM in it"));
    }
    Ok(all)
}

/// The one private key of a PEM text.
pub fn key(pem: &[u8], what: &dyn std::fmt::Display) -> Result<SecretKey, String> {
    match PrivateKeyDer::from_pem_slice(pem) {
        Ok(key) => Ok(key.into()),
        Err(PemError::NoItemsFound) => Err(format!("{what}: no private key in PEM in it (is it encrypted?)")),
        Err(error) => Err(format!("{what}: {}", explain(&error))),
    }
}

/// The library's words may repeat a line of the file, which may be one of a key.
fn explain(error: &PemError) -> &'static str {
    match error {
        PemError::MissingSectionEnd { .. } => "a PEM section does not end",
        PemError::IllegalSectionStart { .. } => "a PEM section starts with an unreadable line",
        PemError::Base64Decode(_) => "a PEM section is not Base64",
        PemError::SectionTooLarge => "a PEM section is too large",
        _ => "unreadable PEM",
    }
}
