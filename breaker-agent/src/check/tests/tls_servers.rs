//! TLS servers: versions, key exchange groups, certificates, and what is spoken inside.

use std::sync::Arc;

use rcgen::{CertificateParams, KeyPair, SignatureAlgorithm};
use rustls::{
    ServerConfig, SupportedProtocolVersion,
    crypto::{CryptoProvider, SupportedKxGroup, aws_lc_rs, aws_lc_rs::kx_group},
    pki_types::PrivateKeyDer,
    version::{TLS12, TLS13},
};
use tokio_rustls::TlsAcceptor;

use super::{tls::P521, *};
use CheckCode::{L6Rsp, L6Tout, L7Ok};

/// The settings in which a server differs from others.
struct Special {
    versions: Vec<&'static SupportedProtocolVersion>,
    groups: Vec<&'static dyn SupportedKxGroup>,
    key: &'static SignatureAlgorithm,
    alpn: Vec<&'static [u8]>,
}

impl Default for Special {
    fn default() -> Self {
        Self {
            versions: vec![&TLS13, &TLS12],
            groups: aws_lc_rs::ALL_KX_GROUPS.to_vec(),
            key: &rcgen::PKCS_ECDSA_P256_SHA256,
            alpn: vec![],
        }
    }
}

async fn tls_server(special: Special) -> SocketAddr {
    let key = KeyPair::generate_for(special.key).unwrap();
    let certificate = CertificateParams::new(vec!["dummy.example".into()]).unwrap().self_signed(&key).unwrap();
    let provider = CryptoProvider { kx_groups: special.groups, ..aws_lc_rs::default_provider() };
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&special.versions)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
        .unwrap();
    config.alpn_protocols = special.alpn.iter().map(|protocol| protocol.to_vec()).collect();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    let known = request.uri().path() == "/ready" && request.uri().host() == Some("dummy.example");
                    let status = if known && request.headers()["x-probe"] == "1" { 200 } else { 404 };
                    let response = ::http::Response::builder().status(status).body(()).unwrap();
                    let mut body = respond.send_response(response, false).unwrap();
                    let _ = body.send_data(bytes::Bytes::from_static(b"by HTTP/2"), true);
                }
                continue;
            }
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") && matches!(stream.read_buf(&mut head).await, Ok(1..)) {}
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK").await;
            let _ = stream.shutdown().await;
        }
    });
    at
}

fn https() -> Check {
    let mut check = http(HttpGet { https: true, ..get() });
    // A handshake takes a debug build a while.
    check.timeout = Duration::from_secs(5);
    check
}

#[tokio::test]
async fn what_the_kubelet_can_talk_to_is_up() {
    let rows: Vec<(&str, Special)> = vec![
        ("the defaults", Special::default()),
        ("TLS 1.2 only", Special { versions: vec![&TLS12], ..Special::default() }),
        ("TLS 1.3 only", Special { versions: vec![&TLS13], ..Special::default() }),
        ("X25519MLKEM768 only", Special { groups: vec![kx_group::X25519MLKEM768], ..Special::default() }),
        ("X25519 only", Special { groups: vec![kx_group::X25519], ..Special::default() }),
        ("P-256 only", Special { groups: vec![kx_group::SECP256R1], ..Special::default() }),
        ("P-384 only", Special { groups: vec![kx_group::SECP384R1], ..Special::default() }),
        ("P-521 only", Special { groups: vec![&P521], ..Special::default() }),
        ("P-521 only, TLS 1.2", Special { groups: vec![&P521], versions: vec![&TLS12], ..Special::default() }),
        ("a certificate with P-384", Special { key: &rcgen::PKCS_ECDSA_P384_SHA384, ..Special::default() }),
        (
            "a certificate with P-521, TLS 1.2",
            Special { key: &rcgen::PKCS_ECDSA_P521_SHA512, versions: vec![&TLS12], ..Special::default() },
        ),
        ("a certificate with P-521", Special { key: &rcgen::PKCS_ECDSA_P521_SHA512, ..Special::default() }),
        ("a certificate with Ed25519", Special { key: &rcgen::PKCS_ED25519, ..Special::default() }),
        ("HTTP/2 only", Special { alpn: vec![b"h2"], ..Special::default() }),
        ("HTTP/1.1 only", Special { alpn: vec![b"http/1.1"], ..Special::default() }),
        ("HTTP/2 or HTTP/1.1", Special { alpn: vec![b"h2", b"http/1.1"], ..Special::default() }),
    ];
    for (what, special) in rows {
        let at = tls_server(special).await;
        let (code, detail) = probe(&https(), at).await;
        assert_eq!(code, L7Ok, "{what}: {detail}");
    }
}

#[tokio::test]
async fn a_body_over_http2_is_searched() {
    let at = tls_server(Special { alpn: vec![b"h2"], ..Special::default() }).await;
    let get = HttpGet { https: true, body_contains: Some("by HTTP/2".into()), ..get() };
    let check = Check { timeout: Duration::from_secs(5), ..http(get) };
    let (code, detail) = probe(&check, at).await;
    assert_eq!(code, L7Ok, "{detail}");
}

#[tokio::test]
async fn what_is_no_tls_is_named() {
    for answer in ["this is not TLS\r\n", "HTTP/1.1 400 Bad Request\r\n\r\n"] {
        let (at, _task) = server(vec![send(answer), Hang]).await;
        let (code, detail) = probe(&https(), at).await;
        assert_eq!(code, L6Rsp, "{detail}");
    }
    let (at, _task) = server(vec![Wait(20)]).await;
    let (code, detail) = probe(&https(), at).await;
    // Unread data turns the close into a reset.
    assert!(code == L6Rsp && (detail.contains("during the TLS handshake") || detail.contains("reset")), "{detail}");
    let (at, _task) = server(vec![Hang]).await;
    let (code, _) = probe(&http(HttpGet { https: true, ..get() }), at).await;
    assert_eq!(code, L6Tout);
}
