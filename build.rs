//! Writes the build date into the program: a clock that shows an earlier time is not set. And puts the
//! page together: its style and its script go into its HTML.

use std::env;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-env-changed=SOURCE_DATE_EPOCH");
    println!("cargo:rerun-if-changed=src");
    println!("cargo:rerun-if-changed=Cargo.lock");
    let date: u64 = match env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text.parse().map_err(|e| format!("SOURCE_DATE_EPOCH={text:?}: {e}"))?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
    };
    println!("cargo:rustc-env=BUILD_DATE={date}");
    let part = |name: &str| {
        let text = fs::read_to_string(Path::new("src/api/page").join(name));
        text.map_err(|e| format!("src/api/page/{name}: {e}"))
    };
    let page = part("page.html")?
        .replace("{{style}}", &part("page.css")?)
        .replace("{{script}}", &part("page.js")?);
    fs::write(Path::new(&env::var("OUT_DIR")?).join("page.html"), page)?;
    Ok(())
}
