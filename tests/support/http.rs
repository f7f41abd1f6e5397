//! A small blocking HTTP/1.1 client on a plain socket, always with time-outs.
//!
//! By hand, so that tests can send what no library would and see each answer as it came.

use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// An answer as it came.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    /// The first field of this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        let field = self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
        field.map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        match serde_json::from_slice(&self.body) {
            Ok(value) => value,
            Err(e) => panic!("{e} in the body of {}: {:?}", self.status, self.text()),
        }
    }

    /// A text field of the JSON body, empty if there is none.
    pub fn field(&self, name: &str) -> String {
        let json: Value = serde_json::from_slice(&self.body).unwrap_or_default();
        json.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    /// The error code of the JSON body, empty if there is none.
    pub fn code(&self) -> String {
        self.field("code")
    }
}

/// A client of one server; every request has a connection of its own.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    pub addr: SocketAddr,
    pub timeout: Duration,
}

impl Client {
    /// A client of 127.0.0.1:`port` that gives up after ten seconds.
    pub fn new(port: u16) -> Self {
        Client { addr: SocketAddr::from(([127, 0, 0, 1], port)), timeout: Duration::from_secs(10) }
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Response {
        self.request("GET", path, &[], b"")
    }

    /// Sends `json` as `application/json`.
    #[track_caller]
    pub fn post(&self, path: &str, json: &Value) -> Response {
        self.post_with(path, &[], json)
    }

    #[track_caller]
    pub fn post_with(&self, path: &str, headers: &[(&str, &str)], json: &Value) -> Response {
        let mut all = vec![("Content-Type", "application/json")];
        all.extend_from_slice(headers);
        self.request("POST", path, &all, json.to_string().as_bytes())
    }

    #[track_caller]
    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Response {
        match self.try_request(method, path, headers, body) {
            Ok(response) => response,
            Err(e) => panic!("{method} {path}: {e}"),
        }
    }

    /// As [`Client::request`]; an error is no answer within the time-out.
    pub fn try_request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<Response> {
        let mut headers = headers.to_vec();
        headers.push(("Connection", "close"));
        Connection::open(self)?.request(method, path, &headers, body)
    }

    /// Sends `bytes` as they are and reads until the server closes or the time-out passes.
    pub fn raw(&self, bytes: &[u8]) -> Vec<u8> {
        let mut connection = Connection::open(self).unwrap();
        let _ = connection.stream.write_all(bytes); // the server may answer and close before all is sent
        let mut answer = Vec::new();
        let _ = connection.stream.read_to_end(&mut answer);
        answer
    }
}

/// A connection that is kept alive.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    pub fn open(client: &Client) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&client.addr, client.timeout)?;
        stream.set_read_timeout(Some(client.timeout))?;
        stream.set_write_timeout(Some(client.timeout))?;
        stream.set_nodelay(true)?;
        Ok(Connection { stream, buffer: Vec::new() })
    }

    pub fn post(&mut self, path: &str, json: &Value) -> io::Result<Response> {
        let headers = [("Content-Type", "application/json")];
        self.request("POST", path, &headers, json.to_string().as_bytes())
    }

    pub fn request(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<Response> {
        let mut head = format!("{method} {path} HTTP/1.1\r\n");
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
            head.push_str("Host: localhost\r\n");
        }
        for (name, value) in headers {
            write!(head, "{name}: {value}\r\n").unwrap();
        }
        if !body.is_empty() || method == "POST" {
            write!(head, "Content-Length: {}\r\n", body.len()).unwrap();
        }
        head.push_str("\r\n");
        let mut message = head.into_bytes();
        message.extend_from_slice(body);
        // A server may answer and close before it has read all; then there is an answer to read.
        let sent = self.stream.write_all(&message);
        let answer = self.read_response(method);
        if answer.is_err() { sent.and(answer) } else { answer }
    }

    fn read_response(&mut self, method: &str) -> io::Result<Response> {
        loop {
            let end = self.fill_until(b"\r\n\r\n")?;
            let head = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
            self.buffer.drain(..end + 4);
            let (status, headers) = parse_head(&head)?;
            let mut response = Response { status, headers, body: Vec::new() };
            if (100..200).contains(&status) {
                continue;
            }
            if method != "HEAD" && status != 204 && status != 304 {
                response.body = self.read_body(&response)?;
            }
            return Ok(response);
        }
    }

    fn read_body(&mut self, response: &Response) -> io::Result<Vec<u8>> {
        let chunked =
            response.header("Transfer-Encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked"));
        if chunked {
            return self.read_chunks();
        }
        match response.header("Content-Length") {
            Some(length) => self.take(length.parse().map_err(|_| bad("Content-Length"))?),
            None => {
                self.stream.read_to_end(&mut self.buffer)?;
                Ok(std::mem::take(&mut self.buffer))
            }
        }
    }

    fn read_chunks(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let end = self.fill_until(b"\r\n")?;
            let line = self.take(end + 2)?;
            let size = usize::from_str_radix(String::from_utf8_lossy(&line).trim(), 16)
                .map_err(|_| bad("chunk size"))?;
            body.extend_from_slice(&self.take(size)?);
            self.take(2)?;
            if size == 0 {
                return Ok(body);
            }
        }
    }

    fn fill_until(&mut self, mark: &[u8]) -> io::Result<usize> {
        loop {
            if let Some(at) = self.buffer.windows(mark.len()).position(|w| w == mark) {
                return Ok(at);
            }
            self.fill()?;
        }
    }

    fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        while self.buffer.len() < length {
            self.fill()?;
        }
        Ok(self.buffer.drain(..length).collect())
    }

    fn fill(&mut self) -> io::Result<()> {
        let mut chunk = [0; 16 * 1024];
        match self.stream.read(&mut chunk) {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                self.buffer.extend_from_slice(&chunk[..n]);
                Ok(())
            }
            // A read with a time-out is not resumed by the kernel when the process was stopped.
            Err(e) if e.kind() == ErrorKind::Interrupted => Ok(()),
            Err(e) => Err(e),
        }
    }
}

type Head = (u16, Vec<(String, String)>);

fn parse_head(head: &str) -> io::Result<Head> {
    let mut lines = head.split("\r\n");
    let first = lines.next().unwrap_or_default();
    let status = first.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(|| bad(first))?;
    let headers = lines
        .map(|line| {
            let (name, value) = line.split_once(':').ok_or_else(|| bad(line))?;
            Ok((name.to_owned(), value.trim().to_owned()))
        })
        .collect::<io::Result<_>>()?;
    Ok((status, headers))
}

fn bad(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("not HTTP: {what:?}"))
}
