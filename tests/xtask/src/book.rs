//! Do the documents name files, tests and headings that exist?
//!
//! Three things are checked in every Markdown file of the project: relative links lead to a file and, after `#`, to a
//! heading of it; paths in backticks that start with one of the house's folders exist; and each stop of `docs/tour.md`
//! names a file, an invariant and a test that is really a test.
//!
//! A stop is a section `## 3. Its title` with three lines in it:
//!
//! ```text
//! - **File:** [`migration/core/src/ledger.rs`](../migration/core/src/ledger.rs)
//! - **Holds:** what must be true here, in one sentence.
//! - **Test:** `name_of_the_test`, in [`migration/core/tests/story.rs`](../migration/core/tests/story.rs)
//! ```
//!
//! The second link may be left out when the test is in the stop's own file.

use std::{
    collections::BTreeMap,
    fs,
    path::{Component, Path, PathBuf},
};

use crate::house::{House, Outcome};

/// The folders a path in backticks must start with to be taken for one.
const FAMILIES: &[&str] = &[
    "migration/",
    "transport/",
    "vmm/",
    "tests/",
    "resources/",
    "docs/",
    ".ci/",
];

/// What such a path must end in, for the same purpose.
const ENDINGS: &[&str] = &[".rs", ".md", ".toml", ".s", ".ld"];

const TOUR: &str = "docs/tour.md";

/// One stop of the tour.
#[derive(Debug, PartialEq, Eq)]
struct Stop {
    title: String,
    /// Relative to the root.
    files: Vec<String>,
    /// Each with the file it is in, when the stop says so.
    tests: Vec<(String, Option<String>)>,
    holds: bool,
}

/// Everything a reader would stumble over, one line each.
pub(crate) fn check(house: &House) -> Outcome<Vec<String>> {
    let mut documents = BTreeMap::new();
    for path in documents_of(house)? {
        let text = house.read(&path)?;
        documents.insert(path, text);
    }
    let exists = |path: &str| house.path(path).exists();
    let mut complaints = Vec::new();
    for (path, text) in &documents {
        complaints.extend(links(path, text, &documents, &exists));
        complaints.extend(paths(path, text, &exists));
    }
    match documents.get(TOUR) {
        Some(tour) => complaints.extend(stops(&tour_stops(tour), &|path| house.read(path))),
        None => complaints.push(format!("{TOUR} is missing")),
    }
    Ok(complaints)
}

/// Markdown at the root, and anywhere below `docs` and the families.
fn documents_of(house: &House) -> Outcome<Vec<String>> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let listing = fs::read_dir(house.root.join(&folder))
            .map_err(|error| format!("cannot list {}: {error}", folder.display()))?;
        for entry in listing {
            let entry = entry.map_err(|error| format!("cannot list {}: {error}", folder.display()))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = folder.join(&name);
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_folder && name != "target" && !name.starts_with('.') {
                folders.push(path);
            } else if !is_folder && name.ends_with(".md") {
                found.push(path.to_string_lossy().into_owned());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The lines of a document that are prose: outside of fenced blocks.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    text.lines().enumerate().filter(move |(_, line)| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fence && !fenced
    })
}

/// The targets of a line's links, `[text](target)`.
fn targets(line: &str) -> Vec<&str> {
    let mut rest = line;
    let mut found = Vec::new();
    while let Some((_, after)) = rest.split_once("](") {
        let Some((target, after)) = after.split_once(')') else {
            break;
        };
        found.push(target);
        rest = after;
    }
    found
}

/// What stands in backticks on a line.
fn quoted(line: &str) -> Vec<&str> {
    line.split('`').skip(1).step_by(2).collect()
}

/// A heading's anchor, as GitHub and most renderers form it.
fn slug(heading: &str) -> String {
    let kept = heading
        .trim()
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() })
        .collect()
}

fn has_heading(text: &str, anchor: &str) -> bool {
    prose(text).any(|(_, line)| line.starts_with('#') && slug(line.trim_start_matches('#')) == anchor)
}

/// Where a link in `document` leads, relative to the root.
fn resolve(document: &str, target: &str) -> String {
    let mut path = PathBuf::new();
    for part in Path::new(document)
        .parent()
        .unwrap_or_else(|| Path::new(""))
        .join(target)
        .components()
    {
        match part {
            Component::ParentDir if path.pop() => {}
            Component::CurDir => {}
            other => path.push(other),
        }
    }
    path.to_string_lossy().into_owned()
}

