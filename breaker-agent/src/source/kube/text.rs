//! Texts for statuses and Events.

/// Longest message in bytes. It bounds the size of the object.
const MAX_MESSAGE_BYTES: usize = 256;

/// Cuts a text to `MAX_MESSAGE_BYTES` bytes, at the boundary of a character, and appends an ellipsis.
pub(super) fn short(text: &str) -> String {
    if text.len() <= MAX_MESSAGE_BYTES {
        return text.to_owned();
    }
    let end = (0..=MAX_MESSAGE_BYTES).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
    format!("{}…", &text[..end])
}
