//! Figures as SVG files below `target/bench/`: panels of horizontal bars, a line an agent.

use std::fmt::Write;
use std::path::PathBuf;
use std::{fs, io};

use super::process::target;
use super::speed::median;

const PANEL_WIDTH: f64 = 470.0;
const LABEL_WIDTH: f64 = 100.0;
const BAR_WIDTH: f64 = 270.0;
const ROW_HEIGHT: f64 = 22.0;
/// Title above the rows, and axis below them.
const HEAD_HEIGHT: f64 = 44.0;
const AXIS_HEIGHT: f64 = 34.0;
const TITLE_HEIGHT: f64 = 56.0;
/// What is compared, what it is compared with, and the one without anything between.
const OURS: &str = "#0b6e69";
const OTHERS: &str = "#b4532a";
const NEITHER: &str = "#8a8f98";

/// One figure of several programs.
pub(crate) struct Panel {
    pub(crate) title: String,
    /// With what is better.
    pub(crate) unit: &'static str,
    /// Decades instead of steps; a value is then a point, as a bar would have no beginning.
    pub(crate) is_log: bool,
    pub(crate) rows: Vec<Row>,
}

/// One program's median, and the least and the most of all rounds.
pub(crate) struct Row {
    pub(crate) label: String,
    pub(crate) value: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Row {
    pub(crate) fn of(label: impl Into<String>, values: &[f64]) -> Self {
        Self {
            label: label.into(),
            value: median(values.to_vec()),
            least: values.iter().copied().fold(f64::INFINITY, f64::min),
            most: values.iter().copied().fold(0.0, f64::max),
        }
    }
}

/// Writes `target/bench/NAME.svg`, with the panels in two columns.
pub(crate) fn write(name: &str, title: &str, panels: &[Panel]) -> io::Result<PathBuf> {
    let height = |panel: &Panel| HEAD_HEIGHT + AXIS_HEIGHT + ROW_HEIGHT * panel.rows.len() as f64;
    let mut drawn = String::new();
    let mut y = TITLE_HEIGHT;
    for pair in panels.chunks(2) {
        for (column, panel) in pair.iter().enumerate() {
            let x = PANEL_WIDTH * column as f64;
            let _ = writeln!(drawn, r#"<g transform="translate({x} {y})">{}</g>"#, draw(panel));
        }
        y += pair.iter().map(height).fold(0.0, f64::max);
    }
    let width = 2.0 * PANEL_WIDTH;
    let svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}"
 font-family="sans-serif" font-size="12" fill="#1f2328"><rect width="100%" height="100%" fill="#fff"/>
<text x="16" y="30" font-size="17" font-weight="bold">{}</text>
{drawn}</svg>
"##,
        escaped(title)
    );
    let path = target().join("bench").join(format!("{name}.svg"));
    fs::create_dir_all(target().join("bench"))?;
    fs::write(&path, svg)?;
    Ok(path)
}

fn draw(panel: &Panel) -> String {
    let scale = Scale::of(panel);
    let bottom = HEAD_HEIGHT + ROW_HEIGHT * panel.rows.len() as f64;
    let mut drawn = format!(
        r##"<text x="16" y="18" font-weight="bold">{}</text>
<text x="16" y="34" fill="#57606a">{}</text>
"##,
        escaped(&panel.title),
        escaped(panel.unit),
    );
    for tick in scale.ticks() {
        let x = LABEL_WIDTH + scale.at(tick);
        let _ = writeln!(
            drawn,
            r##"<line x1="{x:.1}" x2="{x:.1}" y1="{HEAD_HEIGHT}" y2="{bottom}" stroke="#d8dee4"/>
<text x="{x:.1}" y="{}" text-anchor="middle" font-size="10" fill="#57606a">{}</text>"##,
            bottom + 14.0,
            short(tick),
        );
    }
    for (at, row) in panel.rows.iter().enumerate() {
        let y = HEAD_HEIGHT + ROW_HEIGHT * (at as f64 + 0.5);
        let color = match () {
            () if row.label.ends_with("murmesh") => OURS,
            () if row.label == "direct" => NEITHER,
            () => OTHERS,
        };
        let [least, value, most] =
            [row.least, row.value, row.most].map(|value| LABEL_WIDTH + scale.at(value));
        let _ = writeln!(
            drawn,
            r#"<text x="{}" y="{}" text-anchor="end">{}</text>"#,
            LABEL_WIDTH - 8.0,
            y + 4.0,
            escaped(&row.label),
        );
        let _ = match panel.is_log {
            true => writeln!(drawn, r#"<circle cx="{value:.1}" cy="{y}" r="5" fill="{color}"/>"#),
            false => writeln!(
                drawn,
                r#"<rect x="{LABEL_WIDTH}" y="{}" width="{:.1}" height="14" fill="{color}"/>"#,
                y - 7.0,
                value - LABEL_WIDTH,
            ),
        };
        let _ = writeln!(
            drawn,
            r##"<line x1="{least:.1}" x2="{most:.1}" y1="{y}" y2="{y}" stroke="#1f2328" stroke-width="1.5"/>
<text x="{:.1}" y="{}">{}</text>"##,
            most.max(value) + 8.0,
            y + 4.0,
            short(row.value),
        );
    }
    drawn
}

/// From values to a length on paper.
struct Scale {
    is_log: bool,
    low: f64,
    high: f64,
}

impl Scale {
    fn of(panel: &Panel) -> Self {
        let all = || panel.rows.iter().flat_map(|row| [row.least, row.value, row.most]);
        let most = all().fold(f64::MIN_POSITIVE, f64::max);
        let least = all().filter(|value| *value > 0.0).fold(most, f64::min);
        match panel.is_log {
            true => Self {
                is_log: true,
                low: 10_f64.powf(least.log10().floor()),
                high: 10_f64.powf(most.log10().ceil()),
            },
            false => Self { is_log: false, low: 0.0, high: most },
        }
    }

    fn at(&self, value: f64) -> f64 {
        let share = match self.is_log {
            true => (value.max(self.low) / self.low).log10() / (self.high / self.low).log10(),
            false => value / self.high,
        };
        BAR_WIDTH * share.clamp(0.0, 1.0)
    }

    /// Decades, or round steps: at least three.
    fn ticks(&self) -> Vec<f64> {
        if self.is_log {
            let decades = (self.high / self.low).log10().round() as i32;
            return (0..=decades).map(|decade| self.low * 10_f64.powi(decade)).collect();
        }
        let decade = 10_f64.powf((self.high / 2.0).log10().floor());
        let step = [5.0, 2.0, 1.0].map(|part| part * decade);
        let step = step.into_iter().find(|step| self.high / step >= 2.0).unwrap_or(decade);
        (0..).map(|at| step * f64::from(at)).take_while(|tick| *tick <= self.high).collect()
    }
}

/// Two digits of small values; large ones whole, with marks of thousands.
fn short(value: f64) -> String {
    let digits = match value {
        _ if value == 0.0 || value >= 10.0 => 0,
        _ if value >= 1.0 => 1,
        _ if value >= 0.1 => 2,
        _ => 3,
    };
    let mut text = format!("{value:.digits$}");
    let whole = text.find('.').unwrap_or(text.len());
    for at in (1..whole).rev().filter(|at| (whole - at) % 3 == 0) {
        text.insert(at, ',');
    }
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
