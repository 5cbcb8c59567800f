//! Roots and leaves for tests, good ones and each kind of bad one.

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DistinguishedName, DnType,
    IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::{Issued, SpiffeId, TrustBundle, pem, request};

pub const DOMAIN: &str = "cluster.local";

pub fn id(name: &str) -> SpiffeId {
    SpiffeId::new(DOMAIN, "shop", name).unwrap()
}

/// An authority that signs whatever a test needs.
pub struct Root(CertifiedIssuer<'static, KeyPair>);

/// A leaf in the making: good until a test spoils it.
pub struct Leaf {
    pub params: CertificateParams,
    pub key: KeyPair,
}

impl Root {
    pub fn new(name: &str) -> Self {
        Self(CertifiedIssuer::self_signed(authority(name), KeyPair::generate().unwrap()).unwrap())
    }

    pub fn intermediate(&self, name: &str) -> Self {
        Self(CertifiedIssuer::signed_by(authority(name), KeyPair::generate().unwrap(), &self.0).unwrap())
    }

    pub fn der(&self) -> CertificateDer<'static> {
        self.0.der().clone()
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    pub fn key_pem(&self) -> String {
        self.0.key().serialize_pem()
    }

    pub fn trust(&self) -> Arc<TrustBundle> {
        Arc::new(TrustBundle::new(DOMAIN, vec![self.der()]).unwrap())
    }

    pub fn sign(&self, leaf: &Leaf) -> CertificateDer<'static> {
        leaf.params.signed_by(&leaf.key, &self.0).unwrap().into()
    }

    /// What an authority answers.
    pub fn issued(&self, leaf: Leaf) -> Issued {
        Issued { chain: vec![self.sign(&leaf)], key: secret(&leaf.key), roots: vec![self.der()] }
    }

    /// As an authority that gets requests does. What the request asks for is what it gets, for an hour.
    pub fn sign_request(&self, csr: &str) -> Result<String, rcgen::Error> {
        let mut request = CertificateSigningRequestParams::from_pem(csr)?;
        let now = SystemTime::now();
        request.params.not_before = (now - Duration::from_secs(60)).into();
        request.params.not_after = (now + Duration::from_secs(3_600)).into();
        Ok(request.signed_by(&self.0)?.pem())
    }

    /// As an authority for `hitless`: `tls.crt`, `tls.key`, `ca.crt`.
    pub fn write(&self, directory: &Path, roots: &[&Root]) {
        write(directory, pem::CERTIFICATE, &self.pem());
        write(directory, pem::KEY, &self.key_pem());
        write(directory, pem::ROOTS, &roots.iter().map(|root| root.pem()).collect::<String>());
    }

    /// As somebody else puts a workload's there.
    pub fn write_leaf(&self, directory: &Path, leaf: &Leaf) {
        fs::create_dir_all(directory).unwrap();
        let certificate = leaf.params.signed_by(&leaf.key, &self.0).unwrap();
        write(directory, pem::CERTIFICATE, &certificate.pem());
        write(directory, pem::KEY, &leaf.key.serialize_pem());
        write(directory, pem::ROOTS, &self.pem());
    }
}

impl Leaf {
    /// For an hour, from a minute ago.
    pub fn new(id: &SpiffeId) -> Self {
        Self::with_key(id, KeyPair::generate().unwrap())
    }

    pub fn with_key(id: &SpiffeId, key: KeyPair) -> Self {
        let mut params = request::params(id).unwrap();
        let now = SystemTime::now();
        params.not_before = (now - Duration::from_secs(60)).into();
        params.not_after = (now + Duration::from_secs(3_600)).into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        Self { params, key }
    }

    pub fn times(mut self, from: SystemTime, to: SystemTime) -> Self {
        (self.params.not_before, self.params.not_after) = (from.into(), to.into());
        self
    }

    pub fn uris(mut self, uris: &[&str]) -> Self {
        self.params.subject_alt_names =
            uris.iter().map(|uri| SanType::URI((*uri).to_owned().try_into().unwrap())).collect();
        self
    }
}

pub fn secret(key: &KeyPair) -> super::SecretKey {
    PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())).into()
}

/// By renaming, as whoever writes such files does.
pub fn write(directory: &Path, name: &str, text: &str) {
    fs::write(directory.join("new"), text).unwrap();
    fs::rename(directory.join("new"), directory.join(name)).unwrap();
}

fn authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}