fn links(
    document: &str,
    text: &str,
    documents: &BTreeMap<String, String>,
    exists: &dyn Fn(&str) -> bool,
) -> Vec<String> {
    let mut complaints = Vec::new();
    for (n, line) in prose(text) {
        for target in targets(line) {
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let (file, anchor) = target
                .split_once('#')
                .map_or((target, None), |(file, anchor)| (file, Some(anchor)));
            let file = if file.is_empty() {
                document.to_owned()
            } else {
                resolve(document, file)
            };
            if !exists(&file) {
                complaints.push(format!("{document}:{}: the link `{target}` leads nowhere", n + 1));
            } else if let (Some(anchor), Some(other)) = (anchor, documents.get(&file))
                && !has_heading(other, anchor)
            {
                complaints.push(format!("{document}:{}: {file} has no heading `#{anchor}`", n + 1));
            }
        }
    }
    complaints
}

fn paths(document: &str, text: &str, exists: &dyn Fn(&str) -> bool) -> Vec<String> {
    let mut complaints = Vec::new();
    for (n, line) in prose(text) {
        for word in quoted(line) {
            let is_path = FAMILIES.iter().any(|family| word.starts_with(family))
                && ENDINGS.iter().any(|ending| word.ends_with(ending))
                && !word.contains(['*', ' ', '<', '{', '…']);
            if is_path && !exists(word) {
                complaints.push(format!("{document}:{}: there is no `{word}`", n + 1));
            }
        }
    }
    complaints
}

fn tour_stops(tour: &str) -> Vec<Stop> {
    let mut found: Vec<Stop> = Vec::new();
    for (_, line) in prose(tour) {
        if let Some(title) = line.strip_prefix("## ") {
            if title.starts_with(|c: char| c.is_ascii_digit()) {
                found.push(Stop {
                    title: title.to_owned(),
                    files: vec![],
                    tests: vec![],
                    holds: false,
                });
            }
            continue;
        }
        let Some(stop) = found.last_mut() else { continue };
        let linked = || targets(line).into_iter().map(|target| resolve(TOUR, target));
        if line.starts_with("- **File:**") {
            stop.files.extend(linked());
        } else if line.starts_with("- **Holds:**") {
            stop.holds = true;
        } else if line.starts_with("- **Test:**") {
            let place = linked().next();
            let names = quoted(line).into_iter().filter(|word| !word.contains(['/', '.']));
            stop.tests.extend(names.map(|name| (name.to_owned(), place.clone())));
        }
    }
    found
}

fn stops(stops: &[Stop], read: &dyn Fn(&str) -> Outcome<String>) -> Vec<String> {
    let mut complaints = Vec::new();
    if stops.is_empty() {
        complaints.push(format!("{TOUR} has no stops"));
    }
    for stop in stops {
        let title = &stop.title;
        if stop.files.is_empty() {
            complaints.push(format!("{TOUR}, {title}: names no file"));
        }
        if !stop.holds {
            complaints.push(format!("{TOUR}, {title}: says not what holds there"));
        }
        if stop.tests.is_empty() {
            complaints.push(format!("{TOUR}, {title}: names no test"));
        }
        for (test, place) in &stop.tests {
            let places = place.as_ref().map_or(stop.files.as_slice(), std::slice::from_ref);
            if !places
                .iter()
                .any(|path| read(path).is_ok_and(|source| has_test(&source, test)))
            {
                complaints.push(format!("{TOUR}, {title}: no test `{test}` in {}", places.join(" or ")));
            }
        }
    }
    complaints
}

