//! What people see: aligned tables, colours on a terminal, ages in one glance.

use std::fmt::Display;
use std::future::Future;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use comfy_table::presets::NOTHING;
use comfy_table::{Attribute, Cell, CellAlignment, Color, ContentArrangement, Table};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use super::exit::{Exit, Failure, Outcome};

/// How often a watched listing is drawn again.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// What every listing takes.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(super) struct Listing {
    /// Print JSON instead of a table
    #[arg(long)]
    pub(super) json: bool,
    /// Draw it again every second, until Ctrl-C
    #[arg(long, short = 'w')]
    pub(super) watch: bool,
}

/// One listing, drawn: what goes to standard output, and a word for who sees nothing.
pub(super) struct Drawing {
    pub(super) text: String,
    pub(super) hint: Option<String>,
    pub(super) exit: Exit,
}

impl Drawing {
    pub(super) fn new(text: String) -> Self {
        Self { text, hint: None, exit: Exit::Ok }
    }

    /// `rows` as JSON, or as `table` draws them; `hint` is for when there are none.
    pub(super) fn of<T: Serialize>(
        rows: &[T],
        listing: Listing,
        table: impl FnOnce(&[T]) -> String,
        hint: impl Display,
    ) -> Result<Self, Failure> {
        let hint = rows.is_empty().then(|| hint.to_string());
        let text = match (listing.json, rows.is_empty()) {
            (true, _) => json(rows, listing)?,
            (false, true) => String::new(),
            (false, false) => table(rows),
        };
        Ok(Self { text, hint, exit: Exit::Ok })
    }
}

/// JSON for programs: pretty once, one line a second when watched.
pub(super) fn json<T: Serialize + ?Sized>(value: &T, listing: Listing) -> Result<String, Failure> {
    let text = match listing.watch {
        true => serde_json::to_string(value),
        false => serde_json::to_string_pretty(value),
    };
    text.map_err(Failure::failed)
}

/// Goes on until `work` ends, somebody presses Ctrl-C or nobody reads any more (`events -f | head -1`).
/// A listing that the user ended is no failure.
pub(super) async fn until_interrupted(work: impl Future<Output = Outcome>) -> Outcome {
    tokio::select! {
        biased;
        Ok(()) = tokio::signal::ctrl_c() => Ok(Exit::Ok),
        outcome = work => outcome,
        () = reader_gone() => Ok(Exit::Ok),
    }
}

/// Returns once standard output is a pipe that nobody reads any more.
async fn reader_gone() {
    let stdout = io::stdout();
    let is_open = || {
        let mut asked = [PollFd::new(&stdout, PollFlags::empty())];
        let polled = poll(&mut asked, Some(&Timespec::default()));
        polled.is_err() || !asked[0].revents().intersects(PollFlags::ERR | PollFlags::HUP)
    };
    while is_open() {
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}

/// Draws once, or again and again until Ctrl-C.
pub(super) async fn show<F, Fut>(listing: Listing, draw: F) -> Outcome
where
    F: Fn() -> Fut,
    Fut: Future<Output = Result<Drawing, Failure>>,
{
    match listing.watch {
        true => until_interrupted(draw_on(listing, draw)).await,
        false => draw_on(listing, draw).await,
    }
}

async fn draw_on<F, Fut>(listing: Listing, draw: F) -> Outcome
where
    F: Fn() -> Fut,
    Fut: Future<Output = Result<Drawing, Failure>>,
{
    loop {
        let drawing = draw().await?;
        let clears = listing.watch && !listing.json && io::stdout().is_terminal();
        let start = if clears { "\x1b[H\x1b[2J" } else { "" };
        let is_open = print(format_args!("{start}{}", ended(&drawing.text)))?;
        if let Some(hint) = &drawing.hint {
            note(hint);
        }
        if !listing.watch || !is_open {
            return Ok(drawing.exit);
        }
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}

fn ended(text: &str) -> String {
    match text.is_empty() || text.ends_with('\n') {
        true => text.to_owned(),
        false => format!("{text}\n"),
    }
}

/// Prints. A reader that is gone (`murmesh events | head -1`) wants no more: false, and no failure.
/// Anything else that keeps the result from its reader, for instance a full disk, is one.
pub(super) fn print(text: impl Display) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    match write!(out, "{text}").and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::failed(format!("cannot write to standard output: {error}"))),
    }
}

