//! Checks which modules import each other.
//!
//! The rules of `breaker-agent` are data: the block marked `imports` in docs/ARCHITECTURE.md, one line per module,
//! `module -> modules that it may import`. In addition, in every crate, modules that lie side by side must not import
//! each other in a cycle.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use syn::visit::{self, Visit};

/// Crates whose modules are checked for cycles.
const CRATES: [&str; 6] =
    ["breaker-common", "breaker-core", "breaker-api", "breaker-cli", "breaker-agent", "breaker-ebpf"];
/// The crate that has rules, and the document with them.
const RULED: (&str, &str) = ("breaker-agent", "docs/ARCHITECTURE.md");

/// Path of a module below the crate, such as `["datapath", "maps"]`; empty for the crate itself.
type Module = Vec<String>;
/// For each name, the names that it has an edge to.
type Graph = BTreeMap<String, BTreeSet<String>>;

/// Checks the crates.
///
/// # Errors
/// An import is not allowed or belongs to a cycle; the message lists all of them. Or a file cannot be parsed.
pub fn check() -> Result<()> {
    let workspace = ebpf_builder::workspace();
    let mut faults = Vec::new();
    for name in CRATES {
        let imports = Imports::read(&workspace.join(name).join("src")).with_context(|| format!("read {name}"))?;
        faults.extend(imports.cycles().into_iter().map(|cycle| format!("{name}: a cycle of imports: {cycle}")));
        if name == RULED.0 {
            let text = fs::read_to_string(workspace.join(RULED.1)).with_context(|| format!("read {}", RULED.1))?;
            let rules = rules(&text).with_context(|| format!("the rules in {}", RULED.1))?;
            faults.extend(imports.violations(&rules).into_iter().map(|fault| format!("{name}: {fault}")));
        }
    }
    ensure!(faults.is_empty(), "imports that are not allowed (rules: {}):\n  {}", RULED.1, faults.join("\n  "));
    Ok(())
}

/// Parses the block of rules.
fn rules(document: &str) -> Result<Graph> {
    let (_, rest) = document.split_once("```imports\n").context("there is no block marked ```imports")?;
    let (block, _) = rest.split_once("```").context("the block does not end")?;
    let lines = block.lines().filter(|line| !line.trim().is_empty());
    lines
        .map(|line| {
            let (module, allowed) = line.split_once("->").with_context(|| format!("no `->` in {line:?}"))?;
            let allowed = allowed.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty());
            Ok((module.trim().to_owned(), allowed.collect()))
        })
        .collect()
}

/// The imports of a crate.
#[derive(Default)]
struct Imports {
    modules: BTreeSet<Module>,
    /// Importing and imported module of each import.
    edges: BTreeSet<(Module, Module)>,
}

impl Imports {
    fn read(src: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        collect(src, &mut Vec::new(), &mut files)?;
        Ok(Self::new(&files))
    }

    fn new(files: &BTreeMap<Module, syn::File>) -> Self {
        let mut imports = Self { modules: files.keys().cloned().collect(), ..Self::default() };
        for (module, file) in files {
            let mut finder = Finder { module, paths: Vec::new() };
            finder.visit_file(file);
            for path in finder.paths {
                imports.edges.insert((module.clone(), imports.module_of(&path)));
            }
        }
        imports
    }

    /// The module that a path names: its longest prefix that is a module.
    fn module_of(&self, path: &[String]) -> Module {
        let lengths = (0..=path.len()).rev();
        lengths.map(|length| path[..length].to_vec()).find(|part| self.modules.contains(part)).unwrap_or_default()
    }

    /// The imports between modules that lie in the same module, by the name of that module.
    fn siblings(&self) -> BTreeMap<Module, Graph> {
        let mut graphs: BTreeMap<Module, Graph> = BTreeMap::new();
        for (from, to) in &self.edges {
            let common = from.iter().zip(to).take_while(|(a, b)| a == b).count();
            if let (Some(a), Some(b)) = (from.get(common), to.get(common)) {
                graphs.entry(from[..common].to_vec()).or_default().entry(a.clone()).or_default().insert(b.clone());
            }
        }
        graphs
    }

