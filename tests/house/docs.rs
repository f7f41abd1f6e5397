//! What the documents quote of the program is what the program says.

use std::fs;
use std::path::{Path, PathBuf};

use crate::architecture::files;
use mqtt_publisher_lite::Code;
use mqtt_publisher_lite::api::endpoints;
use mqtt_publisher_lite::config::variables;

/// Variables of the older service that docs/upgrade.md explains.
const OLDER: &[&str] = &[
    "ALLOW_ONBOARDING_WITH_ACTIVE_CERT",
    "AUTH_SECRET",
    "CERT_CN_PREFIX",
    "CERT_VALIDITY_DAYS",
    "MQTT_TLS_CA_BASE",
    "MQTT_TLS_CA_KEY_BASE",
];

/// Variables that are not in the table, and words in capitals that are none.
const OTHERS: &[&str] = &[
    "CRL",
    "EST_OPENSSL_CACERT",
    "INET_DIAG_DESTROY",
    "NOPERM",
    "NOTIFY_SOCKET",
    "OOM",
    "READONLY",
    "REDIS_SERVICE_HOST",
    "RUNTIME_DIRECTORY",
    "WATCHDOG_USEC",
];

#[test]
fn every_log_line_of_the_failure_table_is_in_the_source() {
    let said = read_all(&root().join("src"), "rs") + &read("scripts/enroll.sh");
    let source = squeezed(&said);
    let mut lines = 0;
    for row in read("docs/failures.md").lines().filter(|line| line.starts_with("| ")) {
        for quoted in row.split('`').skip(1).step_by(2).filter(|q| is_log_line(q)) {
            lines += 1;
            for piece in quoted.split('…').map(str::trim).filter(|p| p.len() > 3) {
                assert!(source.contains(&squeezed(piece)), "{piece:?} of {quoted:?}");
            }
        }
    }
    assert!(lines > 25, "{lines}");
}

/// Whoever finds a warning in the log finds in the table what to do about it.
#[test]
fn every_warning_of_the_source_is_in_the_failure_table() {
    let page = squeezed(&read("docs/failures.md"));
    let source = squeezed(&read_all(&root().join("src"), "rs"));
    let mut warnings = 0;
    for call in ["log::warn!(", "log::error!("].iter().flat_map(|name| source.split(name).skip(1)) {
        let message = literals(call).into_iter().max_by_key(|literal| literal.len());
        let message = message.unwrap_or_default();
        let pieces = message.split(['{', '}']).step_by(2).map(str::trim);
        let pieces: Vec<&str> = pieces.filter(|piece| piece.len() > 8).collect();
        let begins = |piece: &&str| piece.chars().take(24).collect::<String>();
        let is_there = pieces.iter().any(|piece| page.contains(begins(piece).trim_end()));
        // Without a piece it passes on what another part of the program says.
        assert!(pieces.is_empty() || is_there, "no row has {message:?}");
        warnings += usize::from(is_there);
    }
    assert!(warnings > 40, "{warnings}");
}

/// The string literals up to the end of the call whose arguments `text` begins with.
fn literals(text: &str) -> Vec<&str> {
    let (mut found, mut rest, mut open) = (Vec::new(), text, 1);
    while let Some(at) = rest.find(['(', ')', '"']) {
        let (what, behind) = rest[at..].split_at(1);
        rest = behind;
        match what {
            "(" => open += 1,
            ")" if open == 1 => break,
            ")" => open -= 1,
            _ => {
                let end = behind.find('"').unwrap();
                found.push(&behind[..end]);
                rest = &behind[end + 1..];
            }
        }
    }
    found
}

/// Others are names: of variables, codes, paths and commands.
fn is_log_line(quoted: &str) -> bool {
    quoted.contains(' ') && quoted.len() > 12 && !quoted.starts_with("ulimit")
}

