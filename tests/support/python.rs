//! Programs in Python, with packages from PyPI.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use super::programs::{find, run_program};
use super::skip;

const INSTALL_TIME_MAX: Duration = Duration::from_secs(180);

/// A Python with these packages, made once for all runs of this target directory. `None` when it
/// cannot be had, which was then said.
pub fn python(packages: &[&str]) -> Option<PathBuf> {
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let name = packages.join("+").replace(['=', '.'], "_");
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("python-{name}"));
    let (done, interpreter) = (home.join("complete"), home.join("bin/python"));
    if done.is_file() {
        return Some(interpreter);
    }
    let Some(system) = find("python3") else {
        skip("python3 is not installed");
        return None;
    };
    let mut venv = Command::new(system);
    let venv = run_program(venv.args(["-m", "venv"]).arg(&home), b"", INSTALL_TIME_MAX);
    if venv.code != Some(0) {
        skip(&format!("python3 has no venv: {}", venv.stderr));
        return None;
    }
    let mut pip = Command::new(home.join("bin/pip"));
    pip.args(["install", "--quiet", "--disable-pip-version-check"]).args(packages);
    let installed = run_program(&mut pip, b"", INSTALL_TIME_MAX);
    if installed.code != Some(0) {
        skip(&format!("pip cannot install {packages:?}: {}", installed.stderr));
        return None;
    }
    std::fs::write(done, b"").expect("the directory is ours");
    Some(interpreter)
}
