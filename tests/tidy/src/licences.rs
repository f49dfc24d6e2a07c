//! Which licences come in: every package says one, and its expression (SPDX 2.3, annex D) can be met from a short list.

use crate::graph::Graph;

/// Licences that ask for no more than notices.
const ALLOWED: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];
/// Exceptions that only add permissions.
const EXCEPTIONS: &[&str] = &["LLVM-exception"];
/// What this repository's packages say.
const OWN: &str = "Apache-2.0";

/// Complaints about packages whose licence is missing or not allowed.
pub fn check(graph: &Graph) -> Vec<String> {
    let judge = |package: &crate::graph::Package| match &package.licence {
        None => Some(format!("{} says no licence", package.name)),
        Some(own) if package.is_member && own != OWN => {
            Some(format!("{} must say {OWN}: licence={own}", package.name))
        }
        Some(text) if !is_met(text) => {
            Some(format!("{} has a licence that is not allowed: licence={text}", package.name))
        }
        Some(_) => None,
    };
    graph.0.values().filter_map(judge).collect()
}

/// Whether an expression can be met from the allowed licences. What does not parse can not.
fn is_met(expression: &str) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = words.as_slice();
    any_of(&mut rest) == Some(true) && rest.is_empty()
}

/// `a OR b`; binds weaker than `AND`.
fn any_of(rest: &mut &[&str]) -> Option<bool> {
    let mut met = all_of(rest)?;
    while take(rest, "OR") {
        met |= all_of(rest)?;
    }
    Some(met)
}

/// `a AND b`.
fn all_of(rest: &mut &[&str]) -> Option<bool> {
    let mut met = one(rest)?;
    while take(rest, "AND") {
        met &= one(rest)?;
    }
    Some(met)
}

/// A licence, with or without an exception, or an expression in brackets.
fn one(rest: &mut &[&str]) -> Option<bool> {
    if take(rest, "(") {
        let met = any_of(rest)?;
        return take(rest, ")").then_some(met);
    }
    let (licence, left) = rest.split_first()?;
    *rest = left;
    let mut met = ALLOWED.contains(licence);
    if take(rest, "WITH") {
        let (exception, left) = rest.split_first()?;
        *rest = left;
        met &= EXCEPTIONS.contains(exception);
    }
    Some(met)
}

fn take(rest: &mut &[&str], word: &str) -> bool {
    match rest.split_first() {
        Some((first, left)) if *first == word => {
            *rest = left;
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Package;

    #[test]
    fn expressions_are_judged() {
        for good in [
            "MIT",
            "MIT OR GPL-3.0",
            "MIT/Apache-2.0",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
            "GPL-2.0 AND MIT OR ISC",
        ] {
            assert!(is_met(good), "{good}");
        }
        for bad in [
            "",
            "GPL-3.0",
            "MPL-2.0",
            "MIT AND GPL-3.0",
            "(MIT",
            "MIT OR",
            "MIT Apache-2.0",
            "Apache-2.0 WITH Other-exception",
            "(MIT OR Apache-2.0) AND OpenSSL",
        ] {
            assert!(!is_met(bad), "{bad}");
        }
    }

    #[test]
    fn packages_without_a_good_licence_are_named() {
        let package = |name: &str, licence: Option<&str>, is_member| Package {
            name: name.into(),
            licence: licence.map(str::to_owned),
            is_member,
            ..Package::default()
        };
        let mut graph = Graph::default();
        for (at, package) in [
            package("good", Some("MIT"), false),
            package("silent", None, false),
            package("copyleft", Some("AGPL-3.0"), false),
            package("ours", Some("MIT"), true),
        ]
        .into_iter()
        .enumerate()
        {
            graph.0.insert(at.to_string(), package);
        }
        let complaints = check(&graph);
        assert_eq!(complaints.len(), 3, "{complaints:?}");
        assert!(!complaints.iter().any(|complaint| complaint.starts_with("good")));
    }
}
