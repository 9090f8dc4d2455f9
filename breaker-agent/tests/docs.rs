//! docs/TROUBLESHOOTING.md has an entry for everything that breaker shows.

use std::collections::BTreeSet;

use breaker_common::PassReason;
use breaker_core::probe::CheckCode;

const TROUBLESHOOTING: &str = include_str!("../../docs/TROUBLESHOOTING.md");
const KUBERNETES: &str = include_str!("../../docs/KUBERNETES.md");

/// Headings of the third level, without their backquotes.
fn entries() -> BTreeSet<&'static str> {
    TROUBLESHOOTING.lines().filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`')).collect()
}

/// The words in backquotes that look like reasons: they begin with a capital letter.
fn reasons(cell: &'static str) -> impl Iterator<Item = &'static str> {
    cell.split('`').skip(1).step_by(2).filter(|word| word.starts_with(char::is_uppercase))
}

#[test]
fn every_reason_of_a_condition_has_an_entry() {
    let (_, conditions) = KUBERNETES.split_once("### Conditions").unwrap();
    let (conditions, _) = conditions.split_once("### Events").unwrap();
    let (first, second) = conditions.split_once("| reason | meaning |").unwrap();
    let of_conditions = first.lines().filter(|line| line.starts_with("| `")).flat_map(|row| {
        let cells: Vec<&str> = row.split('|').collect();
        [cells[2], cells[3]].into_iter().flat_map(reasons)
    });
    let explained = second.lines().filter_map(|row| row.split('|').nth(1)).flat_map(reasons);
    let missing: BTreeSet<&str> = of_conditions.chain(explained).filter(|reason| !entries().contains(reason)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn every_check_code_and_pass_reason_has_an_entry() {
    use CheckCode::{L4Con, L4Ok, L4Tout, L6Rsp, L6Tout, L7Ok, L7Rsp, L7Sts, L7Tout, LocalError};
    let codes = [L4Ok, L4Con, L4Tout, L6Tout, L6Rsp, L7Ok, L7Sts, L7Tout, L7Rsp, LocalError].map(CheckCode::label);
    let shown = codes.into_iter().chain(PassReason::ALL.iter().map(|reason| reason.label()));
    let missing: Vec<&str> = shown.filter(|word| !entries().contains(word)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