/// Prints a line; see [`print()`].
pub(super) fn line(text: impl Display) -> Result<bool, Failure> {
    print(format_args!("{text}\n"))
}

/// Says something beside the result, where scripts do not read.
pub(super) fn note(text: impl Display) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Whether colours help: on a terminal, and nobody said NO_COLOR (no-color.org).
pub(super) fn has_colour() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A table without lines: names left, numbers right, two spaces between.
pub(super) struct Grid {
    table: Table,
}

impl Grid {
    pub(super) fn new<const N: usize>(header: [&str; N]) -> Self {
        let mut table = Table::new();
        table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        match has_colour() {
            true => drop(table.enforce_styling()),
            false => drop(table.force_no_tty()),
        }
        table.set_header(header.map(|name| Cell::new(name).add_attribute(Attribute::Dim)));
        Self { table }
    }

    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.table.add_row(cells.into_iter().collect::<Vec<_>>());
    }

    /// The lines, without what trails.
    pub(super) fn finish(mut self, right: &[usize]) -> String {
        for column in self.table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        for index in right {
            if let Some(column) = self.table.column_mut(*index) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        self.table.trim_fmt()
    }
}

/// Plain text.
pub(super) fn cell(text: impl ToString) -> Cell {
    Cell::new(text)
}

/// A state word in its colour: green is well, yellow in between, red not.
pub(super) fn state(word: &str) -> Cell {
    let cell = Cell::new(word);
    match word {
        "alive" | "ready" | "open" | "pass" => cell.fg(Color::Green),
        "suspect" | "restarting" | "draining" | "probing" | "partly" | "used" | "warn" => {
            cell.fg(Color::Yellow)
        }
        "down" | "failing" | "ejected" | "revoked" | "fail" | "silent" => cell.fg(Color::Red),
        _ => cell.add_attribute(Attribute::Dim),
    }
}

/// The state of a breaker in its colour: an open one refuses.
pub(super) fn breaker(word: &str) -> Cell {
    let cell = Cell::new(word);
    match word {
        "open" => cell.fg(Color::Red),
        "half_open" => cell.fg(Color::Yellow),
        _ => cell.add_attribute(Attribute::Dim),
    }
}

/// `words` in a colour of the terminal.
pub(super) fn painted(words: impl Display, colour: &str) -> String {
    match has_colour() {
        true => format!("\x1b[{colour}m{words}\x1b[0m"),
        false => words.to_string(),
    }
}

/// A dash for what is empty.
pub(super) fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

/// A time in its two largest units: `4s`, `3m 12s`, `2h 5m`, `9d 3h`, and `1h` for a whole one.
pub(super) fn age(time: Duration) -> String {
    let secs = time.as_secs();
    let (large, unit, small, below) = match secs {
        0..=59 => return format!("{secs}s"),
        60..=3_599 => (secs / 60, 'm', secs % 60, 's'),
        3_600..=86_399 => (secs / 3_600, 'h', secs / 60 % 60, 'm'),
        _ => (secs / 86_400, 'd', secs / 3_600 % 24, 'h'),
    };
    match small {
        0 => format!("{large}{unit}"),
        _ => format!("{large}{unit} {small}{below}"),
    }
}

/// `1 member`, `2 members`.
pub(super) fn count(number: usize, noun: &str) -> String {
    match number {
        1 => format!("1 {noun}"),
        _ => format!("{number} {noun}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_show_two_units() {
        for (secs, text) in [
            (0, "0s"),
            (59, "59s"),
            (192, "3m 12s"),
            (3_600, "1h"),
            (7_500, "2h 5m"),
            (788_400, "9d 3h"),
        ] {
            assert_eq!(age(Duration::from_secs(secs)), text);
        }
    }

    #[test]
    fn tables_align_and_trail_nothing() {
        let mut grid = Grid::new(["NAME", "READY"]);
        grid.row([cell("a"), cell("10/12")]);
        grid.row([cell("longer"), cell("1/1")]);
        assert_eq!(grid.finish(&[1]), "NAME    READY\na       10/12\nlonger    1/1");
    }
}
