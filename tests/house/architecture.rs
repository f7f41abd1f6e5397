//! The house rules of the code, read from the code: who imports whom, who reads the time and the
//! environment, and what no file may lack or contain.
//!
//! The table of layers stands once, in the crate's documentation (`src/lib.rs`), and is read from
//! there. An exception stands here, with its reason; one that is no longer needed fails too.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Modules of one room that may know each other: (who, whom, why).
const NEIGHBOURS: &[(&str, &str, &str)] = &[
    ("store::memory", "store::ledger", "it asks the ledger before it grants a token"),
    ("store::failover", "store::ledger", "the ledger outlives the change of stores"),
    ("store::failover", "store::memory", "it writes this instance's tokens through to memory"),
    ("store::failover", "store::redis", "it stands before that store, for which memory stands in"),
    ("store::redis", "store::ledger", "a mark in Redis lives as long as an entry there"),
];

/// Libraries that only some files may name: (crate, where, why).
const LIBRARIES: &[(&str, &[&str], &str)] = &[
    ("tiny_http", &["src/server/lane.rs"], "the seam behind which the server can be changed"),
    ("httparse", &["src/edge"], "behind it requests are well formed"),
    (
        "rustix",
        &[
            "src/edge",
            "src/server/lane.rs",
            "src/ca/hook.rs",
            "src/clock.rs",
            "src/files.rs",
            "src/socket.rs",
            "src/stderr.rs",
        ],
        "sockets, open files, the end of a process group, the machine's clock, syncfs, the log's pipe",
    ),
    ("redis", &["src/store/redis"], "its protocol is spoken there"),
    ("socket2", &["src/socket.rs"], "connections that we open are all opened there"),
    ("x509_parser", &["src/ca"], "the rest handles certificates as bytes"),
    ("rcgen", &["src/ca"], "only the CA signs"),
    ("dlmalloc", &["src/main.rs"], "a program chooses its allocator, not a library"),
    ("env_logger", &["src/logging.rs"], "everyone else uses `log`"),
    ("env_filter", &["src/config/mod.rs"], "it checks RUST_LOG, once"),
    ("signal_hook", &["src/service.rs"], "only the process as a whole is signalled"),
];

/// Files other than `src/clock.rs` that read the monotonic clock.
const DEADLINES: &[(&str, &str)] = &[
    ("src/store/redis/mod.rs", "a batch has one deadline, which is counted on the socket's clock"),
    ("src/store/redis/line.rs", "so has a round trip on a line of its own"),
    ("src/socket.rs", "time-outs of sockets are what is left until it"),
    ("src/store/redis/pool.rs", "connecting has a deadline, of which each address gets its share"),
    (
        "src/store/failover/carry.rs",
        "the last round of a carry-over has a deadline of the same kind",
    ),
];

#[test]
fn every_import_is_allowed_by_the_table_in_lib_rs() {
    let table = Table::read();
    for source in sources() {
        let importer = source.room();
        let allowed = table.allowed(&importer);
        for path in source.paths().iter().filter_map(|path| path.strip_prefix("crate::")) {
            let room = path.split("::").next().unwrap_or_default();
            let fine = room == importer || allowed.contains(room);
            assert!(fine, "{} imports crate::{path}, which its layer may not", source.name);
        }
    }
}

#[test]
fn the_table_names_every_module_once() {
    let table = Table::read();
    let lib = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let declared = |line: &str| {
        let line = line.strip_prefix("pub ").unwrap_or(line);
        Some(line.strip_prefix("mod ")?.strip_suffix(';')?.to_owned())
    };
    let mut declared: BTreeSet<String> = lib.lines().filter_map(declared).collect();
    declared.insert("main".to_owned());
    let listed: BTreeSet<String> = table.rows.keys().cloned().collect();
    assert_eq!(declared, listed, "modules of src/lib.rs, and modules in its table");
    for source in sources().iter().filter(|source| source.name != "src/lib.rs") {
        assert!(listed.contains(&source.room()), "{} is in no layer", source.name);
    }
    let map = fs::read_to_string(root().join("CONTRIBUTING.md")).unwrap();
    let mapped: BTreeSet<&str> = quoted(&map).map(|name| name.trim_end_matches('/')).collect();
    for name in &listed {
        assert!(mapped.contains(&**name), "the map in CONTRIBUTING.md lacks {name}");
    }
}

#[test]
fn nobody_reaches_past_its_own_room_with_super() {
    for source in sources() {
        let paths = source.paths();
        let up = paths.iter().find(|path| path.starts_with("super::super"));
        assert_eq!(up, None, "{}: write it from crate:: on", source.name);
        let is_door = source.module().len() < 2;
        let up = paths_of(source.program()).into_iter().find(|path| path.starts_with("super::"));
        assert!(!is_door || up.is_none(), "{}: {up:?} leaves the room", source.name);
    }
}

