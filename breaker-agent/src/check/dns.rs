//! `dns` probes: one question over UDP, and again over TCP if the answer was truncated (RFC 7766, section 5).

use std::net::{IpAddr, SocketAddr};

use bytes::BytesMut;
use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, RecordType},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{
    CheckCode,
    connect::{self, End},
    exchange::send,
    outcome::{Outcome, Progress, Stage, of_connection},
};
use breaker_core::model::{DnsQuestion, DnsRcode, DnsRecord};

pub(super) async fn probe(at: SocketAddr, question: &DnsQuestion, progress: &Progress) -> Outcome {
    match ask(at, question, progress).await {
        Ok(answer) => judge(&answer, question),
        Err(outcome) => outcome,
    }
}

async fn ask(at: SocketAddr, question: &DnsQuestion, progress: &Progress) -> Result<Message, Outcome> {
    let fault = |error: &dyn std::fmt::Display| (CheckCode::LocalError, format!("make the question: {error}"));
    let name = Name::from_ascii(&question.name).map_err(|error| fault(&error))?;
    let mut message = Message::new(fastrand::u16(..), MessageType::Query, OpCode::Query);
    // No recursion: the check is about this server, and not about those that it would ask.
    message.metadata.recursion_desired = false;
    message.add_query(Query::query(name, record_type(question.record)));
    let bytes = message.to_vec().map_err(|error| fault(&error))?;
    let socket = connect::udp(at)?;
    progress.reached(Stage::Answer);
    send(&socket, &bytes).await?;
    let mut buffer = BytesMut::with_capacity(4096);
    let answer = loop {
        buffer.clear();
        socket.recv_buf(&mut buffer).await.map_err(|error| of_connection(&error))?;
        match Message::from_vec(&buffer) {
            // Not the answer to this question: a late or a forged one.
            Ok(answer) if answer.metadata.id != message.metadata.id => {}
            Ok(answer) => break answer,
            Err(error) => return Err((CheckCode::L7Rsp, format!("not a DNS message: {error}"))),
        }
    };
    if answer.metadata.truncation { ask_again(at, &bytes).await } else { Ok(answer) }
}

/// Asks over TCP. A message is preceded by its length in two bytes, most significant first (RFC 1035, section 4.2.2).
async fn ask_again(at: SocketAddr, question: &[u8]) -> Result<Message, Outcome> {
    let mut stream = connect::tcp(at, End::Reset).await?.stream()?;
    let mut request = u16::try_from(question.len()).unwrap_or(u16::MAX).to_be_bytes().to_vec();
    request.extend_from_slice(question);
    let exchange = async {
        stream.write_all(&request).await?;
        let mut answer = vec![0; stream.read_u16().await?.into()];
        stream.read_exact(&mut answer).await?;
        Ok(answer)
    };
    let answer: Vec<u8> = exchange.await.map_err(|error| of_connection(&error))?;
    Message::from_vec(&answer).map_err(|error| (CheckCode::L7Rsp, format!("not a DNS message: {error}")))
}

fn judge(answer: &Message, question: &DnsQuestion) -> Outcome {
    let code = answer.metadata.response_code;
    if answer.metadata.message_type != MessageType::Response {
        return (CheckCode::L7Rsp, "a DNS question came back in place of an answer".into());
    }
    if question.rcode.is_some_and(|wanted| code != response_code(wanted)) {
        return (CheckCode::L7Sts, format!("response code {code}"));
    }
    let found: Vec<IpAddr> = answer.answers.iter().filter_map(|record| address(&record.data)).collect();
    match question.expected_addresses.iter().find(|wanted| !found.contains(wanted)) {
        Some(missing) => (CheckCode::L7Rsp, format!("the answer does not contain {missing}")),
        None => (CheckCode::L7Ok, format!("response code {code}")),
    }
}

fn address(data: &RData) -> Option<IpAddr> {
    match data {
        RData::A(address) => Some(IpAddr::V4(address.0)),
        RData::AAAA(address) => Some(IpAddr::V6(address.0)),
        _ => None,
    }
}

const fn record_type(record: DnsRecord) -> RecordType {
    match record {
        DnsRecord::A => RecordType::A,
        DnsRecord::Aaaa => RecordType::AAAA,
        DnsRecord::Cname => RecordType::CNAME,
        DnsRecord::Mx => RecordType::MX,
        DnsRecord::Ns => RecordType::NS,
        DnsRecord::Ptr => RecordType::PTR,
        DnsRecord::Soa => RecordType::SOA,
        DnsRecord::Srv => RecordType::SRV,
        DnsRecord::Txt => RecordType::TXT,
    }
}

const fn response_code(rcode: DnsRcode) -> ResponseCode {
    match rcode {
        DnsRcode::NoError => ResponseCode::NoError,
        DnsRcode::ServFail => ResponseCode::ServFail,
        DnsRcode::NxDomain => ResponseCode::NXDomain,
        DnsRcode::Refused => ResponseCode::Refused,
    }
}
