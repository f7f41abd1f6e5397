//! Strict reading of JSON objects: a name that stands twice is refused, not overwritten.
//!
//! Two readers of a document with a duplicate name may see two different documents (RFC 8259,
//! section 4); neither a token nor a request is worth that risk.

use std::fmt;

use serde_core::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde_json::{Map, Value};

/// Reads `bytes` as one JSON object (RFC 8259) whose top-level names are unique.
///
/// # Errors
/// What is wrong and where; never a piece of the document itself.
pub fn object(bytes: &[u8]) -> Result<Map<String, Value>, serde_json::Error> {
    serde_json::from_slice::<Unique>(bytes).map(|unique| unique.0)
}

struct Unique(Map<String, Value>);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueVisitor)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Unique;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Unique, A::Error> {
        let mut map = Map::new();
        while let Some((name, value)) = access.next_entry::<String, Value>()? {
            if map.insert(name, value).is_some() {
                return Err(A::Error::custom("a name stands twice"));
            }
        }
        Ok(Unique(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_with_unique_names_only() {
        assert_eq!(object(br#" {"a":1,"b":{"a":2}} "#).map(|m| m.len()).ok(), Some(2));
        let deep = format!("{{\"a\":{}", "[".repeat(100_000));
        for bad in ["", "[]", "1", "{", "{}x", r#"{"a":1,"a":1}"#, r#"{"a":1,"\u0061":2}"#, &deep] {
            assert!(object(bad.as_bytes()).is_err(), "{bad:.20}");
        }
        assert!(object(b"{\"a\":\"\xff\"}").is_err());
    }
}