    fn cycles(&self) -> Vec<String> {
        let graphs = self.siblings().into_iter();
        graphs
            .filter_map(|(parent, graph)| {
                let cycle = cycle(&graph)?;
                let parent = parent.iter().map(|name| format!("{name}::")).collect::<String>();
                Some(cycle.iter().map(|name| format!("{parent}{name}")).collect::<Vec<_>>().join(" -> "))
            })
            .collect()
    }

    /// Returns the imports between top-level modules that the rules do not allow, and the faults of the rules.
    fn violations(&self, rules: &Graph) -> Vec<String> {
        let mut faults = Vec::new();
        let tops: BTreeSet<&String> = self.modules.iter().filter_map(|module| module.first()).collect();
        for name in rules.iter().flat_map(|(from, to)| to.iter().chain([from])) {
            if !tops.contains(name) {
                faults.push(format!("the rules name {name}, which is no module"));
            }
        }
        faults.extend(tops.iter().filter(|top| !rules.contains_key(**top)).map(|top| format!("no rule for {top}")));
        for (from, to) in self.siblings().remove(&Vec::new()).unwrap_or_default() {
            let allowed = rules.get(&from).cloned().unwrap_or_default();
            faults.extend(to.difference(&allowed).map(|to| format!("{from} imports {to}")));
        }
        if let Some(cycle) = cycle(rules) {
            faults.push(format!("the rules allow a cycle: {}", cycle.join(" -> ")));
        }
        faults
    }
}

/// Parses the files of a directory and of the directories in it. Files with tests are left out.
fn collect(dir: &Path, module: &mut Module, files: &mut BTreeMap<Module, syn::File>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let path = entry?.path();
        let Some(name) = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()) else { continue };
        if name == "tests" || name.ends_with("_tests") {
            continue;
        }
        let inner = !["mod", "lib", "main"].contains(&name.as_str());
        if inner {
            module.push(name);
        }
        if path.is_dir() {
            collect(&path, module, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            let file = syn::parse_file(&text).with_context(|| format!("parse {}", path.display()))?;
            // A crate may have a library and a binary; both are the module without a name.
            files.entry(module.clone()).and_modify(|old| old.items.extend(file.items.clone())).or_insert(file);
        }
        if inner {
            module.pop();
        }
    }
    Ok(())
}

/// Finds the paths that begin with `crate` or `super`, as absolute paths below the crate. Tests are left out.
struct Finder<'a> {
    module: &'a Module,
    paths: Vec<Vec<String>>,
}

impl Finder<'_> {
    fn add(&mut self, path: &[String]) {
        let supers = path.iter().take_while(|part| *part == "super").count();
        let base = match path.first().map(String::as_str) {
            Some("crate") => Vec::new(),
            Some("super") if supers <= self.module.len() => self.module[..self.module.len() - supers].to_vec(),
            _ => return,
        };
        let rest = &path[supers.max(1)..];
        self.paths.push([&base, rest].concat());
    }

    fn add_tree(&mut self, tree: &syn::UseTree, path: &mut Vec<String>) {
        let end = |name: &syn::Ident| Some(name.to_string());
        let name = match tree {
            syn::UseTree::Path(inner) => {
                path.push(inner.ident.to_string());
                self.add_tree(&inner.tree, path);
                path.pop();
                return;
            }
            syn::UseTree::Group(group) => return group.items.iter().for_each(|item| self.add_tree(item, path)),
            syn::UseTree::Name(inner) => end(&inner.ident),
            syn::UseTree::Rename(inner) => end(&inner.ident),
            syn::UseTree::Glob(_) => None,
        };
        let whole: Vec<String> = path.iter().cloned().chain(name.filter(|name| name != "self")).collect();
        self.add(&whole);
    }
}