#[test]
fn neighbours_know_each_other_only_where_it_is_listed() {
    let stores = ["failover", "ledger", "memory", "redis"].map(|name| format!("store::{name}"));
    let mut seen = BTreeSet::new();
    for source in sources().iter().filter(|source| source.room() == "store") {
        let own = source.module().iter().take(2).cloned().collect::<Vec<_>>().join("::");
        for path in paths_of(source.program()) {
            let target = stores.iter().find(|store| {
                path.strip_prefix("crate::").is_some_and(|path| is_within(path, store))
            });
            let Some(target) = target.filter(|target| **target != own && own != "store") else {
                continue;
            };
            let row = NEIGHBOURS.iter().find(|row| (row.0, row.1) == (&own, target));
            assert!(row.is_some(), "{} imports {path}", source.name);
            seen.insert(row);
        }
    }
    assert_eq!(seen.len(), NEIGHBOURS.len(), "a listed pair is not needed any more");
}

#[test]
fn concrete_stores_are_named_by_the_stores_and_by_the_service_only() {
    for source in sources() {
        for store in ["crate::store::memory", "crate::store::redis", "crate::store::failover"] {
            let backs_exchange = source.name == "src/share/redis.rs" && store.ends_with("::redis");
            let at_home =
                source.room() == "store" || source.name == "src/service.rs" || backs_exchange;
            let named = source.paths().iter().any(|path| is_within(path, store));
            assert!(at_home || !named, "{} names {store}", source.name);
        }
    }
}

/// With another back end one file comes, and the service names it.
#[test]
fn what_is_between_instances_is_known_to_its_back_end_and_to_the_service_only() {
    let back_end = "src/share/redis.rs";
    for source in sources().iter().filter(|source| source.name != back_end) {
        let named = source.paths().iter().any(|path| is_within(path, "crate::share::redis"));
        assert!(!named || source.name == "src/service.rs", "{} names {back_end}", source.name);
        if source.room() == "share" {
            let is_code = |line: &&str| !line.trim_start().starts_with("//");
            let line = source.text.lines().filter(is_code).find(|line| line.contains("Redis"));
            assert_eq!(line, None, "{}", source.name);
        }
    }
}

/// The order stands once, in the documentation of `src/edge/mod.rs`, and is read from there.
#[test]
fn the_rooms_of_the_edge_know_only_those_that_stand_before_them() {
    let face = fs::read_to_string(root().join("src/edge/mod.rs")).unwrap();
    let (_, order) = face.split_once("In reading order").unwrap();
    let order: String = order.lines().take_while(|line| !line.starts_with("mod ")).collect();
    let order: Vec<&str> = order.split("[`").skip(1).filter_map(|p| p.split('`').next()).collect();
    let place = |room: &str| order.iter().position(|name| *name == room);
    let rooms: BTreeSet<&str> =
        face.lines().filter_map(|l| l.split_once("mod ")?.1.strip_suffix(';')).collect();
    assert_eq!(order.iter().copied().collect::<BTreeSet<_>>(), rooms);
    for source in sources().iter().filter(|source| source.module().len() > 1) {
        let module = source.module();
        if module[0] != "edge" {
            continue;
        }
        let own = place(&module[1]).unwrap();
        for path in paths_of(source.program()) {
            let up = if module.len() == 2 { path.strip_prefix("super::") } else { None };
            let Some(path) = path.strip_prefix("crate::edge::").or(up) else { continue };
            let whom = path.split("::").next().unwrap_or_default();
            let before = place(whom).is_some_and(|place| place < own);
            assert!(before || whom == module[1], "{} imports {whom}", source.name);
        }
    }
}

/// Stores know what a row is, but not where the rows are kept.
#[test]
fn the_table_of_devices_is_named_above_its_layer_only() {
    for source in sources() {
        let above = !["store", "ca"].contains(&&*source.room());
        let named = source.paths().iter().any(|path| is_within(path, "crate::devices::table"));
        assert!(above || !named, "{} names the table of devices", source.name);
    }
}

#[test]
fn libraries_stay_in_their_rooms() {
    for source in sources().iter().filter(|source| !source.name.ends_with("/tests.rs")) {
        for path in paths_of(source.program()) {
            let name = path.split("::").next().unwrap_or_default();
            let row = LIBRARIES.iter().find(|(library, ..)| *library == name);
            let fine = |(_, files, _): &(_, &[&str], _)| {
                files.iter().any(|file| source.name.starts_with(file))
            };
            assert!(row.is_none_or(fine), "{} names {path}", source.name);
        }
    }
}

