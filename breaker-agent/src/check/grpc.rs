//! `grpc`: the gRPC health checking protocol, grpc.health.v1.

use std::{net::SocketAddr, sync::Mutex};

use hyper_util::rt::TokioIo;
use tonic::transport::Endpoint;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tower::service_fn;

use super::{
    CheckCode,
    connect::{self, Connection, End},
    outcome::{Outcome, Progress, Stage},
};

pub(super) async fn probe(at: SocketAddr, service: &str, progress: &Progress) -> Outcome {
    let stream = match connect::tcp(at, End::Reset).await.and_then(Connection::stream) {
        Ok(stream) => stream,
        Err(outcome) => return outcome,
    };
    progress.reached(Stage::Answer);
    let endpoint = match Endpoint::from_shared(format!("http://{at}")) {
        Ok(endpoint) => endpoint,
        Err(error) => return (CheckCode::LocalError, error.to_string()),
    };
    // The library asks for a connection once, and gets the one that is there.
    let stream = Mutex::new(Some(TokioIo::new(stream)));
    let connector = service_fn(move |_| {
        let stream = stream.lock().ok().and_then(|mut stream| stream.take());
        std::future::ready(stream.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected)))
    });
    let channel = match endpoint.connect_with_connector(connector).await {
        Ok(channel) => channel,
        Err(error) => return (CheckCode::L7Rsp, last_cause(&error)),
    };
    let request = HealthCheckRequest { service: service.to_owned() };
    match HealthClient::new(channel).check(request).await {
        Ok(response) => match response.into_inner().status() {
            ServingStatus::Serving => (CheckCode::L7Ok, "SERVING".into()),
            other => (CheckCode::L7Sts, other.as_str_name().into()),
        },
        Err(status) => refusal(&status, service),
    }
}

/// The outcome of an answer that is no health. The server's own text is left out: it is not trusted.
fn refusal(status: &tonic::Status, service: &str) -> Outcome {
    match status.code() {
        // A valid answer of the protocol: the server does not know the service.
        tonic::Code::NotFound => {
            (CheckCode::L7Sts, format!("NOT_FOUND: the server does not know the service {service:?}"))
        }
        tonic::Code::Unimplemented => {
            (CheckCode::L7Rsp, "UNIMPLEMENTED: the server does not speak grpc.health.v1".into())
        }
        code => (CheckCode::L7Rsp, format!("{code:?}: {}", code.description())),
    }
}

fn last_cause(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |cause| cause.source()).last().map_or_else(String::new, ToString::to_string)
}
