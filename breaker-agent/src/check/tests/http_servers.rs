//! HTTP servers over plain TCP. The verdicts are the kubelet's, where it gives one (k8s.io/kubernetes/pkg/probe/http and
//! Go's net/http): it asks for the same, and treats 200 to 399 as a pass.

use super::*;
use CheckCode::{L4Con, L7Ok, L7Rsp, L7Sts, L7Tout};

/// A row: what is odd, what the server does, and the verdict.
type Row = (&'static str, Vec<Step>, CheckCode);

fn answers(text: impl AsRef<[u8]>) -> Vec<Step> {
    vec![ReadHead, send(text)]
}

fn rows() -> Vec<Row> {
    let many = |count: usize| (0..count).map(|i| format!("X-{i}: v\r\n")).collect::<String>();
    let long = "a".repeat(30_000);
    vec![
        ("plain", answers("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"), L7Ok),
        ("HTTP/1.0", answers("HTTP/1.0 200 OK\r\n\r\nOK"), L7Ok),
        (
            "HTTP/1.0 that says it keeps the connection",
            answers("HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nOK"),
            L7Ok,
        ),
        ("a later HTTP/1", answers("HTTP/1.2 200 OK\r\nContent-Length: 0\r\n\r\n"), L7Ok),
        ("no reason phrase", answers("HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n"), L7Ok),
        ("an empty reason phrase", answers("HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n"), L7Ok),
        ("a reason phrase in UTF-8", answers("HTTP/1.1 200 schön\r\nContent-Length: 0\r\n\r\n"), L7Ok),
        ("lines that end with LF", answers("HTTP/1.1 200 OK\nContent-Length: 2\n\nOK"), L7Ok),
        ("no header at all", answers("HTTP/1.1 200 OK\r\n\r\n"), L7Ok),
        ("150 headers", answers(format!("HTTP/1.1 200 OK\r\n{}\r\n", many(150))), L7Ok),
        ("2,000 headers", answers(format!("HTTP/1.1 200 OK\r\n{}\r\n", many(2000))), L7Ok),
        ("a header of 30,000 bytes", answers(format!("HTTP/1.1 200 OK\r\nSet-Cookie: {long}\r\n\r\n")), L7Ok),
        ("a folded header", answers("HTTP/1.1 200 OK\r\nX-Folded: one\r\n two\r\n\tthree\r\n\r\n"), L7Ok),
        ("a space before the colon", answers("HTTP/1.1 200 OK\r\nX-Spaced : v\r\n\r\n"), L7Ok),
        ("bytes above 127 in a value", answers(b"HTTP/1.1 200 OK\r\nX-Latin: \xe9\r\n\r\n"), L7Ok),
        ("a line without a colon", answers("HTTP/1.1 200 OK\r\nnonsense\r\n\r\n"), L7Rsp),
        ("the same length twice", answers("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nOK"), L7Ok),
        ("two lengths", answers("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nOK"), L7Rsp),
        ("a negative length", answers("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nOK"), L7Rsp),
        ("a length in words", answers("HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\nOK"), L7Rsp),
        ("less than the length says", answers("HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\nOK"), L7Ok),
        ("more than the length says", answers("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nOK and more"), L7Ok),
        (
            "chunks",
            answers("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nO\r\n1;x=y\r\nK\r\n0\r\n\r\n"),
            L7Ok,
        ),
        ("a chunk of a wrong size", answers("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nOK\r\n"), L7Ok),
        ("no length, until the end", answers("HTTP/1.1 200 OK\r\n\r\nOK"), L7Ok),
        (
            "the body 50 ms later",
            vec![ReadHead, send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"), Wait(50), send("OK")],
            L7Ok,
        ),
        ("a body that never comes", vec![ReadHead, send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"), Hang], L7Ok),
        ("a stream without an end", vec![ReadHead, send("HTTP/1.1 200 OK\r\n\r\n: ping\n\n"), Hang], L7Ok),
        (
            "the head byte by byte",
            {
                let head = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
                std::iter::once(ReadHead).chain(head.iter().flat_map(|byte| [send([*byte]), Wait(1)])).collect()
            },
            L7Ok,
        ),
        ("early hints", answers("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"), L7Ok),
        ("a continue that nobody asked for", answers("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\n\r\n"), L7Sts),
        ("informational answers without an end", answers("HTTP/1.1 102 Processing\r\n\r\n".repeat(20)), L7Rsp),
        ("switching protocols", answers("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"), L7Sts),
        ("no content", answers("HTTP/1.1 204 No Content\r\n\r\n"), L7Ok),
        ("not modified", answers("HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"), L7Ok),
        ("a redirect", answers("HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n"), L7Ok),
        ("unauthorized", answers("HTTP/1.1 401 Unauthorized\r\n\r\n"), L7Sts),
        ("busy", answers("HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n\r\n"), L7Sts),
        ("a status that nobody knows", answers("HTTP/1.1 299 Whatever\r\n\r\n"), L7Ok),
        ("a status beyond all", answers("HTTP/1.1 999 Whatever\r\n\r\n"), L7Sts),
        ("a status of two digits", answers("HTTP/1.1 20 OK\r\n\r\n"), L7Rsp),
        ("an answer before the request", vec![send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"), ReadHead], L7Ok),
        (
            "an answer, and the request is never read",
            vec![send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK")],
            L7Ok,
        ),
        ("a refusal, and the request is never read", vec![send("HTTP/1.1 503 Busy\r\n\r\n")], L7Sts),
        ("a close without an answer", vec![ReadHead], L7Rsp),
        ("a close in the head", answers("HTTP/1.1 200 OK\r\nContent-Le"), L7Rsp),
        ("an immediate close", vec![], L4Con),
        ("SSH", answers("SSH-2.0-OpenSSH_10.0\r\n"), L7Rsp),
        ("SMTP", vec![send("220 mail ESMTP\r\n"), ReadHead], L7Rsp),
        ("HTTP/0.9", answers("<html>OK</html>"), L7Rsp),
        ("HTTP/2 without being asked", answers("HTTP/2 200\r\n\r\n"), L7Rsp),
        ("shoutcast", answers("ICY 200 OK\r\n\r\n"), L7Rsp),
        ("no answer", vec![ReadHead, Hang], L7Tout),
        ("half a head, and no more", vec![ReadHead, send("HTTP/1.1 200 OK\r\n"), Hang], L7Tout),
    ]
}

#[tokio::test]
async fn odd_servers_are_judged_as_the_kubelet_judges_them() {
    let mut wrong = Vec::new();
    for (what, script, expected) in rows() {
        let (at, _task) = server(script).await;
        let (code, detail) = probe(&http(get()), at).await;
        // An immediate close is a reset if data was unread, and the end of the stream otherwise.
        let closed = what == "an immediate close" && matches!(code, L4Con | L7Rsp);
        if code != expected && !closed {
            wrong.push(format!("{what}: {} instead of {}: {detail}", code.label(), expected.label()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// HARDENING S1: a check connects to the backend, whatever its host says.
#[tokio::test]
async fn the_host_is_no_destination() {
    for host in ["127.0.0.1:1", "other.example", "other.example:443", "[::1]:1", "localhost"] {
        let (at, task) = server(answers("HTTP/1.1 200 OK\r\n\r\n")).await;
        let get = HttpGet { host: Some(host.into()), ..get() };
        assert_eq!(probe(&http(get), at).await.0, L7Ok, "{host}");
        let request = String::from_utf8(task.await.unwrap()).unwrap();
        assert!(request.contains(&format!("\r\nHost: {host}\r\n")), "{request}");
    }
}

/// F2: a server that answers before it has read the request, as clustercheck under xinetd does. One probe shows nothing:
/// it depends on which of the two is faster.
#[tokio::test]
async fn early_answers_are_answers_every_time() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK").await;
        }
    });
    let (prober, check) = (Prober::start(), http(get()));
    for number in 0..400 {
        let result = prober.probe(&check, at).await;
        assert_eq!(result.code, L7Ok, "probe {number}: {}", result.detail);
    }
}

/// K3: the server is not cut off while it writes: the probe reads the body, and asks for the connection to be closed.
#[tokio::test]
async fn the_body_is_taken() {
    let (at, task) = server(vec![
        ReadHead,
        send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"),
        Wait(50),
        send("OK"),
        Wait(50),
        send("OK"),
    ])
    .await;
    let result = Prober::start().probe(&http(get()), at).await;
    assert_eq!(result.code, L7Ok);
    assert!(result.duration >= Duration::from_millis(90), "it ended before the body: {:?}", result.duration);
    let head = String::from_utf8(task.await.unwrap()).unwrap();
    assert!(head.contains("\r\nConnection: close\r\n"), "{head}");
}

/// K5, K6: exactly what the check says.
#[tokio::test]
async fn what_is_written_goes_on_the_wire() {
    let cases = [
        (
            HttpGet { path: "/p02/../up?a[]=b%20c&d=//".into(), ..get() },
            "GET /p02/../up?a[]=b%20c&d=// HTTP/1.1\r\nHost: dummy.example\r\n",
        ),
        (
            HttpGet { host: None, headers: vec![("hOsT".into(), "a.example:81".into())], ..get() },
            "GET /ready HTTP/1.1\r\nHost: a.example:81\r\n",
        ),
    ];
    for (get, start) in cases {
        let (at, task) = server(answers("HTTP/1.1 200 OK\r\n\r\n")).await;
        assert_eq!(probe(&http(get), at).await.0, L7Ok);
        let head = String::from_utf8(task.await.unwrap()).unwrap();
        assert!(head.starts_with(start), "{head}");
        assert_eq!(head.to_ascii_lowercase().matches("\r\nhost:").count(), 1, "{head}");
    }
    let (at, task) = server(answers("HTTP/1.1 200 OK\r\n\r\n")).await;
    let headers = vec![("uSeR-aGeNt".into(), "mine".into()), ("X-A".into(), "1".into()), ("X-A".into(), "2".into())];
    probe(&http(HttpGet { headers, host: None, ..get() }), at).await;
    let head = String::from_utf8(task.await.unwrap()).unwrap();
    assert!(head.contains(&format!("\r\nHost: {at}\r\n")), "{head}");
    assert!(head.contains("\r\nuSeR-aGeNt: mine\r\nX-A: 1\r\nX-A: 2\r\n") && !head.contains("breaker/"), "{head}");
}

#[tokio::test]
async fn the_body_can_be_asked_for() {
    let rows = [
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nready", L7Ok),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nrea\r\n2\r\ndy\r\n0\r\n\r\n", L7Ok),
        ("HTTP/1.0 200 OK\r\n\r\nI am ready", L7Ok),
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nNO", L7Rsp),
        ("HTTP/1.1 503 Busy\r\nContent-Length: 5\r\n\r\nready", L7Sts),
    ];
    for (answer, expected) in rows {
        let (at, _task) = server(answers(answer)).await;
        let (code, detail) = probe(&http(HttpGet { body_contains: Some("ready".into()), ..get() }), at).await;
        assert_eq!(code, expected, "{answer:?}: {detail}");
    }
    let (at, _task) = server(vec![ReadHead, send("HTTP/1.1 200 OK\r\n\r\nnot yet"), Hang]).await;
    let (code, _) = probe(&http(HttpGet { body_contains: Some("ready".into()), ..get() }), at).await;
    assert_eq!(code, L7Tout, "the part that matters is missing");
}
