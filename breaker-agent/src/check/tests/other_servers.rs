//! Plain TCP, exchanges over TCP and UDP, DNS and gRPC.

use std::net::{IpAddr, UdpSocket as StdUdpSocket};

use breaker_core::model::{DnsQuestion, DnsRcode, DnsRecord, Exchange, Transport};
use hickory_proto::{
    op::{Message, MessageType, ResponseCode},
    rr::{RData, Record},
};
use tokio::net::UdpSocket;

use super::*;
use CheckCode::{L4Con, L4Ok, L7Ok, L7Rsp, L7Sts, L7Tout};

fn tcp(accept: bool) -> Check {
    check(CheckAction::TcpSocket { port: None, accept })
}

fn exchange(transport: Transport, send: &str, expect: &str) -> Check {
    let exchange = Exchange { transport, send: send.into(), expect: expect.into(), quit: Vec::new() };
    check(CheckAction::Exchange { port: None, exchange })
}

/// F1: the plain check passes, and the server's process never sees a connection.
#[tokio::test]
async fn a_plain_tcp_check_is_invisible_to_the_servers_process() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let at = listener.local_addr().unwrap();
    let prober = Prober::start();
    for _ in 0..200 {
        assert_eq!(prober.probe(&tcp(false), at).await.code, L4Ok);
    }
    let seen = listener.accept();
    assert_eq!(seen.map(drop).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    assert_eq!(prober.probe(&tcp(true), at).await.code, L4Ok);
    assert!(listener.accept().is_ok(), "with `accept`, the process sees the connection");
}

#[tokio::test]
async fn a_closed_port_is_refused_for_every_check() {
    let at = closed_port().await;
    for check in [
        tcp(false),
        tcp(true),
        http(get()),
        check(CheckAction::Grpc { port: None, service: String::new() }),
        exchange(Transport::Tcp, "PING\r\n", "+PONG"),
        exchange(Transport::Udp, "ping", ""),
    ] {
        let (code, detail) = probe(&check, at).await;
        assert_eq!(code, L4Con, "{check:?}: {detail}");
    }
}

#[tokio::test]
async fn exchanges_over_tcp() {
    let redis = || vec![Wait(20), send("+PO"), Wait(20), send("NG\r\n"), Hang];
    let rows = [
        ("an answer in two parts", redis(), "PING\r\n", "+PONG", L7Ok),
        ("the server speaks first", vec![send("SSH-2.0-x\r\n"), Hang], "", "SSH-2.0-", L7Ok),
        ("any answer", vec![send("?"), Hang], "x", "", L7Ok),
        ("a refusal", vec![send("-ERR max number of clients reached\r\n")], "PING\r\n", "+PONG", L7Rsp),
        ("a close without a word", vec![Wait(20)], "", "+PONG", L7Rsp),
        ("no answer", vec![Hang], "PING\r\n", "+PONG", L7Tout),
    ];
    for (what, script, request, expect, expected) in rows {
        let (at, _task) = server(script).await;
        let (code, detail) = probe(&exchange(Transport::Tcp, request, expect), at).await;
        assert_eq!(code, expected, "{what}: {detail}");
    }
    let (at, _task) = server(vec![send([0x15, 3, 0, 0, 0])]).await;
    let (_, detail) = probe(&exchange(Transport::Tcp, "x", "R"), at).await;
    assert_eq!(detail, r#"the answer "\x15\x03\x00\x00\x00" does not contain "R""#);
}

/// PostgreSQL logs a reset: an exchange ends with a FIN, after the word that the server wants to hear.
#[tokio::test]
async fn an_exchange_says_goodbye_and_ends_with_a_fin() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"220 mail ESMTP\r\n").await.unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.map(|_| rest)
    });
    let exchange =
        Exchange { transport: Transport::Tcp, send: Vec::new(), expect: "220 ".into(), quit: "QUIT\r\n".into() };
    assert_eq!(probe(&check(CheckAction::Exchange { port: None, exchange }), at).await.0, L7Ok);
    assert_eq!(task.await.unwrap().expect("a reset"), b"QUIT\r\n");
}

