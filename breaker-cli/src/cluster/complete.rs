//! Completion for kubectl. kubectl runs the program `kubectl_complete-breaker` with the words of the command line, and
//! reads candidates in the form of cobra: one a line, and a line with a colon and a number at the end.

use anyhow::Result;
use breaker_api::crd::CircuitBreaker;
use clap::{Args as _, Subcommand as _};
use kube::{ResourceExt, api::ListParams};

use super::{
    args::{ClusterArgs, ClusterCommand, ConnectionArgs},
    connection::Connection,
};
use crate::output::out;

/// Cobra's directive that the shell should not complete names of files.
const NO_FILES: &str = ":4";

pub(super) async fn run(args: &ConnectionArgs, words: &[String]) -> Result<()> {
    let mut args = args.clone();
    if let Some(position) = words.iter().position(|word| word == "-n" || word == "--namespace") {
        args.namespace = words.get(position + 1).cloned();
    }
    let mut candidates = candidates(words);
    if wants_name(words) {
        candidates.extend(names(&args).await.unwrap_or_default());
    }
    let last = words.last().map_or("", String::as_str);
    let text: String =
        candidates.into_iter().filter(|word| word.starts_with(last)).map(|word| format!("{word}\n")).collect();
    out(&format!("{text}{NO_FILES}\n"))
}

/// Commands and options that fit.
fn candidates(words: &[String]) -> Vec<String> {
    let root = ClusterCommand::augment_subcommands(ClusterArgs::augment_args(clap::Command::new("kubectl-breaker")));
    let command = words.iter().rev().skip(1).find_map(|word| root.find_subcommand(word));
    let last = words.last().map_or("", String::as_str);
    if last.starts_with('-') {
        let own = command.into_iter().flat_map(clap::Command::get_arguments);
        let options = own.chain(root.get_arguments()).filter(|arg| !arg.is_positional() && !arg.is_hide_set());
        return options.filter_map(|arg| arg.get_long()).map(|long| format!("--{long}")).collect();
    }
    if command.is_some() {
        return Vec::new();
    }
    root.get_subcommands().filter(|command| !command.is_hide_set()).map(|c| c.get_name().to_owned()).collect()
}

/// Whether the last word may be the name of a CircuitBreaker.
fn wants_name(words: &[String]) -> bool {
    let Some((last, before)) = words.split_last() else { return false };
    let takes_names = ["status", "get", "trip", "reset", "events", "flows"];
    !last.starts_with('-') && before.iter().any(|word| takes_names.contains(&word.as_str()))
}

async fn names(args: &ConnectionArgs) -> Result<Vec<String>> {
    let connection = Connection::new(args).await?;
    let breakers = connection.api::<CircuitBreaker>().list_metadata(&ListParams::default()).await?;
    Ok(breakers.items.iter().map(ResourceExt::name_any).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn commands_and_options_are_completed() {
        assert!(candidates(&words("")).contains(&"trip".to_owned()));
        assert!(!candidates(&words("")).contains(&"__complete".to_owned()));
        let options = candidates(&words("trip --"));
        assert!(options.contains(&"--for".to_owned()) && options.contains(&"--context".to_owned()), "{options:?}");
        assert!(candidates(&words("trip w")).is_empty());
    }

    #[test]
    fn names_are_completed_where_a_command_takes_one() {
        assert!(wants_name(&words("trip w")) && wants_name(&words("-n shop reset ")));
        assert!(!wants_name(&words("tr")) && !wants_name(&words("trip --fo")) && !wants_name(&words("check ")));
    }
}
