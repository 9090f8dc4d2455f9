//! HTTP/1.1 for probes (RFC 9110, RFC 9112): one request, one answer. It is as lenient as Go's client, which the kubelet
//! uses: an answer may come early, have many headers, folded ones, or no length.

use breaker_core::model::HttpGet;
use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::{
    CheckCode,
    http_message::{Answer, BODY_LIMIT, default_headers, is_given},
    outcome::{Outcome, Progress, of_connection},
};

/// Largest head of an answer, in bytes. Go allows as much.
const HEAD_LIMIT: usize = 1 << 20;
/// Informational answers (1xx) before the final one, at most. Go allows as many.
const INFORMATIONAL_LIMIT: usize = 5;

/// Sends the request and reads the answer.
///
/// # Errors
/// The outcome of the probe, if there is no valid answer.
pub(super) async fn get(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    get: &HttpGet,
    authority: &str,
    progress: &Progress,
) -> Result<Answer, Outcome> {
    // A server may answer and close before it has read the request, so a failed write is no verdict yet.
    let sent = match stream.write_all(&request(get, authority)).await {
        Ok(()) => stream.flush().await,
        error => error,
    };
    let mut buffer = BytesMut::with_capacity(2048);
    for _ in 0..=INFORMATIONAL_LIMIT {
        let head = read_head(&mut stream, &mut buffer).await;
        if let (Err(error), Err(_), true) = (&sent, &head, buffer.is_empty()) {
            return Err(of_connection(error));
        }
        let head = head?;
        // 101 is final: the protocol changes (RFC 9110, section 15.2.2).
        if !(100..200).contains(&head.status) || head.status == 101 {
            progress.answered(head.status);
            let body = read_body(&mut stream, &mut buffer, &head).await;
            return Ok(Answer { status: head.status, body });
        }
    }
    Err((CheckCode::L7Rsp, format!("more than {INFORMATIONAL_LIMIT} informational answers")))
}

fn request(get: &HttpGet, authority: &str) -> Vec<u8> {
    let mut request = format!("GET {} HTTP/1.1\r\nHost: {authority}\r\n", get.path);
    for (name, value) in default_headers(get) {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    if !is_given(get, "connection") {
        request.push_str("Connection: close\r\n");
    }
    for (name, value) in get.headers.iter().filter(|(name, _)| !name.eq_ignore_ascii_case("host")) {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str("\r\n");
    request.into_bytes()
}

/// The part of an answer's head that a check needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    status: u16,
    framing: Framing,
}

/// How the end of the body is found (RFC 9112, section 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    /// By the length.
    Length(usize),
    /// By the last chunk.
    Chunked,
    /// By the end of the connection.
    ToEnd,
}

async fn read_head(stream: &mut (impl AsyncRead + Unpin), buffer: &mut BytesMut) -> Result<Head, Outcome> {
    loop {
        if let Some((head, length)) = parse_head(buffer)? {
            buffer.advance(length);
            return Ok(head);
        }
        if buffer.len() > HEAD_LIMIT {
            return Err((CheckCode::L7Rsp, format!("the head of the answer is longer than {HEAD_LIMIT} bytes")));
        }
        match stream.read_buf(buffer).await {
            Ok(0) if buffer.is_empty() => {
                return Err((CheckCode::L7Rsp, "the server closed the connection without an answer".into()));
            }
            Ok(0) => return Err((CheckCode::L7Rsp, "the answer ends in its head".into())),
            Ok(_) => {}
            // A TLS server that closes without an alert.
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Err((CheckCode::L7Rsp, "the server closed the connection without a whole answer".into()));
            }
            Err(error) => return Err(of_connection(&error)),
        }
    }
}