#[test]
fn only_main_reads_the_environment() {
    for source in sources().iter().filter(|source| source.name != "src/main.rs") {
        let named = paths_of(source.program()).into_iter().find(|p| is_within(p, "std::env"));
        assert_eq!(named, None, "{}", source.name);
    }
}

#[test]
fn only_the_clock_reads_the_time() {
    let mut used = BTreeSet::new();
    let sources = sources();
    for source in sources.iter().filter(|source| source.name != "src/clock.rs") {
        let paths = paths_of(source.program());
        assert!(!paths.iter().any(|p| p.contains("SystemTime")), "{}", source.name);
        if paths.iter().any(|p| p.ends_with("Instant::now")) {
            used.insert(source.name.as_str());
        }
    }
    let listed: BTreeSet<&str> = DEADLINES.iter().map(|(file, _)| *file).collect();
    assert_eq!(used, listed, "files that read the monotonic clock, and those that may");
}

#[test]
fn every_file_opens_with_what_it_is() {
    for file in rust_files(&root()) {
        let text = fs::read_to_string(&file).unwrap();
        let first = text.lines().next().unwrap_or_default();
        assert!(first.len() > 10 && first.starts_with("//! "), "{}: {first}", file.display());
    }
}

#[test]
fn no_file_names_a_folder_of_a_developer() {
    // In two pieces, since this file is read too.
    let folders = [["/ro", "ot/"], ["/wo", "rk/"], ["/ho", "me/"]].map(|pieces| pieces.concat());
    for file in files(&root(), &|_| true) {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        for (line, folder) in text.lines().flat_map(|l| folders.iter().map(move |f| (l, f))) {
            assert!(!line.contains(folder.as_str()), "{}: {line}", file.display());
        }
    }
}

/// The versions that `clippy::incompatible_msrv` and Cargo's resolver cannot vouch for: those of
/// what is in Cargo.lock already.
#[test]
fn no_dependency_needs_a_newer_rust_than_we_say() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", "--offline"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let version = |text: &str| -> [u32; 3] {
        let mut parts = text.split('.').map(|n| n.parse().unwrap());
        std::array::from_fn(|_| parts.next().unwrap_or(0))
    };
    let ours = version(env!("CARGO_PKG_RUST_VERSION"));
    assert!(packages.len() > 30 && ours[0] == 1, "{} packages, {ours:?}", packages.len());
    for package in packages {
        let needs = package["rust_version"].as_str().map(version).unwrap_or_default();
        assert!(needs <= ours, "{} {} needs {needs:?}", package["name"], package["version"]);
    }
}

/// The table of layers in `src/lib.rs`.
struct Table {
    /// The layer of each module, `main` among them, and what its row lets it import.
    rows: BTreeMap<String, (u32, String)>,
}

impl Table {
    fn read() -> Self {
        let lib = fs::read_to_string(root().join("src/lib.rs")).unwrap();
        let mut rows = BTreeMap::new();
        for line in lib.lines().filter_map(|line| line.strip_prefix("//! |")) {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let [layer, modules, rule, ..] = cells[..] else { continue };
            let Ok(layer) = layer.parse() else { continue };
            for module in quoted(modules) {
                let before = rows.insert(module.to_owned(), (layer, rule.to_owned()));
                assert_eq!(before, None, "{module} stands twice");
            }
        }
        assert!(rows.len() > 10, "the table in src/lib.rs cannot be read");
        Table { rows }
    }

    /// The modules that one in this room may import. What the table says of stores behind `;` and
    /// `but` has tests of its own.
    fn allowed(&self, room: &str) -> BTreeSet<&str> {
        // lib.rs shares the row of main.
        let (_, rule) = self.rows.get(room).or(self.rows.get("main")).unwrap();
        let rule = rule.split(';').next().unwrap().split(", but").next().unwrap();
        let named: Vec<u32> = rule
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|digits| digits.parse().ok())
            .collect();
        let within = |of: u32| match named[..] {
            _ if rule == "everything" => true,
            [from, to] if rule.contains(" to ") => (from..=to).contains(&of),
            _ => named.contains(&of),
        };
        let by_layer = self.rows.iter().filter(|(_, (of, _))| within(*of));
        by_layer.map(|(name, _)| name.as_str()).chain(quoted(rule)).collect()
    }
}

/// What stands between back quotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// A file under `src/`.
struct Source {
    /// From the root of the tree: `src/store/redis/mod.rs`.
    name: String,
    text: String,
}

impl Source {
    /// `store::redis::layout` as its parts; of lib.rs and main.rs their names.
    fn module(&self) -> Vec<String> {
        let path = self.name.trim_start_matches("src/").trim_end_matches(".rs");
        let path = path.strip_suffix("/mod").unwrap_or(path);
        path.split('/').map(str::to_owned).collect()
    }

