//! Which crate may be built with which: the never-edges and the levels of the architecture page.

use crate::graph::Graph;

/// What a crate must never be built with, however far. A trailing `*` stands for any ending.
const NEVER: &[(&str, &[&str], &str)] = &[
    (
        "spline-nebd",
        &[
            "tokio*",
            "tonic*",
            "spline-rpc",
            "spline-wire",
            "spline-client",
            "spline-raft",
            "spline-chunkserver",
            "spline-mds",
            "spline-gateway",
            "openraft*",
        ],
        "the guest's process must not change when the cluster does",
    ),
    ("spline-link", &["tokio*", "tonic*", "spline-rpc", "spline-wire"], "nebd is built with it"),
    ("spline-process", &["tokio*", "tonic*"], "nebd is built with it"),
    (
        "spline-gateway",
        &["vhost*", "virtio-*", "nbd", "spline-nebd"],
        "the gateway does not know who is in front of it",
    ),
    (
        "spline-gateway",
        &["spline-raft", "spline-chunkserver", "spline-mds", "openraft*"],
        "clients know contracts, not servers",
    ),
    (
        "spline-client",
        &["spline-raft", "spline-chunkserver", "spline-mds", "openraft*"],
        "clients know contracts, not servers",
    ),
    ("spline-chunkserver", &["spline-mds", "spline-gateway", "spline-nebd"], "they talk by rpc"),
    ("spline-mds", &["spline-chunkserver", "spline-gateway", "spline-nebd"], "they talk by rpc"),
];

/// The one crate that names openraft in its manifest.
const OPENRAFT_USER: &str = "spline-raft";

/// Levels; an edge must point to a lower one. Crates under tests/ stand above all and are not listed.
const LEVELS: &[(&str, u8)] = &[
    ("spline-types", 0),
    ("spline-link", 1),
    ("spline-wire", 1),
    ("spline-rpc", 1),
    ("spline-process", 1),
    ("spline-client", 2),
    ("spline-raft", 2),
    ("spline-nebd", 3),
    ("spline-gateway", 3),
    ("spline-chunkserver", 3),
    ("spline-mds", 3),
    ("spline", 3),
];

/// The one crate that may start its own level's libraries, in one process.
const STARTS_ITS_LEVEL: &str = "spline";

/// Complaints about edges that must not be.
pub fn check(graph: &Graph) -> Vec<String> {
    let mut complaints = never(graph);
    complaints.extend(openraft(graph));
    complaints.extend(levels(graph));
    if let Some(types) = graph.member("spline-types") {
        complaints.extend(
            graph
                .direct(types)
                .map(|found| format!("spline-types depends on {found}: the vocabulary depends on nothing")),
        );
    }
    complaints
}

fn never(graph: &Graph) -> Vec<String> {
    let mut complaints = Vec::new();
    for (name, forbidden, why) in NEVER {
        let Some(package) = graph.member(name) else {
            complaints.push(format!("no package {name}: the rules must follow the tree"));
            continue;
        };
        for found in graph.reachable(package) {
            if forbidden.iter().any(|pattern| matches(pattern, found)) {
                complaints.push(format!("{name} is built with {found}: {why}"));
            }
        }
    }
    complaints
}

fn openraft(graph: &Graph) -> Vec<String> {
    let members = graph.0.values().filter(|package| package.is_member && package.name != OPENRAFT_USER);
    members
        .filter(|package| graph.direct(package).any(|found| matches("openraft*", found)))
        .map(|package| {
            format!("{} depends on openraft: only {OPENRAFT_USER} may, its types spread", package.name)
        })
        .collect()
}

fn levels(graph: &Graph) -> Vec<String> {
    let level = |name: &str| LEVELS.iter().find(|(known, _)| *known == name).map(|(_, level)| *level);
    let mut complaints = Vec::new();
    for package in graph.0.values().filter(|package| package.is_member) {
        let Some(own) = level(&package.name) else { continue };
        for found in graph.direct(package) {
            if level(found)
                .is_some_and(|other| other > own || (other == own && package.name != STARTS_ITS_LEVEL))
            {
                complaints.push(format!("{} depends on {found}: edges point down", package.name));
            }
        }
    }
    complaints
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == pattern,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Package;

    /// A graph with all crates, and these edges.
    fn graph(edges: &[(&str, &str)]) -> Graph {
        let mut graph = Graph::default();
        let names = LEVELS.iter().map(|(name, _)| *name).chain(edges.iter().map(|(_, to)| *to));
        for name in names {
            let is_member = name.starts_with("spline");
            let package = Package { name: name.into(), is_member, ..Package::default() };
            graph.0.insert(name.into(), package);
        }
        for (from, to) in edges {
            graph.0.get_mut(*from).expect("known").dependencies.insert((*to).into());
        }
        graph
    }

    #[test]
    fn the_good_edges_are_good() {
        let good = [
            ("spline", "spline-mds"),
            ("spline-gateway", "spline-client"),
            ("spline-chunkserver", "spline-raft"),
            ("spline-raft", "openraft"),
            ("spline-client", "spline-wire"),
            ("spline-nebd", "spline-link"),
        ];
        assert_eq!(check(&graph(&good)), Vec::<String>::new());
    }

    #[test]
    fn each_bad_edge_is_found_alone() {
        for edge in [
            ("spline-nebd", "tokio"),
            ("spline-nebd", "spline-wire"),
            ("spline-link", "tokio-util"),
            ("spline-gateway", "virtio-queue"),
            ("spline-gateway", "nbd"),
            ("spline-gateway", "spline-raft"),
            ("spline-mds", "openraft"),
            ("spline-chunkserver", "spline-mds"),
            ("spline-mds", "spline-chunkserver"),
            ("spline-types", "serde"),
            ("spline-client", "spline-raft"),
            ("spline-wire", "spline-rpc"),
            ("spline-types", "spline-wire"),
        ] {
            assert!(!check(&graph(&[edge])).is_empty(), "{edge:?}");
        }
    }

    #[test]
    fn far_edges_are_found_too() {
        let complaints = check(&graph(&[("spline-nebd", "helper"), ("spline-nebd", "rustix")]));
        assert_eq!(complaints, Vec::<String>::new());
        let mut far = graph(&[("spline-nebd", "helper")]);
        far.0.insert("tokio".into(), Package { name: "tokio".into(), ..Package::default() });
        far.0.get_mut("helper").expect("known").dependencies.insert("tokio".into());
        assert_eq!(check(&far).len(), 1);
    }

    #[test]
    fn a_crate_that_is_gone_is_a_complaint() {
        let mut graph = graph(&[]);
        graph.0.remove("spline-nebd");
        assert!(check(&graph).iter().any(|complaint| complaint.contains("no package spline-nebd")));
    }
}