impl<'ast> Visit<'ast> for Finder<'_> {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.add_tree(&item.tree, &mut Vec::new());
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let parts: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.add(&parts);
        visit::visit_path(self, path);
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        let is_test = |attribute: &syn::Attribute| {
            attribute.path().is_ident("cfg")
                && attribute.parse_args::<syn::Path>().is_ok_and(|condition| condition.is_ident("test"))
        };
        if !item.attrs.iter().any(is_test) {
            visit::visit_item_mod(self, item);
        }
    }
}

/// A cycle of the graph, with its first name repeated at the end.
fn cycle(graph: &Graph) -> Option<Vec<String>> {
    fn follow<'a>(graph: &'a Graph, name: &'a str, path: &mut Vec<&'a str>, done: &mut BTreeSet<&'a str>) -> bool {
        if let Some(start) = path.iter().position(|other| *other == name) {
            path.drain(..start);
            path.push(name);
            return true;
        }
        if done.contains(name) {
            return false;
        }
        path.push(name);
        for next in graph.get(name).into_iter().flatten() {
            if follow(graph, next, path, done) {
                return true;
            }
        }
        path.pop();
        done.insert(name);
        false
    }
    let mut done = BTreeSet::new();
    graph.keys().find_map(|name| {
        let mut path = Vec::new();
        follow(graph, name, &mut path, &mut done).then(|| path.into_iter().map(str::to_owned).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn imports(files: &[(&str, &str)]) -> Imports {
        let module = |name: &str| name.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect();
        Imports::new(&files.iter().map(|(name, text)| (module(name), syn::parse_file(text).unwrap())).collect())
    }

    #[test]
    fn imports_are_found_in_use_lines_and_in_paths_but_not_in_tests() {
        let found = imports(&[
            ("", "mod a; mod b; mod c; mod d;"),
            ("a", "use crate::{b::{self, X}, d}; #[cfg(test)] mod tests { use crate::e::Y; }"),
            ("b", "fn f() -> crate::c::Z { super::d::g() }"),
            ("c", "use std::fmt; // use crate::a;"),
            ("d", ""),
            ("e", ""),
        ]);
        let graph = &found.siblings()[&Vec::new()];
        let to = |name: &str| graph.get(name).into_iter().flatten().map(String::as_str).collect::<Vec<_>>();
        assert_eq!((to("a"), to("b"), to("c")), (vec!["b", "d"], vec!["c", "d"], vec![]));
        assert!(found.cycles().is_empty());
    }

    #[test]
    fn a_cycle_is_named_at_every_depth() {
        let found = imports(&[("p", "mod a; mod b;"), ("p::a", "use super::b::X;"), ("p::b", "use crate::p::a::Y;")]);
        assert_eq!(found.cycles(), ["p::a -> p::b -> p::a"]);
        // A module and those in it may use each other.
        let found = imports(&[("p", "mod a; use a::X; use crate::p::a::Z;"), ("p::a", "use super::Y;")]);
        assert!(found.cycles().is_empty());
    }

    #[test]
    fn what_the_rules_do_not_allow_is_named() {
        let found = imports(&[("a", "use crate::b::X;"), ("b", "use crate::c::Y;"), ("c", "")]);
        let rules = |text: &str| rules(&format!("text\n```imports\n{text}\n```\n")).unwrap();
        assert!(found.violations(&rules("a -> b\nb -> c\nc ->")).is_empty());
        assert_eq!(found.violations(&rules("a -> b\nb ->\nc ->")), ["b imports c"]);
        assert_eq!(found.violations(&rules("a -> b\nb -> c")), ["no rule for c"]);
        assert_eq!(found.violations(&rules("a -> b\nb -> c, x\nc ->")), ["the rules name x, which is no module"]);
        let cyclic = found.violations(&rules("a -> b\nb -> c\nc -> a"));
        assert_eq!(cyclic, ["the rules allow a cycle: a -> b -> c -> a"]);
    }

    #[test]
    fn a_document_without_rules_is_an_error() {
        assert!(rules("# Architecture").is_err());
        assert!(rules("```imports\na b\n```").is_err());
    }
}