    fn room(&self) -> String {
        self.module().swap_remove(0)
    }

    /// All but the tests at its end.
    fn program(&self) -> &str {
        let tests = self.text.match_indices("#[cfg(test)]\n").map(|(at, _)| at).find(|at| {
            let item = self.text[*at..].lines().find(|line| !line.starts_with("#["));
            item.is_some_and(|line| line.contains("mod ") && line.ends_with('{'))
        });
        tests.map_or(&self.text, |at| &self.text[..at])
    }

    fn paths(&self) -> Vec<String> {
        paths_of(&self.text)
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<Source> {
    let source = |file: PathBuf| {
        let name = file.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
        Source { name, text: fs::read_to_string(&file).unwrap() }
    };
    rust_files(&root().join("src")).into_iter().map(source).collect()
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    files(dir, &|file| file.extension().is_some_and(|e| e == "rs"))
}

/// The files of a folder and those below it; what is built, kept or Git's own is left out.
pub fn files(dir: &Path, wanted: &dyn Fn(&Path) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap_or_default().to_str().unwrap_or_default();
        match path.is_dir() {
            true if ["target", "data", ".git"].contains(&name) => {}
            true => found.extend(files(&path, wanted)),
            false if wanted(&path) && name != ".git" => found.push(path),
            false => {}
        }
    }
    found.sort();
    found
}

fn is_within(path: &str, module: &str) -> bool {
    path.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// Every path of two or more parts in a Rust text, those of `use` written out one by one.
fn paths_of(code: &str) -> Vec<String> {
    let code: String = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| [line, "\n"])
        .collect();
    let tokens = tokens(&code);
    let mut rest = tokens.as_slice();
    let mut paths = Vec::new();
    while let Some((token, after)) = rest.split_first() {
        rest = match *token {
            // `use<'a>` in a type says what is captured.
            "use" if after.first() != Some(&"<") => use_tree("", after, &mut paths),
            name if is_name(name) && after.first() == Some(&"::") => inline(rest, &mut paths),
            _ => after,
        };
    }
    paths
}

/// Names, `::` and single characters.
fn tokens(code: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = code.trim_start();
    while !rest.is_empty() {
        let name = rest.find(|c: char| !is_name_char(c)).unwrap_or(rest.len());
        let length = match name {
            0 if rest.starts_with("::") => 2,
            0 => rest.chars().next().map_or(1, char::len_utf8),
            name => name,
        };
        let (token, after) = rest.split_at(length);
        tokens.push(token);
        rest = after.trim_start();
    }
    tokens
}

fn is_name_char(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn is_name(token: &str) -> bool {
    token.starts_with(is_name_char)
}

fn inline<'a, 'b>(tokens: &'a [&'b str], paths: &mut Vec<String>) -> &'a [&'b str] {
    let mut path = String::new();
    let mut rest = tokens;
    while let [name, after @ ..] = rest
        && is_name(name)
    {
        path.push_str(name);
        rest = after;
        match rest {
            ["::", after @ ..] if after.first().is_some_and(|next| is_name(next)) => {
                path.push_str("::");
                rest = after;
            }
            _ => break,
        }
    }
    paths.push(path);
    rest
}

/// One tree of a `use`, with what stands before it; answers what follows it.
fn use_tree<'a, 'b>(before: &str, tokens: &'a [&'b str], out: &mut Vec<String>) -> &'a [&'b str] {
    let mut path = before.to_owned();
    let mut rest = tokens;
    while let Some((token, after)) = rest.split_first() {
        match *token {
            "{" => {
                rest = after;
                while !matches!(rest.first(), None | Some(&"}" | &";")) {
                    rest = use_tree(&path, rest, out);
                    rest = rest.strip_prefix(&[","]).unwrap_or(rest);
                }
                return rest.strip_prefix(&["}"]).unwrap_or(rest);
            }
            "," | "}" | ";" => break,
            "as" => rest = after.get(1..).unwrap_or_default(),
            "self" if !path.is_empty() => rest = after,
            token => {
                path.push_str(token);
                rest = after;
            }
        }
    }
    out.push(path.trim_end_matches("::").to_owned());
    rest
}

#[test]
fn paths_are_found_and_written_out() {
    let code = "use a::b::{self, c as d, e::{f, g}};\n// use no::comment;\nuse crate::x::*;\n\
        fn f() -> impl X + use<'_> { let t = std::time::Instant::now(); g::<u8>(h::i); }\n\
        let torn = \"use j::{k;\";";
    let expected = [
        "a::b",
        "a::b::c",
        "a::b::e::f",
        "a::b::e::g",
        "crate::x::*",
        "std::time::Instant::now",
        "g",
        "h::i",
        "j::k",
    ];
    assert_eq!(paths_of(code), expected);
}
