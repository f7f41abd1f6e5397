//! JSON as replies have it: fields in the order in which they are written.

use serde_json::Value;

use crate::clock::{self, Now};

/// A JSON object whose fields come in the order in which they are written.
pub(crate) struct Json(String);

impl Json {
    pub fn new() -> Self {
        let mut text = String::with_capacity(512);
        text.push('{');
        Json(text)
    }

    /// The field with which most good answers begin.
    pub fn success() -> Self {
        Json::new().field("success", true)
    }

    pub fn field(self, name: &str, value: impl Into<Value>) -> Self {
        match value.into() {
            Value::String(text) => self.text(name, &text),
            // In every answer.
            Value::Bool(is) => self.written(name, if is { "true" } else { "false" }),
            value => self.written(name, &value.to_string()),
        }
    }

    /// Adds a field if there is something to say.
    pub fn some(self, name: &str, value: Option<impl Into<Value>>) -> Self {
        match value {
            Some(value) => self.field(name, value),
            None => self,
        }
    }

    pub fn text(mut self, name: &str, text: &str) -> Self {
        // Tokens, dates and names: most of what there is. A search that goes to the end in any case
        // looks at many at once.
        let is_plain = |b: u8| (b >= b' ') & (b != b'"') & (b != b'\\');
        if text.bytes().fold(true, |all, b| all & is_plain(b)) {
            self.name(name).push('"');
            self.0.push_str(text);
            self.0.push('"');
            return self;
        }
        self.written(name, &serde_json::to_string(text).unwrap_or_default())
    }

    pub fn object(self, name: &str, fields: Json) -> Self {
        self.written(name, &fields.end())
    }

    pub fn array(self, name: &str, values: impl Iterator<Item = Json>) -> Self {
        let values: Vec<String> = values.map(Json::end).collect();
        self.written(name, &format!("[{}]", values.join(",")))
    }

    fn written(mut self, name: &str, json: &str) -> Self {
        self.name(name).push_str(json);
        self
    }

    fn name(&mut self, name: &str) -> &mut String {
        if self.0.len() > 1 {
            self.0.push(',');
        }
        self.0.push('"');
        self.0.push_str(name);
        self.0.push_str("\":");
        &mut self.0
    }

    /// Adds the field that closes most answers.
    pub fn timestamp(self, now: Now) -> Self {
        self.text("timestamp", &clock::rfc3339(now.unix_ms))
    }

    pub fn end(mut self) -> String {
        self.0.push('}');
        self.0
    }
}
