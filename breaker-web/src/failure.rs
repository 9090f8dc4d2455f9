//! An answer that is an error.

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use breaker_api::commands::ErrorBody;

/// A status and a reason, which becomes the JSON of [`ErrorBody`].
#[derive(Debug)]
pub struct Failure(pub StatusCode, pub String);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, Json(ErrorBody { error: self.1 })).into_response()
    }
}