#[test]
fn every_name_in_the_documents_exists() {
    let mut names: Vec<String> = variables::ALL.iter().map(|v| v.name.to_owned()).collect();
    names.extend(names.clone().into_iter().map(|name| format!("{name}_FILE")));
    names.extend(Code::ALL.iter().map(|code| code.row().1.to_owned()));
    names.extend(OTHERS.iter().chain(OLDER).map(|other| (*other).to_owned()));
    for (document, text) in pages() {
        for quoted in text.split('`').skip(1).step_by(2) {
            for name in quoted.split(|c: char| !c.is_ascii_uppercase() && c != '_') {
                let whole = !name.starts_with('_') && !name.ends_with('_');
                let is_name = name.len() > 3 && name.contains('_') && whole;
                assert!(!is_name || names.iter().any(|n| n == name), "{document}: {name}");
            }
        }
    }
}

/// What a client can ask for and an owner can set stands in the page that says it knows all of them.
#[test]
fn every_endpoint_and_variable_has_its_lines() {
    let (api, est) = (read("docs/api.md"), read("docs/est.md"));
    for (method, path) in endpoints() {
        let is_there = match path.strip_prefix("/.well-known/est/") {
            Some(operation) => est.contains(operation),
            None => api.contains(path),
        };
        assert!(is_there, "no page has {method} {path}");
    }
    let configuration = read("docs/configuration.md");
    for variable in variables::ALL {
        let name = format!("`{}`", variable.name);
        assert!(configuration.contains(&name), "docs/configuration.md lacks {name}");
    }
}

/// A file that is moved takes with it what is said of it, in pages, comments and scripts.
#[test]
fn every_file_that_is_named_exists() {
    const FOLDERS: &[&str] =
        &["scripts/", ".ci/", "tests/", "tools/", "docs/", "contrib/", "src/", "examples/"];
    // Of the older service.
    const FOREIGN: &[&str] = &["src/certs"];
    let is_path = |c: char| c.is_ascii_alphanumeric() || "$_./-".contains(c);
    let mut named = 0;
    for file in files(&root(), &|_| true) {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        let words = text.split(|c| !is_path(c)).map(|word| word.trim_end_matches(['.', '-']));
        for path in words.filter(|word| FOLDERS.iter().any(|f| word.strip_prefix(f) > Some(""))) {
            let exists = root().join(path).exists() || FOREIGN.contains(&path);
            assert!(exists, "{} names {path}", file.display());
            named += 1;
        }
    }
    assert!(named > 100, "{named}");
}

/// The front page is read in one sitting; what is longer has a page of its own.
#[test]
fn the_front_page_stays_short() {
    assert!(read("README.md").len() <= 10_240);
}

/// Links between the pages lead to a page that is there, and to a heading in it.
#[test]
fn every_link_between_the_pages_leads_somewhere() {
    let mut links = 0;
    for (page, text) in pages() {
        let dir = if page == "README.md" { root() } else { root().join("docs") };
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { root().join(named(&page)) } else { dir.join(file) };
            assert!(target.exists(), "{page} links {link}");
            if !heading.is_empty() {
                let headings = fs::read_to_string(&target).unwrap();
                let mut headings = headings.lines().filter(|line| line.starts_with('#'));
                assert!(headings.any(|line| anchor(line) == heading), "{page} links {link}");
            }
            links += 1;
        }
    }
    assert!(links > 30, "{links}");
}

/// What a forge makes of a heading.
fn anchor(heading: &str) -> String {
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    let text = heading.trim_start_matches('#').trim();
    text.chars().filter(kept).collect::<String>().to_lowercase().replace(' ', "-")
}

/// Whoever watches by these watches something.
#[test]
fn every_metric_that_is_watched_exists() {
    let page = read("docs/metrics.md");
    for file in ["contrib/alerts.yml", "contrib/grafana.json"] {
        let text = read(file);
        let words = text.split(|c: char| !c.is_ascii_lowercase() && c != '_');
        let families: Vec<&str> = words.filter(|word| word.starts_with("mqtt_lite_")).collect();
        assert!(families.len() > 8, "{file}");
        for family in families {
            let family = family.trim_end_matches("_bucket");
            assert!(page.contains(&format!("`{family}")), "{file}: {family}");
        }
    }
}

/// Pages, and the first line of commands there that neither CI nor a test runs: (page, line, why).
const BY_HAND: &[(&str, &str, &str)] = &[
    ("operations.md", "scripts/build-static.sh", "minutes, and compilers that are fetched"),
    ("quickstart.md", "apt-get update", "it changes the machine; scripts/test.sh does the like"),
    ("quickstart.md", "apt-get install -y curl", "the same, before the way by hand"),
    ("quickstart.md", "tar -xzf", "CI has no release"),
    ("quickstart.md", "apt-get install -y git", "CI has the source, and compiles it in other ways"),
];

