//! L3: an agent that did not run. The runtime is blocked, as a stopped process or a starved one is.

use super::*;

/// A server in a thread of its own, which goes on while the agent is stopped. It answers each request after a while.
fn independent_server(answer_after: Duration) -> SocketAddr {
    use std::io::{Read as _, Write as _};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let _ = stream.read(&mut [0; 1024]);
                std::thread::sleep(answer_after);
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK");
            });
        }
    });
    at
}

/// Stops the whole runtime for a time that begins `after` the call.
async fn stop_the_world(after: Duration, length: Duration) {
    sleep(after).await;
    #[allow(clippy::disallowed_methods, reason = "it stops the runtime")]
    std::thread::sleep(length);
}

fn short() -> Check {
    Check { timeout: Duration::from_millis(100), ..http(get()) }
}

#[tokio::test]
async fn a_healthy_server_passes_however_the_agent_is_stopped() {
    let at = independent_server(Duration::from_millis(40));
    let (prober, check) = (Prober::start(), short());
    sleep(Duration::from_millis(50)).await;
    for after in [0, 1, 10, 39, 60] {
        let stop = stop_the_world(Duration::from_millis(after), Duration::from_millis(500));
        let (result, ()) = tokio::join!(prober.probe(&check, at), stop);
        assert!(result.code.passes(), "stopped after {after} ms: {} {}", result.code.label(), result.detail);
    }
}

#[tokio::test]
async fn a_server_that_gave_up_meanwhile_is_no_failure() {
    let (at, _task) = server(vec![ReadHead, Wait(20)]).await;
    let (prober, check) = (Prober::start(), short());
    sleep(Duration::from_millis(50)).await;
    let stop = stop_the_world(Duration::from_millis(5), Duration::from_millis(500));
    let (result, ()) = tokio::join!(prober.probe(&check, at), stop);
    assert_eq!(result.code, CheckCode::LocalError, "{}", result.detail);
    assert!(result.detail.contains("did not run for"), "{}", result.detail);
    assert_eq!(prober.load().local_errors, 1);
}

#[tokio::test]
async fn a_dead_server_is_found_by_a_starved_agent() {
    let (at, _task) = server(vec![Hang]).await;
    let prober = Prober::start();
    sleep(Duration::from_millis(50)).await;
    let check = Check { timeout: Duration::from_millis(200), ..http(get()) };
    // The agent runs half of the time only.
    let starved = async {
        loop {
            stop_the_world(Duration::from_millis(40), Duration::from_millis(40)).await;
        }
    };
    let result = tokio::select! {
        result = prober.probe(&check, at) => result,
        () = starved => unreachable!(),
    };
    assert_eq!(result.code, CheckCode::L7Tout, "{}", result.detail);
    assert!(result.duration > Duration::from_millis(220), "its limit did not grow: {:?}", result.duration);
}

/// L1: a fault of breaker's own in one probe ends that probe, says nothing about the server, and leaves the others alone.
#[tokio::test]
async fn a_probe_that_panics_has_no_result() {
    let prober = Prober::start();
    let outcome = prober.within_limit(Duration::from_secs(1), async { panic!("out of cheese") }).await;
    let (code, detail) = outcome.unwrap();
    assert!(code == CheckCode::LocalError && detail.contains("out of cheese"), "{detail}");
    let at = independent_server(Duration::ZERO);
    assert!(prober.probe(&short(), at).await.code.passes(), "the next probe is made as usual");
}