/// Parses a head. Returns it with its length in bytes, or `None` if it is not complete yet.
fn parse_head(bytes: &[u8]) -> Result<Option<(Head, usize)>, Outcome> {
    // A later version of HTTP/1 is understood as HTTP/1.1 (RFC 9110, section 2.5), which the parser does not know.
    let later = bytes.strip_prefix(b"HTTP/1.").is_some_and(|rest| matches!(rest.first(), Some(b'2'..=b'9')));
    if later {
        return parse_head(&[b"HTTP/1.1", &bytes[8..]].concat());
    }
    // Most heads have fewer headers, and some servers send hundreds.
    for room in [32, 512, 16_384] {
        let mut headers = vec![httparse::EMPTY_HEADER; room];
        let mut response = httparse::Response::new(&mut headers);
        let mut config = httparse::ParserConfig::default();
        config.allow_obsolete_multiline_headers_in_responses(true);
        config.allow_spaces_after_header_name_in_responses(true);
        config.allow_multiple_spaces_in_response_status_delimiters(true);
        match config.parse_response(&mut response, bytes) {
            Ok(httparse::Status::Partial) => return Ok(None),
            Ok(httparse::Status::Complete(length)) => {
                let status = response.code.unwrap_or(0);
                return Ok(Some((Head { status, framing: framing(status, response.headers)? }, length)));
            }
            Err(httparse::Error::TooManyHeaders) => {}
            Err(error) => return Err((CheckCode::L7Rsp, format!("not an HTTP answer: {error}"))),
        }
    }
    Err((CheckCode::L7Rsp, "too many headers".into()))
}

fn framing(status: u16, headers: &[httparse::Header<'_>]) -> Result<Framing, Outcome> {
    if matches!(status, 100..=199 | 204 | 304) {
        return Ok(Framing::Length(0));
    }
    let values = |name: &'static str| {
        let named = headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name));
        named
            .filter_map(|header| std::str::from_utf8(header.value).ok())
            .flat_map(|value| value.split(','))
            .map(str::trim)
    };
    if values("transfer-encoding").next_back().is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
        return Ok(Framing::Chunked);
    }
    let mut lengths = values("content-length");
    let Some(first) = lengths.next() else { return Ok(Framing::ToEnd) };
    let length = first.parse().ok().filter(|_| first.bytes().all(|byte| byte.is_ascii_digit()));
    match length {
        Some(length) if lengths.all(|other| other == first) => Ok(Framing::Length(length)),
        _ => Err((CheckCode::L7Rsp, format!("the Content-Length {first:?} is not valid"))),
    }
}

/// Reads the body up to the limit. An error ends it: the status has come, so the answer is there.
async fn read_body(stream: &mut (impl AsyncRead + Unpin), buffer: &mut BytesMut, head: &Head) -> Vec<u8> {
    loop {
        let complete = match head.framing {
            Framing::Length(length) => buffer.len() >= length.min(BODY_LIMIT),
            Framing::Chunked => decode_chunks(buffer).1,
            Framing::ToEnd => buffer.len() >= BODY_LIMIT,
        };
        if complete || !matches!(stream.read_buf(buffer).await, Ok(1..)) {
            break;
        }
    }
    match head.framing {
        Framing::Length(length) => buffer[..buffer.len().min(length).min(BODY_LIMIT)].to_vec(),
        Framing::Chunked => decode_chunks(buffer).0,
        Framing::ToEnd => buffer[..buffer.len().min(BODY_LIMIT)].to_vec(),
    }
}

/// Decodes the chunks that have come so far (RFC 9112, section 7.1). Returns the body, and whether it is complete or
/// ends in an error.
fn decode_chunks(mut bytes: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    while body.len() < BODY_LIMIT {
        let (start, size) = match httparse::parse_chunk_size(bytes) {
            Ok(httparse::Status::Complete((start, size))) => (start, usize::try_from(size).unwrap_or(usize::MAX)),
            Ok(httparse::Status::Partial) => return (body, false),
            Err(_) => return (body, true),
        };
        if size == 0 {
            return (body, true);
        }
        let chunk = &bytes[start..];
        body.extend_from_slice(&chunk[..chunk.len().min(size)]);
        // The chunk ends with CRLF.
        match chunk.get(size.saturating_add(2)..) {
            Some(rest) => bytes = rest,
            None => return (body, false),
        }
    }
    body.truncate(BODY_LIMIT);
    (body, true)
}
