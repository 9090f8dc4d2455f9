//! Standard output and its formats.

use std::io::{self, Write as _};

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use serde::Serialize;

/// A table for people, or a format for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "a documented value is a line of its own in --help")]
pub enum TableOutput {
    Table,
    Json,
    Yaml,
}

/// A format for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "a documented value is a line of its own in --help")]
pub enum Output {
    Json,
    Yaml,
}

/// Writes to standard output. Unlike `print!`, it returns an error if the reader has closed the pipe.
///
/// # Errors
/// A closed standard output.
pub fn out(text: &str) -> Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("write to standard output")
}

/// Writes a line to standard error. Unlike `eprintln!`, it does not panic where standard error cannot be written: there
/// is nobody to tell.
pub fn complain(line: &str) {
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

pub(crate) fn print_as(
    output: TableOutput,
    value: &impl Serialize,
    table: impl FnOnce() -> Result<String>,
) -> Result<()> {
    match output {
        TableOutput::Table => out(&table()?),
        TableOutput::Json => print(Output::Json, value),
        TableOutput::Yaml => print(Output::Yaml, value),
    }
}

pub(crate) fn print(output: Output, value: &impl Serialize) -> Result<()> {
    match output {
        Output::Json => out(&format!("{}\n", serde_json::to_string_pretty(value)?)),
        Output::Yaml => out(&serde_saphyr::to_string(value).context("write YAML")?),
    }
}
