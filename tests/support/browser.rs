//! A real Chromium, spoken to in its DevTools protocol: JSON with a NUL behind each message, over the two
//! pipes that `--remote-debugging-pipe` expects as descriptors 3 and 4.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::temp::TempDir;
use super::wait;

/// A browser with one page.
pub struct Browser {
    child: Child,
    to: File,
    from: BufReader<File>,
    last: u64,
    session: Option<String>,
    /// What the page was told of that nobody asked for: requests, console, errors.
    pub events: Vec<Value>,
    dir: TempDir,
}

impl Browser {
    /// Starts it. Names that end in `.test` are this machine.
    pub fn start() -> Self {
        let dir = TempDir::new();
        let path = |name: &str| dir.path().join(name);
        for name in ["in", "out"] {
            assert!(Command::new("mkfifo").arg(path(name)).status().unwrap().success());
        }
        let command = "exec chromium --headless --no-sandbox --disable-gpu --hide-scrollbars \
            --ignore-certificate-errors --host-resolver-rules='MAP *.test 127.0.0.1' \
            --remote-debugging-pipe --user-data-dir=\"$1/profile\" 3<\"$1/in\" 4>\"$1/out\" 2>\"$1/log\"";
        let child = Command::new("sh")
            .args(["-c", command, "sh"])
            .arg(dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let to = OpenOptions::new().write(true).open(path("in")).unwrap();
        let from = BufReader::new(File::open(path("out")).unwrap());
        let mut browser =
            Browser { child, to, from, last: 0, session: None, events: Vec::new(), dir };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}));
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let session = browser.call("Target.attachToTarget", attach);
        browser.session = Some(session["sessionId"].as_str().unwrap().to_owned());
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    /// Sends a command and returns its result.
    #[track_caller]
    pub fn call(&mut self, method: &str, params: Value) -> Value {
        self.last += 1;
        let mut message = json!({"id": self.last, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        self.to.write_all(format!("{message}\0").as_bytes()).unwrap();
        loop {
            let mut answer = Vec::new();
            self.from.read_until(0, &mut answer).unwrap();
            let log = || fs::read_to_string(self.dir.path().join("log"));
            assert_eq!(answer.pop(), Some(0), "{method}: the browser has ended: {:?}", log());
            let answer: Value = serde_json::from_slice(&answer).unwrap();
            if answer["id"] == self.last {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
            self.events.push(answer);
        }
    }

    /// A window of this width, in light or dark, on this page.
    pub fn open(&mut self, url: &str, width: u32, dark: bool) {
        let size =
            json!({"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500});
        self.call("Emulation.setDeviceMetricsOverride", size);
        let scheme = if dark { "dark" } else { "light" };
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.call("Emulation.setEmulatedMedia", json!({"features": features}));
        self.call("Page.navigate", json!({"url": url}));
        self.wait_for("document.readyState === 'complete'");
    }

    /// The value of an expression, which may be a promise.
    #[track_caller]
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let params = json!({"expression": expression, "awaitPromise": true, "returnByValue": true});
        let result = self.call("Runtime.evaluate", params);
        assert!(result["exceptionDetails"].is_null(), "{expression}: {result}");
        result["result"]["value"].clone()
    }

    /// Waits until the expression is true.
    #[track_caller]
    pub fn wait_for(&mut self, expression: &str) {
        let holds = || (self.evaluate(expression) == true).then_some(());
        let held = wait::until(Duration::from_secs(20), holds);
        assert!(held.is_some(), "in vain: {expression}\n{}", self.text("body"));
    }

    /// What is to be read in an element.
    pub fn text(&mut self, selector: &str) -> String {
        let expression = format!("document.querySelector({selector:?}).innerText");
        self.evaluate(&expression).as_str().unwrap_or_default().to_owned()
    }

    /// Presses a key, as a person does.
    pub fn press(&mut self, key: &str) {
        let code = match key {
            "Tab" => 9,
            "Enter" => 13,
            "Escape" => 27,
            _ => 0,
        };
        let text = if key == "Enter" { "\r" } else { "" };
        for kind in ["keyDown", "keyUp"] {
            let params =
                json!({"type": kind, "key": key, "windowsVirtualKeyCode": code, "text": text});
            self.call("Input.dispatchKeyEvent", params);
        }
    }

    /// Types text where the focus is.
    pub fn type_in(&mut self, text: &str) {
        self.call("Input.insertText", json!({"text": text}));
    }

    /// Moves the focus by the Tab key until an element has it.
    #[track_caller]
    pub fn tab_to(&mut self, selector: &str) {
        let there = format!("document.activeElement.matches({selector:?})");
        for _ in 0..60 {
            self.press("Tab");
            if self.evaluate(&there) == true {
                return;
            }
        }
        panic!("the Tab key does not lead to {selector}");
    }

    /// Presses a button that hands out a file, and returns what is in it.
    #[track_caller]
    pub fn download(&mut self, button: &str) -> String {
        let files = self.dir.path().join("downloads");
        let page = self.session.take();
        let to = json!({"behavior": "allow", "downloadPath": files});
        self.call("Browser.setDownloadBehavior", to);
        self.session = page;
        self.tab_to(button);
        self.press("Enter");
        let whole = |name: &str| !name.ends_with(".crdownload");
        let read = || {
            let names = fs::read_dir(&files).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
            let mut done = names.filter(|path| path.to_str().is_some_and(whole));
            fs::read_to_string(done.next()?).ok().filter(|text| !text.is_empty())
        };
        let found = wait::until(Duration::from_secs(20), read);
        found.unwrap_or_else(|| panic!("nothing comes: {}", self.text("body")))
    }

    /// A picture of the page, or of one element, in PNG.
    pub fn picture(&mut self, selector: Option<&str>, file: &Path) {
        let mut params = json!({"format": "png"});
        if let Some(selector) = selector {
            let area = format!(
                "(r => ({{x: r.x, y: r.y, width: r.width, height: r.height, scale: 2}}))\
                 (document.querySelector({selector:?}).getBoundingClientRect())"
            );
            params["clip"] = self.evaluate(&area);
        }
        let picture = self.call("Page.captureScreenshot", params);
        let bytes = STANDARD.decode(picture["data"].as_str().unwrap()).unwrap();
        fs::write(file, bytes).unwrap();
    }

    /// The addresses that were asked for.
    pub fn requests(&self) -> Vec<String> {
        let of = |event: &Value| Some(event["params"]["request"]["url"].as_str()?.to_owned());
        self.events
            .iter()
            .filter(|e| e["method"] == "Network.requestWillBeSent")
            .filter_map(of)
            .collect()
    }

    /// What the console has to complain of.
    pub fn complaints(&self) -> Vec<String> {
        let bad = |e: &&Value| {
            e["method"] == "Runtime.exceptionThrown"
                || e["method"] == "Log.entryAdded" && e["params"]["entry"]["level"] == "error"
        };
        self.events.iter().filter(bad).map(Value::to_string).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
