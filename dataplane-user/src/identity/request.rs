//! A new key and the request for its certificate.

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PublicKeyData as _, SanType};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::{SpiffeId, authority::SecretKey};

/// ECDSA P-256, made by the agent and never written anywhere.
pub struct Request {
    pub key: SecretKey,
    /// PKCS#10 in PEM.
    pub csr: String,
    /// SubjectPublicKeyInfo in DER.
    pub public_key: Vec<u8>,
}

impl Request {
    /// A request as Istio's agents write it: one critical URI, and no subject.
    pub fn new(id: &SpiffeId) -> Result<Self, rcgen::Error> {
        let mut pair = KeyPair::generate()?;
        let csr = params(id)?.serialize_request(&pair)?.pem()?;
        let public_key = pair.subject_public_key_info();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialize_der()));
        zeroize::Zeroize::zeroize(&mut pair);
        Ok(Self { key: key.into(), csr, public_key })
    }
}

/// One URI and an empty subject, which makes the extension critical (RFC 5280 section 4.1.2.6).
pub(super) fn params(id: &SpiffeId) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
    Ok(params)
}

#[cfg(test)]
mod tests {
    use x509_parser::prelude::*;

    use super::*;

    #[test]
    fn a_request_has_one_critical_uri_no_subject_and_a_p256_key() {
        let id = SpiffeId::new("cluster.local", "shop", "web").unwrap();
        let request = Request::new(&id).unwrap();
        let (_, pem) = parse_x509_pem(request.csr.as_bytes()).unwrap();
        assert_eq!(pem.label, "CERTIFICATE REQUEST");
        let (rest, csr) = X509CertificationRequest::from_der(&pem.contents).unwrap();
        assert!(rest.is_empty());
        csr.verify_signature().unwrap();
        let info = &csr.certification_request_info;
        assert_eq!(info.subject.iter().count(), 0);
        assert_eq!(info.subject_pki.raw, request.public_key);
        let curve = info.subject_pki.algorithm.parameters.as_ref().unwrap().as_oid().unwrap();
        assert_eq!(curve.to_id_string(), "1.2.840.10045.3.1.7");
        let names: Vec<_> = csr
            .requested_extensions()
            .unwrap()
            .map(|extension| match extension {
                ParsedExtension::SubjectAlternativeName(names) => names.general_names.clone(),
                other => panic!("asked for {other:?} too"),
            })
            .collect();
        assert_eq!(names, [[GeneralName::URI("spiffe://cluster.local/ns/shop/sa/web")]]);
        // id-ce-subjectAltName, then critical TRUE.
        assert!(pem.contents.windows(8).any(|der| der == [6, 3, 0x55, 0x1d, 0x11, 1, 1, 0xff]));
    }

    #[test]
    fn keys_are_new_each_time_and_do_not_print() {
        let id = SpiffeId::new("cluster.local", "shop", "web").unwrap();
        let (one, two) = (Request::new(&id).unwrap(), Request::new(&id).unwrap());
        assert_ne!(one.public_key, two.public_key);
        assert_eq!(format!("{:?}", one.key), "(secret key)");
    }
}
