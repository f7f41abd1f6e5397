//! A real Mosquitto as a child process, set up as `docs/mosquitto.md` says, and its clients.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::device::Device;
use super::https;
use super::port::Port;
use super::service::Service;
use super::temp::TempDir;
use super::wait;

/// A running broker. `Drop` kills it, by its process id.
#[derive(Debug)]
pub struct Broker {
    child: Child,
    dir: TempDir,
    port: Port,
}

impl Broker {
    /// Starts a broker for the devices of `service`.
    #[track_caller]
    pub fn start(service: &Service) -> Self {
        let dir = TempDir::new();
        https::server_certificate(service, &["localhost"], dir.path());
        let port = Port::any();
        dir.file("acl", "pattern readwrite devices/%u/#\n");
        let path = |name: &str| dir.path().join(name).display().to_string();
        let config = format!(
            "user root\nlistener {} 127.0.0.1\ncafile {}\ncertfile {}\nkeyfile {}\n\
             require_certificate true\nuse_identity_as_username true\ncrlfile {}\nacl_file {}\n\
             log_dest file {}\nlog_type all\n",
            port.number(),
            service.data("ca/root-ca.crt").display(),
            path("server.crt"),
            path("server.key"),
            service.data("ca/crl.pem").display(),
            path("acl"),
            path("log"),
        );
        let config = dir.file("mosquitto.conf", &config);
        let out = File::create(dir.path().join("out")).unwrap();
        let mut command = Command::new("mosquitto");
        command.arg("-c").arg(config).stdin(Stdio::null());
        let child = command.stdout(out.try_clone().unwrap()).stderr(out).spawn();
        let child = child.unwrap_or_else(|e| {
            panic!("mosquitto is not installed (scripts/test.sh installs it): {e}");
        });
        let broker = Broker { child, dir, port };
        wait::for_true(&format!("mosquitto listens: {}", broker.log()), || {
            std::net::TcpStream::connect(("127.0.0.1", broker.port.number())).is_ok()
        });
        broker
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        ["out", "log"].map(|n| fs::read_to_string(self.path(n)).unwrap_or_default()).concat()
    }

    /// Where its certificate and key are.
    pub fn folder(&self) -> &Path {
        self.dir.path()
    }

    /// The certificate that it shows a new client, in PEM.
    pub fn shows(&self) -> String {
        let address = format!("localhost:{}", self.port.number());
        let mut client = Command::new("openssl");
        client.args(["s_client", "-connect", &address]).stdin(Stdio::null());
        let said = String::from_utf8_lossy(&client.output().unwrap().stdout).into_owned();
        let begin = said.find("-----BEGIN CERT").unwrap_or_else(|| panic!("{said}"));
        said[begin..].to_owned()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `mosquitto_pub`: a retained message. `Err` is what it said.
    pub fn publish(&self, device: &Device, topic: &str, message: &str) -> Result<(), String> {
        let mut client = self.client("mosquitto_pub", device, topic);
        let output = client.args(["-r", "-q", "1", "-m", message]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        // A publication that is not allowed is told, but does not fail.
        let good = output.status.success() && !said.contains("ot authorized");
        if good { Ok(()) } else { Err(said + &String::from_utf8_lossy(&output.stdout)) }
    }

    /// `mosquitto_sub`: the one message that waits there. `Err` is what it said.
    pub fn receive(&self, device: &Device, topic: &str) -> Result<String, String> {
        let mut client = self.client("mosquitto_sub", device, topic);
        let output = client.args(["-C", "1", "-W", "3"]).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() && !output.stdout.is_empty() {
            Ok(text(&output.stdout))
        } else {
            Err(text(&output.stderr))
        }
    }

    /// A subscriber that stays connected.
    pub fn subscribe(&self, device: &Device, topic: &str) -> Child {
        let mut client = self.client("mosquitto_sub", device, topic);
        client.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
    }

    fn client(&self, program: &str, device: &Device, topic: &str) -> Command {
        let mut command = Command::new(program);
        command.args([
            "-V",
            "mqttv5",
            "-h",
            "localhost",
            "-p",
            &self.port.number().to_string(),
            "-t",
            topic,
        ]);
        command.arg("--cafile").arg(device.file("ca.crt"));
        let who = device.identity();
        command.arg("--cert").arg(who.certificate).arg("--key").arg(who.key);
        command.stdin(Stdio::null());
        command
    }

    /// Waits until the device is refused.
    #[track_caller]
    pub fn refuses_soon(&self, device: &Device) {
        let topic = format!("devices/{}/state", device.name);
        let refused = wait::until(Duration::from_secs(10), || {
            self.publish(device, &topic, "x").is_err().then_some(())
        });
        assert!(refused.is_some(), "{} still gets in: {}", device.name, self.log());
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
