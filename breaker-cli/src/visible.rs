//! Text of others on a terminal: an operator's reason, a server's answer, the name of an interface. Characters that a
//! terminal acts on are shown as escapes.

use anyhow::{Context as _, Result};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

/// A copy of a value in which every text is safe for a terminal. JSON and YAML output need no such copy: they escape by
/// themselves.
///
/// # Errors
/// The value is not the same after it was written and read as JSON. This does not happen with the types of breaker-api.
pub(crate) fn visible<T: Serialize + DeserializeOwned>(value: &T) -> Result<T> {
    let mut json = serde_json::to_value(value).context("prepare the output")?;
    escape_texts(&mut json);
    serde_json::from_value(json).context("prepare the output")
}

fn escape_texts(value: &mut Value) {
    match value {
        Value::String(text) if text.chars().any(acts_on_a_terminal) => *text = escaped(text),
        Value::Array(values) => values.iter_mut().for_each(escape_texts),
        Value::Object(fields) => {
            if fields.keys().any(|key| key.chars().any(acts_on_a_terminal)) {
                *fields = std::mem::take(fields).into_iter().map(|(key, value)| (escaped(&key), value)).collect();
            }
            fields.values_mut().for_each(escape_texts);
        }
        _ => {}
    }
}

fn escaped(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if acts_on_a_terminal(c) { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    shown
}

/// Control characters (ECMA-48), and those that change the direction of the text around them (Unicode, UAX 9).
fn acts_on_a_terminal(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_a_terminal_would_act_on_is_shown() {
        let value = json!({"reason": "a\u{1b}[31mb\nc\u{9b}d\u{202e}e", "eth\u{7}": ["\t", "plain \u{e9}"], "n": 1});
        let expected =
            json!({"reason": r"a\u{1b}[31mb\nc\u{9b}d\u{202e}e", r"eth\u{7}": [r"\t", "plain \u{e9}"], "n": 1});
        assert_eq!(visible(&value).unwrap(), expected);
    }
}
