//! Where the demo speaks: lines that stay, and on a terminal a picture below them, redrawn in place.

use std::io::{self, IsTerminal, Stdout, Write};

const HIDE_CURSOR: &str = "\x1b[?25l";
const SHOW_CURSOR: &str = "\x1b[?25h";
/// A line that is too long for the terminal is clipped: one that wrapped would break the picture.
const CLIP: &str = "\x1b[?7l";
const WRAP: &str = "\x1b[?7h";
const CLEAR_BELOW: &str = "\x1b[J";
const CLEAR_LINE: &str = "\x1b[K";

/// A colour by its meaning.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ink {
    Good,
    Doubtful,
    Bad,
    Quiet,
    Strong,
}

/// Standard output.
pub(super) struct Screen {
    out: Stdout,
    is_live: bool,
    is_coloured: bool,
    /// Lines of the picture that is there now.
    picture_len: usize,
}

impl Screen {
    /// Live on a terminal, plain otherwise.
    pub(super) fn new() -> Self {
        let out = io::stdout();
        let is_dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let is_live = out.is_terminal() && !is_dumb;
        let is_coloured = is_live && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
        Self { out, is_live, is_coloured, picture_len: 0 }
    }

    /// Whether pictures are shown.
    pub(super) fn is_live(&self) -> bool {
        self.is_live
    }

    /// `text` in a colour, where there are colours.
    pub(super) fn ink(&self, ink: Ink, text: &str) -> String {
        let code = match ink {
            Ink::Good => 32,
            Ink::Doubtful => 33,
            Ink::Bad => 31,
            Ink::Quiet => 2,
            Ink::Strong => 1,
        };
        if self.is_coloured { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Writes a line that stays; a picture makes room and must be drawn again.
    pub(super) fn line(&mut self, text: &str) -> io::Result<()> {
        let rub = self.rub();
        writeln!(self.out, "{rub}{text}")?;
        self.out.flush()
    }

    /// Shows a picture in place of the one before.
    pub(super) fn draw(&mut self, picture: &[String]) -> io::Result<()> {
        if !self.is_live {
            return Ok(());
        }
        let mut text = match self.picture_len {
            0 => format!("{HIDE_CURSOR}{CLIP}"),
            up => format!("{CLIP}\x1b[{up}A\r"),
        };
        for line in picture {
            text += &format!("{line}{CLEAR_LINE}\n");
        }
        text += CLEAR_BELOW;
        self.picture_len = picture.len();
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }

    /// Takes the picture away and gives the terminal back as it was.
    pub(super) fn end(&mut self) -> io::Result<()> {
        let rub = self.rub();
        self.out.write_all(rub.as_bytes())?;
        self.out.flush()
    }

    fn rub(&mut self) -> String {
        match std::mem::take(&mut self.picture_len) {
            0 => String::new(),
            up => format!("\x1b[{up}A\r{CLEAR_BELOW}{WRAP}{SHOW_CURSOR}"),
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.end(); // nobody is left to tell
    }
}
