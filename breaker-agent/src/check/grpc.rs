//! `grpc`: the gRPC health checking protocol, grpc.health.v1.

use std::{net::SocketAddr, time::Duration};

use tokio::time::timeout;
use tonic::transport::Endpoint;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use super::{CheckCode, Outcome, tcp};

pub(super) async fn probe(at: SocketAddr, service: &str, limit: Duration) -> Outcome {
    let (code, detail) = tcp::probe(at, limit).await;
    if !code.passes() {
        return (code, detail);
    }
    match timeout(limit, ask(at, service, limit)).await {
        Ok(outcome) => outcome,
        Err(_) => (CheckCode::L7Tout, format!("no answer within {limit:?}")),
    }
}

async fn ask(at: SocketAddr, service: &str, limit: Duration) -> Outcome {
    let endpoint = match Endpoint::from_shared(format!("http://{at}")) {
        Ok(endpoint) => endpoint.connect_timeout(limit),
        Err(error) => return (CheckCode::L7Rsp, error.to_string()),
    };
    let channel = match endpoint.connect().await {
        Ok(channel) => channel,
        Err(error) => return (CheckCode::L4Con, error.to_string()),
    };
    let request = HealthCheckRequest { service: service.to_owned() };
    match HealthClient::new(channel).check(request).await {
        Ok(response) => match response.into_inner().status() {
            ServingStatus::Serving => (CheckCode::L7Ok, "SERVING".into()),
            other => (CheckCode::L7Sts, other.as_str_name().into()),
        },
        // NOT_FOUND is a valid answer of the protocol: the server does not know the service.
        Err(status) if status.code() == tonic::Code::NotFound => (CheckCode::L7Sts, "NOT_FOUND".into()),
        Err(status) => (CheckCode::L7Rsp, status.to_string()),
    }
}
