//! Tables for a terminal: columns as wide as their widest cell, colour, lines cut at the terminal's width.

use std::io::{self, IsTerminal as _};

use terminal_size::{Width, terminal_size};
use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

/// Green, as an SGR parameter (ECMA-48).
pub(crate) const GREEN: &str = "32";
/// Red.
pub(crate) const RED: &str = "31";
/// Yellow.
pub(crate) const YELLOW: &str = "33";
/// Faint.
pub(crate) const DIM: &str = "2";
/// Bold.
pub(crate) const BOLD: &str = "1";

/// How text is shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paint {
    colour: bool,
    /// Columns of the terminal; `None` where the output is no terminal, and lines are not cut.
    width: Option<usize>,
}

impl Paint {
    /// Colour on a terminal, unless NO_COLOR is set (no-color.org).
    pub(crate) fn for_stdout() -> Self {
        let terminal = io::stdout().is_terminal();
        Self {
            colour: terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
            width: terminal_size().filter(|_| terminal).map(|(Width(columns), _)| usize::from(columns)),
        }
    }

    /// Neither colour nor a width.
    #[cfg(test)]
    pub(crate) const fn plain() -> Self {
        Self { colour: false, width: None }
    }

    pub(crate) fn with(self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// A cell: its text, and its colour.
pub(crate) type Cell = (String, Option<&'static str>);

/// A cell without colour.
pub(crate) fn plain(text: impl Into<String>) -> Cell {
    (text.into(), None)
}

/// A table of text.
pub(crate) struct Table {
    rows: Vec<Vec<Cell>>,
    /// Widths of the first columns, at least.
    least: Vec<usize>,
}

impl Table {
    /// Creates a table with a line of headings, or without one if `head` is empty.
    pub(crate) fn new(head: &[&str]) -> Self {
        let head: Vec<Cell> = head.iter().map(|cell| ((*cell).to_owned(), Some(BOLD))).collect();
        Self { rows: if head.is_empty() { Vec::new() } else { vec![head] }, least: Vec::new() }
    }

    /// Makes the first columns at least this wide, so that tables of one row each stand below each other.
    pub(crate) fn set_least_widths(&mut self, least: &[usize]) {
        self.least = least.to_vec();
    }

    pub(crate) fn row(&mut self, cells: Vec<Cell>) {
        self.rows.push(cells);
    }

    /// The table's lines. On a terminal, a line that is too long ends with an ellipsis.
    pub(crate) fn print(&self, paint: Paint) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |i: usize| self.rows.iter().filter_map(|row| row.get(i)).map(|cell| cell.0.width()).max();
        let widths: Vec<usize> =
            (0..columns).map(|i| width(i).unwrap_or(0).max(self.least.get(i).copied().unwrap_or(0))).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            let mut column = 0;
            for ((cell, colour), width) in row.iter().zip(&widths) {
                let room = paint.width.map_or(usize::MAX, |terminal| terminal.saturating_sub(column));
                let shown = cut(cell, room);
                line.push_str(&colour.map_or_else(|| shown.clone(), |code| paint.with(code, &shown)));
                if shown != *cell {
                    break;
                }
                line.push_str(&" ".repeat(width - cell.width() + 2));
                column += width + 2;
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Returns `text` if it fits into `room` columns; otherwise its beginning and an ellipsis.
fn cut(text: &str, room: usize) -> String {
    if text.width() <= room {
        return text.to_owned();
    }
    let mut column = 0;
    let fits = |character: &char| {
        column += character.width().unwrap_or(0);
        column < room
    };
    let mut shown: String = text.chars().take_while(fits).collect();
    if room > 0 {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["A", "B"]);
        table.row(vec![("long".into(), Some(RED)), plain("x")]);
        assert_eq!(table.print(Paint::plain()), "A     B\nlong  x\n");
        let coloured = table.print(Paint { colour: true, width: None });
        assert!(coloured.contains("\x1b[31mlong\x1b[0m  x"));
        let mut wide = Table::new(&["NAME", "B"]);
        wide.row(vec![plain("服务"), plain("x")]);
        assert_eq!(wide.print(Paint::plain()), "NAME  B\n服务  x\n", "characters of two columns");
    }

    #[test]
    fn a_terminal_cuts_what_does_not_fit() {
        let mut table = Table::new(&[]);
        table.row(vec![plain("dummy"), plain("status 503 Service Unavailable")]);
        let print = |width| table.print(Paint { colour: false, width: Some(width) });
        assert_eq!(print(80), "dummy  status 503 Service Unavailable\n");
        assert_eq!(print(17), "dummy  status 50…\n");
        assert_eq!(print(7), "dummy\n");
        assert_eq!(print(4), "dum…\n");
    }
}
