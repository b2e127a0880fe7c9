//! A scenario as an SVG: failed calls so far over time, a line for each way.

use std::fmt::Write;
use std::path::Path;

use super::model::{Run, Setting, Way};

const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 260.0;
/// Around the field: left, right, above, below.
const FRAME: [f64; 4] = [60.0, 16.0, 40.0, 40.0];
const COLOURS: [&str; 3] = ["#0b6e69", "#8a8f98", "#b4532a"];

/// Writes `breaker-NAME.svg` into the directory `MURMESH_PLOTS`, if it is set.
pub(super) fn write(name: &str, setting: &Setting, runs: &[Run; 3]) {
    let Some(directory) = std::env::var_os("MURMESH_PLOTS") else { return };
    let words: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let words = words.split('-').filter(|word| !word.is_empty()).collect::<Vec<_>>().join("-");
    let path = Path::new(&directory).join(format!("breaker-{words}.svg"));
    std::fs::create_dir_all(&directory).expect("a directory for plots");
    std::fs::write(&path, draw(name, setting, runs)).expect("a plot");
    println!("  {}", path.display());
}

fn draw(name: &str, setting: &Setting, runs: &[Run; 3]) -> String {
    let [left, right, above, below] = FRAME;
    let (width, height) = (WIDTH - left - right, HEIGHT - above - below);
    let length = setting.length.as_secs_f64();
    let most = runs.iter().map(|run| run.failures.len()).max().unwrap_or(0).max(10) as f64;
    let mut field = String::new();
    for step in 0..=4 {
        let share = f64::from(step) / 4.0;
        let (x, y) = (left + share * width, above + (1.0 - share) * height);
        let _ = writeln!(
            field,
            r##"<path d="M{left} {y:.1}h{width}" stroke="#e4e6ea"/>
<text x="{:.1}" y="{:.1}" text-anchor="end">{:.0}</text>
<text x="{x:.1}" y="{:.1}" text-anchor="middle">{:.0} s</text>"##,
            left - 8.0,
            y + 4.0,
            share * most,
            HEIGHT - below + 18.0,
            share * length
        );
    }
    for (number, (run, way)) in runs.iter().zip(Way::ALL).enumerate() {
        let colour = COLOURS[number];
        let mut line = format!("M{left} {:.1}", above + height);
        let mut failures = run.failures.clone();
        failures.sort();
        let mut drawn_to = 0.0;
        for (count, at) in failures.iter().enumerate() {
            let x = left + at.as_secs_f64() / length * width;
            let y = above + (1.0 - (count + 1) as f64 / most) * height;
            if x >= drawn_to + 1.0 || count + 1 == failures.len() {
                let _ = write!(line, "H{x:.1}V{y:.1}");
                drawn_to = x;
            }
        }
        let _ = writeln!(
            field,
            r#"<path d="{line}H{:.1}" fill="none" stroke="{colour}" stroke-width="2"/>
<text x="{:.1}" y="{:.1}" fill="{colour}">{}: {}</text>"#,
            left + width,
            left + 10.0,
            above + 16.0 + 16.0 * number as f64,
            way.as_str(),
            run.failures.len()
        );
    }
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"
 font-family="sans-serif" font-size="12" fill="#1f2328"><rect width="100%" height="100%" fill="#fff"/>
<text x="16" y="24" font-size="15" font-weight="bold">{name}: failed calls so far, {} callers</text>
{field}</svg>
"##,
        setting.callers.len()
    )
}
