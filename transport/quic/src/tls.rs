//! Mutual TLS 1.3 with pinned certificates.
//!
//! The usual checks of a certificate (names, dates, authorities) are replaced by one: its fingerprint is on the list.
//! The proof that the peer holds the key, the handshake's signature, is checked by rustls' own code and never skipped.
//! Sessions are not resumed: a resumed handshake shows no certificate, and a peer taken off the list must not come back.

use crate::identity::{Fingerprint, Identity, Peers};
use core::fmt;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring as suite, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::version::TLS13;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, PeerIncompatible, SignatureScheme,
};
use std::sync::{Arc, OnceLock};

/// The protocol on top, so that a stray HTTP/3 client is told apart from a peer.
const ALPN: &[u8] = b"umbra";

/// Both sides send and expect this name; certificates are pinned, so it means nothing.
pub(crate) const SERVER_NAME: &str = "umbra";

/// AES-128-GCM first: twice as fast as ChaCha20 here, and QUIC needs it for its first packets anyway.
fn provider() -> Arc<CryptoProvider> {
    let cipher_suites = vec![
        suite::cipher_suite::TLS13_AES_128_GCM_SHA256,
        suite::cipher_suite::TLS13_AES_256_GCM_SHA384,
        suite::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(CryptoProvider {
        cipher_suites,
        ..suite::default_provider()
    })
}

/// The check of one handshake. It also remembers whom it turned away, because the error that comes out of the QUIC
/// stack is only text.
#[derive(Debug)]
pub(crate) struct Pin {
    peers: Peers,
    algorithms: WebPkiSupportedAlgorithms,
    refused: OnceLock<Fingerprint>,
}

impl Pin {
    pub(crate) fn new(peers: Peers) -> Arc<Self> {
        let algorithms = suite::default_provider().signature_verification_algorithms;
        Arc::new(Self {
            peers,
            algorithms,
            refused: OnceLock::new(),
        })
    }

    /// Whom this turned away.
    pub(crate) fn refused(&self) -> Option<Fingerprint> {
        self.refused.get().copied()
    }

    /// Who would have been welcome.
    pub(crate) fn expected(&self) -> Vec<Fingerprint> {
        self.peers.iter().copied().collect()
    }

    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let got = Fingerprint::of(certificate);
        if self.peers.allows(&got) {
            return Ok(());
        }
        let _ = self.refused.set(got);
        Err(CertificateError::Other(OtherError(Arc::new(NotPinned(got)))).into())
    }

    fn check_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }
}

/// What the turned-away peer gets to read. It names its certificate, not those we would take.
#[derive(thiserror::Error)]
#[error("certificate {0} is not allowed here")]
struct NotPinned(Fingerprint);

/// rustls puts the debug form of this into the text that the peer gets.
impl fmt::Debug for NotPinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The words of [`NotPinned`] without what rustls wraps around them.
pub(crate) fn refusal_in(text: &str) -> &str {
    text.rsplit_once("OtherError(")
        .map_or(text, |(_, words)| words.trim_end_matches(')'))
}

impl ServerCertVerifier for Pin {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Pin {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The connecting side's half of one handshake.
pub(crate) fn client(identity: &Identity, pin: Arc<Pin>) -> Arc<QuicClientConfig> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has TLS 1.3 suites")
        .dangerous()
        .with_custom_certificate_verifier(pin)
        .with_client_auth_cert(vec![identity.certificate()], identity.key())
        .expect("an identity's key and certificate belong together: generate and load see to it");
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Arc::new(QuicClientConfig::try_from(config).expect("the provider has AES-128-GCM"))
}

/// The accepting side's half of one handshake.
pub(crate) fn server(identity: &Identity, pin: Arc<Pin>) -> Arc<QuicServerConfig> {
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has TLS 1.3 suites")
        .with_client_cert_verifier(pin)
        .with_single_cert(vec![identity.certificate()], identity.key())
        .expect("an identity's key and certificate belong together: generate and load see to it");
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    Arc::new(QuicServerConfig::try_from(config).expect("the provider has AES-128-GCM"))
}

/// Who the peer of an established connection is.
pub(crate) fn peer_of(connection: &quinn::Connection) -> Option<Fingerprint> {
    let chain = connection
        .peer_identity()?
        .downcast::<Vec<CertificateDer<'static>>>()
        .ok()?;
    chain.first().map(Fingerprint::of)
}
