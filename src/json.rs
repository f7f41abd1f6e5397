//! Reading of JSON objects: the fields that are asked for, each once; the rest is skipped, not kept.
//!
//! A document costs no more memory than the fields that it is read for, whatever a client puts
//! beside them: skipping is serde_json's own, which goes over nested lists without recursion and
//! keeps one byte a level. A field that stands twice is refused, not overwritten: two readers of
//! such a document may see two different ones (RFC 8259, section 4), and neither a token nor a
//! request is worth that risk.

use std::fmt;
use std::str;

use serde_core::de::{
    Deserialize, DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde_json::{Map, Value};

/// Reads `bytes` as one JSON object (RFC 8259), of which it keeps the fields with these names. A
/// list or an object among them stands as an empty one: nobody asks for what is in it.
///
/// # Errors
/// What is wrong and where; never a piece of the document itself.
pub fn object(bytes: &[u8], names: &[&str]) -> Result<Map<String, Value>, serde_json::Error> {
    // What is skipped is not looked into, so this is seen to first.
    let text = str::from_utf8(bytes).map_err(serde_json::Error::custom)?;
    let mut document = serde_json::Deserializer::from_str(text);
    let fields = Fields(names).deserialize(&mut document)?;
    document.end()?;
    Ok(fields)
}

/// Reads `bytes` as one JSON array, of whose objects it keeps the fields with these names, as
/// [`object`] does.
///
/// # Errors
/// As there.
pub fn list(bytes: &[u8], names: &[&str]) -> Result<Vec<Value>, serde_json::Error> {
    let text = str::from_utf8(bytes).map_err(serde_json::Error::custom)?;
    let mut document = serde_json::Deserializer::from_str(text);
    let items = Items(names).deserialize(&mut document)?;
    document.end()?;
    Ok(items)
}

/// An array, each item as [`Item`].
struct Items<'n>(&'n [&'n str]);

impl<'de> DeserializeSeed<'de> for Items<'_> {
    type Value = Vec<Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Items<'_> {
    type Value = Vec<Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element_seed(Item(self.0))? {
            items.push(item);
        }
        Ok(items)
    }
}

/// An object as its fields with these names, or a text.
struct Item<'n>(&'n [&'n str]);

impl<'de> DeserializeSeed<'de> for Item<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Item<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object or a text")
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, access: A) -> Result<Value, A::Error> {
        Fields(self.0).visit_map(access).map(Value::Object)
    }
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
        while let Some(name) = access.next_key_seed(Name(self.0))? {
            let Some(name) = name else {
                access.next_value::<IgnoredAny>()?;
                continue;
            };
            let Flat(value) = access.next_value()?;
            if fields.insert(name.to_owned(), value).is_some() {
                return Err(A::Error::custom("a name stands twice"));
            }
        }
        Ok(fields)
    }
}

/// A field's name, if it is one of these.
struct Name<'n>(&'n [&'n str]);

impl<'de, 'n> DeserializeSeed<'de> for Name<'n> {
    type Value = Option<&'n str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'n> Visitor<'_> for Name<'n> {
    type Value = Option<&'n str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E: Error>(self, given: &str) -> Result<Self::Value, E> {
        Ok(self.0.iter().copied().find(|name| *name == given))
    }
}

/// A value, without what is in it if it is a list or an object.
struct Flat(Value);

impl<'de> Deserialize<'de> for Flat {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FlatVisitor).map(Flat)
    }
}

struct FlatVisitor;

impl<'de> Visitor<'de> for FlatVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        while access.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Value::Array(Vec::new()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        while access.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Value::Object(Map::new()))
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
