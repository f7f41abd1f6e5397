//! JSON as replies have it: fields in the order in which they are written.

use serde_json::Value;

use crate::clock::{self, Now};

/// A JSON object whose fields come in the order in which they are written.
pub(crate) struct Json(String);

impl Json {
    /// `{`
    pub fn new() -> Self {
        let mut text = String::with_capacity(512);
        text.push('{');
        Json(text)
    }

    /// Adds a field.
    pub fn field(&mut self, name: &str, value: impl Into<Value>) -> &mut Self {
        match value.into() {
            Value::String(text) => self.text(name, &text),
            value => self.written(name, &value.to_string()),
        }
    }

    /// Adds a text.
    pub fn text(&mut self, name: &str, text: &str) -> &mut Self {
        // Tokens, dates and PEM but for its line breaks: most of what there is.
        if text.bytes().all(|b| b >= b' ' && b != b'"' && b != b'\\') {
            self.name(name).push('"');
            self.0.push_str(text);
            self.0.push('"');
            return self;
        }
        self.written(name, &Value::from(text).to_string())
    }

    /// Adds an object.
    pub fn object(&mut self, name: &str, fields: &mut Json) -> &mut Self {
        self.written(name, &fields.end())
    }

    /// Adds a list of values that are JSON already.
    pub fn array(&mut self, name: &str, values: &[String]) -> &mut Self {
        self.written(name, &format!("[{}]", values.join(",")))
    }

    fn written(&mut self, name: &str, json: &str) -> &mut Self {
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

    /// Adds the field that closes every answer, and `}`.
    pub fn timestamp(&mut self, now: Now) -> String {
        self.text("timestamp", &clock::rfc3339(now.unix_ms));
        self.end()
    }

    /// `}`
    pub fn end(&mut self) -> String {
        self.0.push('}');
        std::mem::take(&mut self.0)
    }
}
