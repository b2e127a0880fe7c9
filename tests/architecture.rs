//! The layers, held as data: imports go down only, and the pure layers stay pure.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::beside_others;

/// Layer of each top-level module; within L3 to L5 the order here is the order of imports.
const LAYERS: &[(&str, u8)] = &[
    ("model", 0),
    ("wire", 0),
    ("balancer", 1),
    ("breaker", 1),
    ("catalogue", 1),
    ("health", 1),
    ("membership", 1),
    ("mesh", 2),
    ("runtime", 3),
    ("telemetry", 3),
    ("tls", 3),
    ("transport", 4),
    ("proxy", 5),
    ("api", 6),
    ("config", 6),
    ("agent", 7),
    ("cli", 8),
];

/// What the pure layers (L0 to L2) never name: they return what is to be done and others do it.
const IMPURE: &[&str] = &[
    "tokio",
    "quinn",
    "rustls",
    "hyper",
    "tracing",
    "parking_lot",
    "arc_swap",
    "std::thread",
    "std::sync::Mutex",
    "std::sync::RwLock",
    "std::time::Instant",
    "std::time::SystemTime",
    "std::net::TcpStream",
    "std::net::TcpListener",
    "std::net::UdpSocket",
    "std::fs",
    "async fn",
    ".await",
];

/// The codec behind `wire` is named nowhere else, so that replacing it is a change of one file.
const CODEC: &str = "bincode::";

fn rank(module: &str) -> Option<(u8, usize)> {
    let index = LAYERS.iter().position(|(name, _)| *name == module)?;
    Some((LAYERS[index].1, index))
}

/// May `from` import `to`? Down always; sideways in L3 to L5 in the order written, in L0 freely.
fn may_import(from: &str, to: &str) -> bool {
    let (Some((above, later)), Some((below, earlier))) = (rank(from), rank(to)) else {
        return false;
    };
    from == to
        || above > below
        || (above == below && (above == 0 || (above >= 3 && later > earlier)))
}

fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Each line of product code with its place: no comments, nothing behind `#[cfg(test)] mod tests`.
fn product_lines(root: &Path) -> Vec<(String, usize, String, String)> {
    let mut lines = Vec::new();
    for path in sources(root) {
        let relative = path.strip_prefix(root).unwrap().to_owned();
        let first =
            relative.components().next().unwrap().as_os_str().to_string_lossy().into_owned();
        let module = first.trim_end_matches(".rs").to_owned();
        let text = fs::read_to_string(&path).unwrap();
        let tests_at = text
            .find("#[cfg(test)]\nmod tests")
            .or(text.find("#[cfg(test)]\npub(crate) mod tests"));
        for (number, line) in text[..tests_at.unwrap_or(text.len())].lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default().to_owned();
            lines.push((relative.display().to_string(), number + 1, module.clone(), code));
        }
    }
    lines
}

/// Whether `code` has `word`, and not only as the beginning of a longer one.
fn names(code: &str, word: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| !code[at + word.len()..].starts_with(is_word))
}

fn imports(code: &str) -> Vec<String> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices("crate::")
        .filter(|(at, _)| !code[..*at].ends_with(is_word))
        .map(|(at, found)| code[at + found.len()..].chars().take_while(|c| is_word(*c)).collect())
        .filter(|name: &String| name.chars().next().is_some_and(char::is_lowercase))
        .collect()
}

#[test]
fn imports_go_down_only() {
    let _turn = beside_others();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut faults = Vec::new();
    for (file, line, module, code) in product_lines(&root) {
        if matches!(module.as_str(), "lib" | "main") {
            continue;
        }
        if code.contains("use crate::{") {
            faults.push(format!("{file}:{line}: name one module in each `use crate::`"));
        }
        for to in imports(&code) {
            if !may_import(&module, &to) {
                faults.push(format!("{file}:{line}: {module} imports {to}"));
            }
        }
    }
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn pure_layers_name_no_clock_socket_thread_lock_or_async() {
    let _turn = beside_others();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut faults = Vec::new();
    for (file, line, module, code) in product_lines(&root) {
        let is_pure = rank(&module).is_some_and(|(layer, _)| layer <= 2);
        let found = IMPURE.iter().find(|word| is_pure && names(&code, word));
        if let Some(word) = found {
            faults.push(format!("{file}:{line}: {module} is pure and names `{word}`"));
        }
        if module != "wire" && code.contains(CODEC) {
            faults.push(format!("{file}:{line}: only wire may name the codec"));
        }
    }
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

/// Otherwise it runs beside those that measure time.
#[test]
fn every_test_of_this_binary_takes_a_turn_first() {
    let _turn = beside_others();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let (mut faults, mut count) = (Vec::new(), 0);
    for path in sources(&root) {
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            if !line.starts_with("#[test]") && !line.starts_with("#[tokio::test") {
                continue;
            }
            count += 1;
            let body = lines[at..].iter().position(|line| line.ends_with('{')).unwrap();
            let first = lines[at + body + 1].trim();
            let turns = ["alone", "calmly", "beside_others"];
            if !turns.iter().any(|turn| first == format!("let _turn = {turn}();")) {
                faults.push(format!("{}:{}: {first}", path.display(), at + body + 2));
            }
        }
    }
    assert!(count > 80, "only {count} tests were found");
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn every_module_has_a_layer_and_every_layer_its_module() {
    let _turn = beside_others();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found: Vec<String> = fs::read_dir(&root)
        .unwrap()
        .map(|entry| {
            entry.unwrap().file_name().to_string_lossy().trim_end_matches(".rs").to_owned()
        })
        .filter(|name| !matches!(name.as_str(), "lib" | "main"))
        .collect();
    found.sort();
    let mut listed: Vec<String> = LAYERS.iter().map(|(name, _)| (*name).to_owned()).collect();
    listed.sort();
    assert_eq!(found, listed);
}
