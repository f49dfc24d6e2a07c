//! What may stand in a source file, and what files may be called.

use std::path::{Path, PathBuf};

/// Lines of the longest allowed file; 300 is the aim.
pub const LINES_MAX: usize = 800;

/// Words that must not stand in code. Written in two parts, so that this file passes.
const BANNED: &[(&str, &str)] = &[
    (concat!("to", "do!("), "finish it or leave it out"),
    (concat!("unimple", "mented!("), "finish it or leave it out"),
    (concat!("db", "g!("), "use tracing"),
    (concat!("#[ign", "ore"), "a test that does not run is no test"),
    (concat!("FIX", "ME"), "mend it"),
    (concat!("TO", "DO"), "do it, or say in the report what is left out"),
    (concat!("X", "XX"), "say what is meant"),
    (concat!("mod ut", "ils"), "name what it is"),
    (concat!("mod com", "mon"), "name what it is"),
    (concat!("mod hel", "pers"), "name what it is"),
    (concat!("mod mi", "sc"), "name what it is"),
    (concat!("allow(dead", "_code)"), "delete what nobody calls"),
];

/// Where generated types of the control plane may be named, as parts of paths.
const GENERATED_TYPES: &[&str] = &[
    "proto/rpc/",
    "/service.rs",
    "/service/",
    "cluster/client/src/transport",
    "cluster/chunkserver/src/heartbeat/transport.rs",
    // Tests that play the other side of the control plane.
    "cluster/chunkserver/tests/",
    "cluster/mds/tests/",
    "cli/src/gateway/admin.rs",
    "cli/src/mds.rs",
    "tests/tidy/",
];
const GENERATED: &[&str] = &["spline_rpc::mds", "spline_rpc::gateway", "spline_rpc::{"];

/// What the chunk store must not name: the disk knows neither consensus nor network.
const NOT_IN_STORE: &[&str] =
    &["spline_raft", "spline_wire", "spline_rpc", "openraft", "tonic", "std::net", "tokio::net"];
const STORE: &str = "cluster/chunkserver/src/store";

/// Complaints about one file; `path` is relative to the repository.
pub fn check(path: &str, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut complain = |what: String| complaints.push(format!("{path}: {what}"));
    let name = path.rsplit('/').next().unwrap_or(path);
    let lines = text.lines().count();
    if lines > LINES_MAX {
        complain(format!("too long, split it: lines={lines} limit={LINES_MAX}"));
    }
    if name == "mod.rs" {
        complain("a module is foo.rs and foo/part.rs".into());
    }
    // A module of tests is told by its name; every other file says what it is.
    if name != "tests.rs" && !text.starts_with("//! ") {
        complain("no module documentation in the first line".into());
    }
    for (word, instead) in BANNED {
        if let Some(at) = text.lines().position(|line| line.contains(word)) {
            complain(format!("line {}: {word} is banned: {instead}", at + 1));
        }
    }
    if !GENERATED_TYPES.iter().any(|place| path.contains(place)) {
        for word in GENERATED.iter().filter(|word| text.contains(**word)) {
            complain(format!("names generated types, which stop at service.rs and transport: {word}"));
        }
    }
    if path.starts_with(STORE) {
        for word in NOT_IN_STORE.iter().filter(|word| text.contains(**word)) {
            complain(format!("the disk knows neither consensus nor network: {word}"));
        }
    }
    complaints
}

/// All Rust files below `root`, relative to it. Build output and hidden directories are left out.
///
/// # Errors
/// If a directory can not be read.
pub fn rust_files(root: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut left = vec![root.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(dir)? {
            let (path, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
            let name = name.to_string_lossy();
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                left.push(path);
            } else if name.ends_with(".rs") {
                files.push(path.strip_prefix(root).unwrap_or(&path).to_owned());
            }
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_good_file_is_good() {
        assert_eq!(check("wire/src/frame.rs", "//! Frames.\n\nfn f() {}\n"), Vec::<String>::new());
        assert_eq!(check("wire/src/frame/tests.rs", "use super::*;\n"), Vec::<String>::new());
        assert_eq!(
            check("cluster/mds/src/service.rs", "//! S.\nuse spline_rpc::mds as pb;\n"),
            Vec::<String>::new()
        );
    }

    #[test]
    fn each_rule_is_enforced() {
        let long = format!("//! Long.\n{}", "\n".repeat(LINES_MAX));
        for (path, text) in [
            ("a/src/long.rs", long.as_str()),
            ("a/src/b/mod.rs", "//! M.\n"),
            ("a/src/b.rs", "fn f() {}\n"),
            ("a/src/b.rs", "//! B.\nuse spline_rpc::mds as pb;\n"),
            ("cluster/chunkserver/src/store/pool.rs", "//! P.\nuse spline_raft::Group;\n"),
        ] {
            assert_eq!(check(path, text).len(), 1, "{path}");
        }
        for (word, _) in BANNED {
            assert_eq!(check("a/src/b.rs", &format!("//! B.\n{word}\n")).len(), 1, "{word}");
        }
    }

    #[test]
    fn files_are_found() {
        let files = rust_files(&crate::graph::root()).expect("reads");
        assert!(files.iter().any(|file| file.ends_with("tests/tidy/src/source.rs")), "{files:?}");
        assert!(!files.iter().any(|file| file.starts_with("target")));
    }
}