/// What stands behind "```sh" is read by `.ci/check-readme.sh`, which `.ci/run` calls for each page
/// but one, and by who is named there.
#[test]
fn every_block_of_commands_is_run_by_somebody() {
    let ci = read(".ci/run");
    let mut by_hand = 0;
    for (page, text) in pages() {
        let called = ci.lines().any(|l| l.trim().starts_with("for page in ") && l.contains(&page));
        let called =
            called || page == "mosquitto.md" && read("tests/service/mosquitto.rs").contains(&page);
        let mut lines = text.lines().map(str::trim);
        while let Some(line) = lines.next() {
            let Some(mark) = line.strip_prefix("```sh") else { continue };
            let words: Vec<&str> = mark.split_whitespace().collect();
            match words[..] {
                ["run"] | ["run", "keys"] | ["settings"] => assert!(called, "{page}: {line}"),
                ["run", "package"] => {
                    let script = read(".ci/check-deb.sh");
                    assert!(called && script.contains(&format!("blocks_of {}", named(&page))));
                }
                ["server", port] => {
                    assert!(called && port.parse::<u16>().is_ok(), "{page}: {line}")
                }
                ["by", "hand"] => {
                    let first = lines.next().unwrap_or_default();
                    let listed =
                        |row: &&(&str, &str, &str)| row.0 == page && first.starts_with(row.1);
                    assert!(BY_HAND.iter().any(|row| listed(&row)), "{page}: {first}");
                    by_hand += 1;
                }
                ["by", script] => {
                    assert!(
                        read(script).contains(&format!("blocks_of {}", named(&page))),
                        "{page}"
                    );
                }
                _ => panic!("{page}: nobody runs the commands below {line:?}"),
            }
        }
    }
    assert_eq!(by_hand, BY_HAND.len(), "blocks to be run by hand");
}

/// A reason is worth what shows it.
#[test]
fn every_test_and_row_that_the_design_names_exists() {
    let design = read("docs/design.md");
    let mut tests = 0;
    for quoted in design.split('`').skip(1).step_by(2) {
        let Some((file, name)) = quoted.split_once("::").filter(|(f, _)| f.contains('/')) else {
            continue;
        };
        tests += 1;
        assert!(read(file).contains(&format!("fn {name}()")), "{quoted}");
    }
    assert!(tests > 20, "{tests} tests");
    assert!(check_rows(&design) > 15);
    assert!(check_rows(&read_all(&root().join("src"), "rs")) > 8);
}

/// Each row of the models that a text names is there. Returns how many.
fn check_rows(text: &str) -> usize {
    let model = read("docs/model/README.md");
    let words = text.split_whitespace().filter(|word| *word != "///" && *word != "//!");
    let words: Vec<&str> = words.collect();
    let mut rows = 0;
    for pair in words.windows(2).filter(|pair| pair[0].trim_start_matches('(') == "row") {
        let row = pair[1].trim_end_matches([')', ',', '.', ':', ';']);
        let digits = row.strip_prefix('r').unwrap_or(row);
        if digits.starts_with(|c: char| c.is_ascii_digit()) {
            rows += 1;
            assert!(model.contains(&format!("\n| {row} | ")), "row {row}");
        }
    }
    rows
}

/// README.md and what is in docs/, each by the name of its file.
fn pages() -> Vec<(String, String)> {
    let mut names = vec!["README.md".to_owned()];
    for entry in fs::read_dir(root().join("docs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".md") {
            names.push(name);
        }
    }
    names.into_iter().map(|name| (name.clone(), read(&named(&name)))).collect()
}

/// Where a page is.
fn named(page: &str) -> String {
    if page == "README.md" { page.to_owned() } else { format!("docs/{page}") }
}

/// Without what a line break in a string literal adds, and with what stands in braces left out.
fn squeezed(text: &str) -> String {
    let joined = text.replace("\\\n", " ");
    joined.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn read_all(dir: &Path, extension: &str) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            text.push_str(&read_all(&path, extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            text.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
    text
}
