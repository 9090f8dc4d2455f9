//! TLS for probes. As in kubelet's probes, a check asks whether the server answers, not who signed its certificate.

use std::{net::IpAddr, sync::Arc};

use rustls::{
    ClientConfig, DigitallySignedStruct, Error, NamedGroup, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{
        ActiveKeyExchange, CryptoProvider, GetRandomFailed, SharedSecret, SupportedKxGroup, aws_lc_rs,
        verify_tls12_signature, verify_tls13_signature,
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    CheckCode,
    outcome::{Outcome, of_connection},
};

/// The TLS configuration of all probes.
#[derive(Clone, Debug)]
pub(super) struct Tls {
    http: Arc<ClientConfig>,
    other: Arc<ClientConfig>,
}

/// The protocol inside TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inner {
    /// HTTP/2 or HTTP/1.1, as the server chooses (ALPN).
    Http,
    /// Anything else. Nothing is offered by ALPN.
    Other,
}

impl Tls {
    /// Prepares a configuration with everything that Go, and so the kubelet, can talk to by default, except for CBC
    /// cipher suites and for key exchange by RSA (docs/CHECKS.md).
    pub fn new() -> Self {
        let mut provider = aws_lc_rs::default_provider();
        provider.kx_groups.push(&P521);
        let provider = Arc::new(provider);
        let verifier = Arc::new(AnyCertificate(provider.clone()));
        let versions = [&rustls::version::TLS13, &rustls::version::TLS12];
        let config = match ClientConfig::builder_with_provider(provider.clone()).with_protocol_versions(&versions) {
            Ok(builder) => builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth(),
            // The provider has cipher suites of both versions, so this arm is never reached.
            Err(_) => {
                ClientConfig::builder().dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth()
            }
        };
        let mut other = config;
        other.resumption = Resumption::disabled();
        let mut http = other.clone();
        http.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Self { http: Arc::new(http), other: Arc::new(other) }
    }

    /// Makes a TLS connection. `host` is sent as SNI, unless it is an address (RFC 6066, section 3).
    ///
    /// # Errors
    /// The outcome of the probe, if there is no TLS connection.
    pub async fn connect(
        &self,
        stream: TcpStream,
        host: Option<&str>,
        address: IpAddr,
        inner: Inner,
    ) -> Result<TlsStream<TcpStream>, Outcome> {
        let by_name = host.and_then(|host| ServerName::try_from(host.to_owned()).ok());
        let name = by_name.unwrap_or_else(|| ServerName::IpAddress(address.into()));
        let config = match inner {
            Inner::Http => &self.http,
            Inner::Other => &self.other,
        };
        TlsConnector::from(config.clone()).connect(name, stream).await.map_err(|error| {
            let cause = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
            match cause {
                Some(Error::AlertReceived(alert)) if *alert == rustls::AlertDescription::HandshakeFailure => (
                    CheckCode::L6Rsp,
                    "the server refuses every TLS version, cipher suite and key exchange that breaker offers".into(),
                ),
                Some(error) => (CheckCode::L6Rsp, error.to_string()),
                None if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                    (CheckCode::L6Rsp, "the server closed the connection during the TLS handshake".into())
                }
                None => match of_connection(&error) {
                    (CheckCode::L4Con, detail) => (CheckCode::L6Rsp, detail),
                    outcome => outcome,
                },
            }
        })
    }
}

/// Accepts every certificate. The signatures of the handshake are verified nevertheless, as with Go's
/// `InsecureSkipVerify`.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Key exchange with secp521r1. rustls leaves it out; Go offers it.
#[derive(Debug)]
pub(super) struct P521;

impl SupportedKxGroup for P521 {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        let failed = |_| Error::from(GetRandomFailed);
        let private =
            ::aws_lc_rs::agreement::PrivateKey::generate(&::aws_lc_rs::agreement::ECDH_P521).map_err(failed)?;
        let public = private.compute_public_key().map_err(failed)?;
        Ok(Box::new(P521Exchange { private, public }))
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::secp521r1
    }
}

struct P521Exchange {
    private: ::aws_lc_rs::agreement::PrivateKey,
    public: ::aws_lc_rs::agreement::PublicKey,
}

impl ActiveKeyExchange for P521Exchange {
    fn complete(self: Box<Self>, peer: &[u8]) -> Result<SharedSecret, Error> {
        let peer = ::aws_lc_rs::agreement::UnparsedPublicKey::new(&::aws_lc_rs::agreement::ECDH_P521, peer);
        let invalid = Error::from(rustls::PeerMisbehaved::InvalidKeyShare);
        ::aws_lc_rs::agreement::agree(&self.private, peer, invalid, |secret| Ok(SharedSecret::from(secret)))
    }

    fn pub_key(&self) -> &[u8] {
        self.public.as_ref()
    }

    fn group(&self) -> NamedGroup {
        NamedGroup::secp521r1
    }
}
