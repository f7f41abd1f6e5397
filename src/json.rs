//! Reading of JSON objects: the fields that are asked for, each once; the rest is skipped, not kept.
//!
//! A document costs no more memory than the fields that it is read for, whatever a client puts
//! beside them: skipping is serde_json's own, which goes over nested lists without recursion and
//! keeps one byte a level. A field that stands twice is refused, not overwritten: two readers of
//! such a document may see two different ones (RFC 8259, section 4), and neither a token nor a
//! request is worth that risk.

use std::fmt;
use std::str;

use serde_core::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Error, Map, Value};

/// Reads `bytes` as one JSON object (RFC 8259), of which it keeps the fields with these names. A
/// list or an object among them stands as an empty one: nobody asks for what is in it.
/// An error holds no piece of the document.
pub fn object(bytes: &[u8], names: &[&str]) -> Result<Map<String, Value>, Error> {
    fields(text(bytes)?, names)
}

/// Reads `bytes` as one JSON array, of whose objects it keeps the fields with these names, as
/// [`object`] does. Beside objects it may hold texts.
pub fn list(bytes: &[u8], names: &[&str]) -> Result<Vec<Value>, Error> {
    let item = |item: &&RawValue| match item.get().as_bytes().first() {
        Some(b'{') => fields(item.get(), names).map(Value::Object),
        Some(b'"') => serde_json::from_str(item.get()),
        _ => Err(Error::custom("neither an object nor a text")),
    };
    serde_json::from_str::<Vec<&RawValue>>(text(bytes)?)?.iter().map(item).collect()
}

/// What is skipped is not looked into, so this is seen to first.
fn text(bytes: &[u8]) -> Result<&str, Error> {
    str::from_utf8(bytes).map_err(Error::custom)
}

fn fields(text: &str, names: &[&str]) -> Result<Map<String, Value>, Error> {
    let mut document = serde_json::Deserializer::from_str(text);
    let fields = Fields(names).deserialize(&mut document)?;
    document.end()?;
    Ok(fields)
}

/// An object, as its fields with these names.
struct Fields<'n>(&'n [&'n str]);

impl<'de> DeserializeSeed<'de> for Fields<'_> {
    type Value = Map<String, Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = Map<String, Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let mut fields = Map::new();
        while let Some((name, value)) = access.next_entry::<String, &RawValue>()? {
            if self.0.contains(&name.as_str()) {
                let value = flat(value.get()).map_err(A::Error::custom)?;
                if fields.insert(name, value).is_some() {
                    return Err(A::Error::custom("a name stands twice"));
                }
            }
        }
        Ok(fields)
    }
}

/// The value, without what is in it if it is a list or an object.
fn flat(text: &str) -> Result<Value, Error> {
    match text.as_bytes().first() {
        Some(b'[') => Ok(Value::Array(Vec::new())),
        Some(b'{') => Ok(Value::Object(Map::new())),
        _ => serde_json::from_str(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn fields_that_are_asked_for() {
        let check = |text: &str, expected: Value| {
            let read = object(text.as_bytes(), &["a", "b"]).map(Value::Object);
            assert_eq!(read.ok(), Some(expected), "{text:.40}");
        };
        check("{}", json!({}));
        check(r#" {"b":"x\n","c":1,"a":null} "#, json!({"a": null, "b": "x\n"}));
        check(r#"{"a":-1,"b":1.5}"#, json!({"a": -1, "b": 1.5}));
        check(r#"{"a":[1,{"a":2},[]],"b":{"a":2,"a":3}}"#, json!({"a": [], "b": {}}));
        check(r#"{"c":1,"c":2,"a":true}"#, json!({"a": true}));
        let deep = format!(r#"{{"a":{0}{1},"c":{0}{1}}}"#, "[".repeat(30_000), "]".repeat(30_000));
        check(&deep, json!({"a": []}));
    }

    #[test]
    fn what_is_no_object() {
        let deep = format!("{{\"c\":{}", "[".repeat(100_000));
        for bad in [
            "",
            "[]",
            "1",
            "{",
            "{}x",
            r#"{"a":1,"a":1}"#,
            r#"{"a":1,"\u0061":2}"#,
            r#"{"c":[1,}"#,
            r#"{"c":01}"#,
            r#"{1:2}"#,
            &deep,
        ] {
            assert!(object(bad.as_bytes(), &["a"]).is_err(), "{bad:.20}");
        }
        for bad in [b"{\"a\":\"\xff\"}", b"{\"c\":\"\xff\"}"] {
            assert!(object(bad, &["a"]).is_err(), "{bad:?}");
        }
    }
}