#[tokio::test]
async fn exchanges_over_udp() {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut request = [0; 64];
        while let Ok((length, from)) = socket.recv_from(&mut request).await {
            if &request[..length] == b"ping" {
                let _ = socket.send_to(b"pong", from).await;
            }
        }
    });
    assert_eq!(probe(&exchange(Transport::Udp, "ping", "pong"), at).await.0, L7Ok);
    assert_eq!(probe(&exchange(Transport::Udp, "ping", ""), at).await.0, L7Ok);
    assert_eq!(probe(&exchange(Transport::Udp, "ping", "ready"), at).await.0, L7Rsp);
    assert_eq!(probe(&exchange(Transport::Udp, "hello", "pong"), at).await.0, L7Tout);
}

/// A DNS server that holds `dns.test` only, and refuses to look for anything else.
async fn dns_server() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let question = Message::from_vec(&buffer[..length]).unwrap();
            let query = question.queries[0].clone();
            let mut answer = question.clone();
            answer.metadata.message_type = MessageType::Response;
            if question.metadata.recursion_desired || query.name().to_string() != "dns.test." {
                answer.metadata.response_code = ResponseCode::Refused;
            } else {
                let data = RData::A("10.0.0.7".parse().unwrap());
                answer.add_answer(Record::from_rdata(query.name().clone(), 5, data));
            }
            let _ = socket.send_to(&answer.to_vec().unwrap(), from).await;
        }
    });
    at
}

#[tokio::test]
async fn dns_servers() {
    let at = dns_server().await;
    let question = |name: &str, rcode, addresses: &[&str]| {
        let expected_addresses: Vec<IpAddr> = addresses.iter().map(|text| text.parse().unwrap()).collect();
        let question = DnsQuestion { name: name.into(), record: DnsRecord::A, rcode, expected_addresses };
        check(CheckAction::Dns { port: None, question })
    };
    let rows = [
        (question("dns.test.", Some(DnsRcode::NoError), &[]), L7Ok),
        (question("dns.test.", Some(DnsRcode::NoError), &["10.0.0.7"]), L7Ok),
        (question("dns.test.", Some(DnsRcode::NoError), &["10.0.0.8"]), L7Rsp),
        (question("other.test.", Some(DnsRcode::NoError), &[]), L7Sts),
        (question("other.test.", Some(DnsRcode::Refused), &[]), L7Ok),
        (question("other.test.", None, &[]), L7Ok),
    ];
    for (check, expected) in rows {
        let (code, detail) = probe(&check, at).await;
        assert_eq!(code, expected, "{check:?}: {detail}");
    }
    let silent = StdUdpSocket::bind("127.0.0.1:0").unwrap();
    let check = question("dns.test.", None, &[]);
    assert_eq!(probe(&check, silent.local_addr().unwrap()).await.0, L7Tout);
}

#[tokio::test]
async fn grpc_servers() {
    let (reporter, service) = tonic_health::server::health_reporter();
    reporter.set_service_status("shop", tonic_health::ServingStatus::Serving).await;
    reporter.set_service_status("bar", tonic_health::ServingStatus::NotServing).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    let grpc = |service: &str| check(CheckAction::Grpc { port: None, service: service.into() });
    assert_eq!(probe(&grpc(""), at).await.0, L7Ok);
    assert_eq!(probe(&grpc("shop"), at).await.0, L7Ok);
    assert_eq!(probe(&grpc("bar"), at).await, (L7Sts, "NOT_SERVING".into()));
    let (code, detail) = probe(&grpc("nobody"), at).await;
    assert!(code == L7Sts && detail.contains("\"nobody\""), "{detail}");
    let (plain_http, _task) = server(vec![ReadHead, send("HTTP/1.1 400 Bad Request\r\n\r\n")]).await;
    assert_eq!(probe(&grpc(""), plain_http).await.0, L7Rsp);
    let (silent, _task) = server(vec![Hang]).await;
    assert_eq!(probe(&grpc(""), silent).await.0, L7Tout);
}
