//! Optional values that are an empty string in JSON while they are not known.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::IntoDeserializer as _};

/// For `#[serde(with = "crate::text::or_empty")]`: `None` is written as `""`. On reading, `""` becomes `None`, and so
/// does a name that only another version knows.
pub(crate) mod or_empty {
    use super::{Deserialize, Deserializer, Serialize, Serializer, parse};

    pub(crate) fn serialize<T: Serialize, S: Serializer>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => value.serialize(serializer),
            None => serializer.serialize_str(""),
        }
    }

    pub(crate) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<T>, D::Error> {
        Ok(parse(&String::deserialize(deserializer)?))
    }
}

/// For a field that is left out if it is `None`: on reading, a name that only another version knows becomes `None`.
pub(crate) fn lenient<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.and_then(|text| parse(&text)))
}

fn parse<'de, T: Deserialize<'de>>(text: &str) -> Option<T> {
    let text: serde::de::value::StringDeserializer<serde::de::value::Error> = text.to_owned().into_deserializer();
    T::deserialize(text).ok()
}

#[cfg(test)]
mod tests {
    use breaker_common::BreakerState;
    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Example {
        #[serde(with = "super::or_empty")]
        state: Option<BreakerState>,
        #[serde(skip_serializing_if = "Option::is_none", default, deserialize_with = "super::lenient")]
        before: Option<BreakerState>,
    }

    #[test]
    fn what_is_not_known_is_empty_and_what_only_others_know_is_none() {
        let read = |json: &str| serde_json::from_str::<Example>(json).unwrap();
        let write = |value: &Example| serde_json::to_string(value).unwrap();
        let half_open = Example { state: Some(BreakerState::HalfOpen), before: Some(BreakerState::Closed) };
        assert_eq!(write(&half_open), r#"{"state":"HalfOpen","before":"Closed"}"#);
        assert_eq!(read(&write(&half_open)), half_open);
        let unknown = Example { state: None, before: None };
        assert_eq!(write(&unknown), r#"{"state":""}"#);
        assert_eq!(read(r#"{"state":""}"#), unknown);
        assert_eq!(read(r#"{"state":"Ajar","before":"Ajar"}"#), unknown);
    }
}
