//! Probes of real sockets on the loopback interface.

use super::*;
use breaker_core::model::{Check, CheckAction};
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

fn check(action: CheckAction) -> Check {
    let limit = Duration::from_millis(300);
    Check {
        action,
        period: limit,
        fast_period: limit,
        timeout: limit,
        failure_threshold: 1,
        success_threshold: 1,
        jitter_percent: 0,
    }
}

fn http(body: Option<&str>, https: bool) -> Check {
    check(CheckAction::HttpGet {
        path: "/ready".into(),
        port: None,
        https,
        host: Some("dummy.example".into()),
        headers: vec![("x-probe".into(), "1".into())],
        expected_statuses: vec![200..=399],
        body_contains: body.map(Into::into),
    })
}

/// A server that reads the head of one request and answers with fixed bytes, or never if `answer` is `None`. Its
/// task returns the head.
async fn server(answer: Option<&'static str>) -> (SocketAddr, tokio::task::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = vec![0; 4096];
        let n = stream.read(&mut head).await.unwrap();
        match answer {
            Some(answer) => stream.write_all(answer.as_bytes()).await.unwrap(),
            None => tokio::time::sleep(Duration::from_secs(60)).await,
        }
        String::from_utf8_lossy(&head[..n]).into_owned()
    });
    (at, task)
}

async fn code(check: &Check, at: SocketAddr) -> (CheckCode, String) {
    breaker_cli::install_crypto();
    let result = Prober::default().probe(check, at).await;
    (result.code, result.detail)
}

#[tokio::test]
async fn http_codes_are_haproxys() {
    let rows: &[(Option<&'static str>, Option<&str>, CheckCode)] = &[
        (Some("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nOK"), None, CheckCode::L7Ok),
        (Some("HTTP/1.1 302 Found\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n"), None, CheckCode::L7Ok),
        (Some("HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n"), None, CheckCode::L7Sts),
        (Some("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nOK"), Some("OK"), CheckCode::L7Ok),
        (Some("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nNO"), Some("OK"), CheckCode::L7Rsp),
        (Some("SSH-2.0-OpenSSH\r\n"), None, CheckCode::L7Rsp),
        (None, None, CheckCode::L7Tout),
    ];
    for (answer, body, expected) in rows {
        let (at, _task) = server(*answer).await;
        let (code, detail) = code(&http(*body, false), at).await;
        assert_eq!(code, *expected, "{answer:?}: {detail}");
    }
}

#[tokio::test]
async fn the_request_is_what_was_asked_for() {
    let (at, task) = server(Some("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")).await;
    code(&http(None, false), at).await;
    let head = task.await.unwrap().to_lowercase();
    assert!(head.starts_with("get /ready http/1.1\r\n"), "{head}");
    assert!(head.contains("\r\nhost: dummy.example\r\n") && head.contains("\r\nx-probe: 1\r\n"), "{head}");
}

#[tokio::test]
async fn a_closed_port_and_a_plain_server_behind_tls() {
    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    assert_eq!(code(&http(None, false), closed).await.0, CheckCode::L4Con);
    assert_eq!(code(&check(CheckAction::TcpSocket { port: None }), closed).await.0, CheckCode::L4Con);
    let grpc = check(CheckAction::Grpc { port: None, service: String::new() });
    assert_eq!(code(&grpc, closed).await.0, CheckCode::L4Con);

    let (at, _task) = server(Some("this is not TLS\r\n")).await;
    let (code, detail) = code(&http(None, true), at).await;
    assert_eq!(code, CheckCode::L6Rsp, "{detail}");
}

#[tokio::test]
async fn grpc_health_is_asked_by_service() {
    let (reporter, service) = tonic_health::server::health_reporter();
    reporter.set_service_status("shop", tonic_health::ServingStatus::Serving).await;
    reporter.set_service_status("bar", tonic_health::ServingStatus::NotServing).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    let grpc = |service: &str| check(CheckAction::Grpc { port: None, service: service.into() });
    assert_eq!(code(&grpc("shop"), at).await.0, CheckCode::L7Ok);
    assert_eq!(code(&grpc("bar"), at).await, (CheckCode::L7Sts, "NOT_SERVING".into()));
    assert_eq!(code(&grpc("nobody"), at).await, (CheckCode::L7Sts, "NOT_FOUND".into()));
}
