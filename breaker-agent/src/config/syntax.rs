//! Parses YAML, and words what the parser refuses: which field, which value, what is allowed.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_saphyr::{Error, Location};

use super::ConfigError;

/// Nodes of a document for each KiB of it, at most: a node takes two bytes at least (`a,`), plus its place.
const NODES_PER_KIB: usize = 1024;

/// Parses a document. The parser's own limits, meant for documents of strangers, grow with the document: a file with
/// tens of thousands of services is valid.
///
/// # Errors
/// The first thing that the parser refuses, with its line, field and value.
pub(super) fn parse<T: DeserializeOwned>(file: &Path, text: &str) -> Result<T, Vec<ConfigError>> {
    let size = text.len() / 1024 + 1;
    let nodes = size.saturating_mul(NODES_PER_KIB).max(250_000);
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_nodes: nodes,
            max_events: nodes.saturating_mul(4),
            max_total_scalar_bytes: text.len().max(64 * 1024 * 1024),
        },
    };
    // The path of the field is known only to the wrapper, and the parser's error only to the parser.
    let mut path = String::new();
    let parsed = serde_saphyr::with_deserializer_from_str_with_options(text, options, |deserializer| {
        serde_path_to_error::deserialize(deserializer).map_err(|error| {
            path = field_path(error.path());
            error.into_inner()
        })
    });
    parsed.map_err(|error| vec![describe(file, text, &path, error.without_snippet())])
}

/// A path as this project writes it, like `services[0].primary.check`. The wrapper that carries the line has a field
/// `value`, which is left out; a header has one, too, which stays.
fn field_path(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let mut text = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => text.push_str(&format!("[{index}]")),
            Segment::Map { key } if key == "value" && !is_header(&text) => {}
            Segment::Map { key } if text.is_empty() => text.push_str(key),
            Segment::Map { key } => text.push_str(&format!(".{key}")),
            Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    text
}

fn is_header(path: &str) -> bool {
    path.rsplit('.').next().is_some_and(|last| last.starts_with("httpHeaders["))
}

fn describe(file: &Path, text: &str, path: &str, error: &Error) -> ConfigError {
    let location = error.location().unwrap_or(Location::UNKNOWN);
    let value = || scalar_at(text, location);
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    let (field, problem) = match error {
        Error::InvalidScalar { ty, .. } => {
            (path.to_owned(), format!("{} is not allowed; allowed: {}", value(), kind(ty)))
        }
        Error::InvalidBooleanStrict { .. } => {
            (path.to_owned(), format!("{} is not allowed; allowed: true or false", value()))
        }
        Error::NullIntoString { .. } => (path.to_owned(), "has no value; allowed: a text".into()),
        Error::Unexpected { expected, .. } => {
            (path.to_owned(), format!("{} is not allowed; allowed: {}", value(), kind(expected)))
        }
        Error::SerdeInvalidType { expected, .. } | Error::SerdeInvalidValue { expected, .. } => {
            (path.to_owned(), format!("{} is not allowed; allowed: {}", value(), kind(expected)))
        }
        Error::SerdeUnknownField { field, expected, .. } => {
            let path = path.strip_suffix(field.as_str()).map_or(path, |parent| parent.trim_end_matches('.'));
            let field = if path.is_empty() { field.clone() } else { format!("{path}.{field}") };
            (field, format!("is not known; allowed: {}", expected.join(", ")))
        }
        Error::SerdeMissingField { field, .. } => (below(field), "is missing; allowed: a value, it is required".into()),
        Error::DuplicateMappingKey { key: Some(key), .. } => (below(key), "is given twice; allowed: once".into()),
        other => (path.to_owned(), other.to_string()),
    };
    ConfigError { file: file.to_owned(), line: location.line(), field, problem }
}

/// The text at a location, up to the end of the value, as far as one can tell without parsing.
fn scalar_at(text: &str, location: Location) -> String {
    let line = usize::try_from(location.line()).ok().and_then(|line| text.lines().nth(line.checked_sub(1)?));
    let column = usize::try_from(location.column()).unwrap_or(1).saturating_sub(1);
    let rest: String = line.unwrap_or_default().chars().skip(column).collect();
    let end = rest.find([',', '}', ']', '#']).unwrap_or(rest.len());
    let value = rest[..end].trim();
    if value.is_empty() { "this value".into() } else { format!("{value:?}") }
}

/// What a type of Rust or YAML is for people.
fn kind(name: &str) -> String {
    let words = match name {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more",
        "i8" | "i16" | "i32" | "i64" => "a whole number",
        "f32" | "f64" => "a number",
        "bool" | "boolean" => "true or false",
        "string scalar" | "a string" => "one value",
        "mapping start" | "mapping" => "a mapping (name: value)",
        "sequence start" | "sequence" | "a sequence" => "a list",
        "scalar" => "one value",
        other => return other.strip_prefix("struct ").map_or(other, |_| "a mapping (name: value)").to_owned(),
    };
    words.to_owned()
}
