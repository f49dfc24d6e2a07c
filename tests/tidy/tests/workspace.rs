//! The rules, applied to this repository.

use spline_tidy::graph::{Graph, root};
use spline_tidy::{layers, licences, source};

fn none(complaints: Vec<String>) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

#[test]
fn crates_depend_downwards_only() {
    none(layers::check(&Graph::read(&root()).expect("cargo metadata")));
}

#[test]
fn licences_are_allowed() {
    none(licences::check(&Graph::read(&root()).expect("cargo metadata")));
}

#[test]
fn source_files_keep_the_rules() {
    let root = root();
    let files = source::rust_files(&root).expect("reads");
    assert!(files.len() > 50, "found too few files: {}", files.len());
    let judge = |file: &std::path::PathBuf| {
        let text = std::fs::read_to_string(root.join(file)).expect("reads");
        source::check(&file.to_string_lossy(), &text)
    };
    none(files.iter().flat_map(judge).collect());
}
