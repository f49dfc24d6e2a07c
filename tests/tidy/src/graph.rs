//! `cargo metadata`, as far as the rules need it: packages and what they are built with.

use anyhow::{Context, ensure};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// One package of the graph.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its licence expression, if it says one.
    pub licence: Option<String>,
    /// It lies in this repository.
    pub is_member: bool,
    /// Ids of what it is built with: normal and build dependencies, not those of its tests.
    pub dependencies: BTreeSet<String>,
}

/// Packages by id.
#[derive(Clone, Debug, Default)]
pub struct Graph(pub BTreeMap<String, Package>);

impl Graph {
    /// Reads `cargo metadata` of the workspace at `root`.
    ///
    /// # Errors
    /// If cargo fails, or answers what is not understood.
    pub fn read(root: &Path) -> anyhow::Result<Self> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let output = Command::new(cargo)
            .args(["metadata", "--format-version=1", "--locked", "--manifest-path"])
            .arg(root.join("Cargo.toml"))
            .output()?;
        ensure!(
            output.status.success(),
            "cargo metadata failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Self::parse(&serde_json::from_slice(&output.stdout)?).context("cargo metadata is not understood")
    }

    /// Parses what `cargo metadata --format-version=1` prints.
    pub fn parse(metadata: &Value) -> Option<Self> {
        let members: BTreeSet<&str> =
            metadata["workspace_members"].as_array()?.iter().filter_map(Value::as_str).collect();
        let mut packages = BTreeMap::new();
        for package in metadata["packages"].as_array()? {
            let id = package["id"].as_str()?;
            let parsed = Package {
                name: package["name"].as_str()?.to_owned(),
                licence: package["license"].as_str().map(str::to_owned),
                is_member: members.contains(id),
                dependencies: BTreeSet::new(),
            };
            packages.insert(id.to_owned(), parsed);
        }
        for node in metadata["resolve"]["nodes"].as_array()? {
            let package = packages.get_mut(node["id"].as_str()?)?;
            for dependency in node["deps"].as_array()? {
                let kinds = dependency["dep_kinds"].as_array()?;
                if kinds.iter().any(|kind| kind["kind"] != "dev") {
                    package.dependencies.insert(dependency["pkg"].as_str()?.to_owned());
                }
            }
        }
        Some(Self(packages))
    }

    /// The member called `name`.
    pub fn member(&self, name: &str) -> Option<&Package> {
        self.0.values().find(|package| package.is_member && package.name == name)
    }

    /// Names of all that `package` is built with, directly.
    pub fn direct<'a>(&'a self, package: &'a Package) -> impl Iterator<Item = &'a str> {
        package.dependencies.iter().filter_map(|id| self.0.get(id)).map(|found| found.name.as_str())
    }

    /// Names of all that `package` is built with, however far.
    pub fn reachable<'a>(&'a self, package: &'a Package) -> BTreeSet<&'a str> {
        let mut seen = BTreeSet::new();
        let mut left: Vec<&str> = package.dependencies.iter().map(String::as_str).collect();
        while let Some(id) = left.pop() {
            if seen.insert(id)
                && let Some(found) = self.0.get(id)
            {
                left.extend(found.dependencies.iter().map(String::as_str));
            }
        }
        seen.into_iter().filter_map(|id| self.0.get(id)).map(|found| found.name.as_str()).collect()
    }
}

/// The workspace's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn dependencies_of_tests_do_not_count() {
        let dep = |pkg: &str, kind: Value| json!({"pkg": pkg, "dep_kinds": [{"kind": kind}]});
        let metadata = json!({
            "workspace_members": ["a"],
            "packages": [
                {"id": "a", "name": "a", "license": null}, {"id": "b", "name": "b", "license": "MIT"},
                {"id": "c", "name": "c", "license": "MIT"}, {"id": "d", "name": "d", "license": "MIT"},
            ],
            "resolve": {"nodes": [
                {"id": "a", "deps": [dep("b", Value::Null), dep("d", json!("dev"))]},
                {"id": "b", "deps": [dep("c", json!("build"))]},
                {"id": "c", "deps": []}, {"id": "d", "deps": []},
            ]},
        });
        let graph = Graph::parse(&metadata).expect("parses");
        let a = graph.member("a").expect("member");
        assert_eq!(graph.direct(a).collect::<Vec<_>>(), ["b"]);
        assert_eq!(graph.reachable(a).into_iter().collect::<Vec<_>>(), ["b", "c"]);
        assert!(graph.member("b").is_none());
        assert!(Graph::parse(&json!({})).is_none());
    }
}