/// Whether `source` has a function of this name with a test attribute right above it.
fn has_test(source: &str, name: &str) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let starts = [
        format!("fn {name}("),
        format!("async fn {name}("),
        format!("pub fn {name}("),
    ];
    let is_named = |line: &str| starts.iter().any(|start| line.starts_with(start.as_str()));
    lines
        .iter()
        .enumerate()
        .filter(|(_, line)| is_named(line))
        .any(|(n, _)| {
            let above = lines[..n]
                .iter()
                .rev()
                .take_while(|line| line.starts_with("#[") || line.starts_with("//"));
            above
                .into_iter()
                .any(|line| line.starts_with("#[test]") || line.contains("::test]") || line.contains("::test("))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints_about(document: &str, text: &str) -> Vec<String> {
        let documents = BTreeMap::from([
            (document.to_owned(), text.to_owned()),
            (
                "docs/wire.md".to_owned(),
                "# Wire\n\n## Page entries (kind, length)\n".to_owned(),
            ),
        ]);
        let exists = |path: &str| documents.contains_key(path) || path == "vmm/node/src/lib.rs";
        let mut complaints = links(document, text, &documents, &exists);
        complaints.extend(paths(document, text, &exists));
        complaints
    }

    #[test]
    fn the_documents_name_only_what_exists() {
        let complaints = check(&House::find().unwrap()).unwrap();
        assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    }

    #[test]
    fn a_link_leads_to_a_file_and_to_a_heading_of_it() {
        let good = "[a](wire.md) [b](wire.md#page-entries-kind-length) [c](../vmm/node/src/lib.rs) [d](https://x.org)";
        assert_eq!(complaints_about("docs/tour.md", good), Vec::<String>::new());
        assert_eq!(
            complaints_about("docs/tour.md", "\n[a](wires.md)"),
            ["docs/tour.md:2: the link `wires.md` leads nowhere"]
        );
        assert_eq!(
            complaints_about("README.md", "[a](docs/wire.md#pages)"),
            ["README.md:1: docs/wire.md has no heading `#pages`"]
        );
        assert_eq!(
            complaints_about("README.md", "[a](#here)"),
            ["README.md:1: README.md has no heading `#here`"]
        );
        assert_eq!(
            complaints_about("README.md", "# Here\n[a](#here)"),
            Vec::<String>::new()
        );
    }

    #[test]
    fn a_path_in_backticks_exists_unless_it_is_an_example() {
        assert_eq!(
            complaints_about("README.md", "see `vmm/node/src/lib.rs`"),
            Vec::<String>::new()
        );
        assert_eq!(
            complaints_about("README.md", "see `vmm/node/src/gone.rs`"),
            ["README.md:1: there is no `vmm/node/src/gone.rs`"]
        );
        assert_eq!(
            complaints_about("README.md", "```\n`vmm/node/src/gone.rs` [a](b)\n```\n"),
            Vec::<String>::new()
        );
    }

    const TOUR_TEXT: &str = "# Tour\n\n## 1. It starts\n\nWords.\n\n\
        - **File:** [`vmm/node/src/lib.rs`](../vmm/node/src/lib.rs)\n- **Holds:** all.\n- **Test:** `it_starts`\n\n\
        ## 2. It ends\n\n- **File:** [`a.rs`](a.rs)\n- **Holds:** nothing.\n\
        - **Test:** `it_ends`, in [`b.rs`](b.rs)\n\n## Further reading\n\n";

    #[test]
    fn a_stop_names_a_file_an_invariant_and_a_test_that_is_one() {
        let read = |path: &str| match path {
            "vmm/node/src/lib.rs" => Ok("    #[tokio::test]\n    async fn it_starts() {\n".to_owned()),
            "docs/b.rs" => Ok("#[test]\n// Slow.\nfn it_ends() {".to_owned()),
            _ => Err("none".to_owned()),
        };
        let found = tour_stops(TOUR_TEXT);
        assert_eq!(found.len(), 2);
        assert_eq!(stops(&found, &read), Vec::<String>::new());

        let renamed = TOUR_TEXT.replace("`it_starts`", "`it_begins`");
        assert_eq!(
            stops(&tour_stops(&renamed), &read),
            ["docs/tour.md, 1. It starts: no test `it_begins` in vmm/node/src/lib.rs"]
        );
        let silent = TOUR_TEXT.replace("- **Holds:** all.\n", "");
        assert_eq!(
            stops(&tour_stops(&silent), &read),
            ["docs/tour.md, 1. It starts: says not what holds there"]
        );
        assert_eq!(stops(&[], &read), ["docs/tour.md has no stops"]);
    }

    #[test]
    fn a_helper_is_not_a_test() {
        assert!(has_test("#[test]\nfn a_page_arrives() {", "a_page_arrives"));
        assert!(!has_test("fn a_page_arrives() {", "a_page_arrives"));
        assert!(!has_test(
            "#[test]\nfn other() {}\n\nfn a_page_arrives() {",
            "a_page_arrives"
        ));
        assert!(!has_test("#[test]\nfn a_page_arrives_late() {", "a_page_arrives"));
    }
}
