//! Programs that check: run without a shell, and ended with all that they have started.

use std::io::{self, PipeReader};
use std::os::fd::OwnedFd;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};

use super::OUTPUT_LEN_MAX;
use super::probe::Finding;
use crate::health::CheckResult;
use crate::runtime::machine;

/// A program in a process group of its own, which is killed unless the program has ended by itself.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Until it is waited for, its number is nobody else's.
        let id = self.0.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(group) = id {
            let _ = kill_process_group(group, Signal::KILL); // gone already: so much the better
        }
    }
}

/// Runs a program to its end. Dropped before that, the program and what it started are killed.
pub(super) async fn run(words: &[String]) -> Result<Finding, String> {
    let Some((program, arguments)) = words.split_first() else {
        return Err("no program".to_owned());
    };
    if machine::simulated().is_some() {
        return Err("a simulated machine has no programs".to_owned());
    }
    let failed = |error: io::Error| format!("{program}: {error}");
    let (said, saying) = io::pipe().map_err(failed)?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    command.stdout(saying.try_clone().map_err(failed)?).stderr(saying);
    command.process_group(0).kill_on_drop(true);
    let mut running = Running(command.spawn().map_err(failed)?);
    drop(command); // and our own ends of the pipe
    let (code, output) = end_of(&mut running.0, said).await.map_err(failed)?;
    let output = String::from_utf8_lossy(&output).trim().to_owned();
    let result = match code {
        Some(0) => CheckResult::Pass,
        Some(1) => CheckResult::Warn,
        _ => CheckResult::Fail,
    };
    let ended = code.map_or_else(|| "a signal".to_owned(), |code| format!("exit code {code}"));
    Ok((result, if output.is_empty() { ended } else { format!("{ended}: {output}") }))
}

/// Its exit code, if it had one, and the beginning of what it said. The rest is read and dropped, so
/// that it never waits for us; what outlives it is not waited for.
async fn end_of(child: &mut Child, said: PipeReader) -> io::Result<(Option<i32>, Vec<u8>)> {
    let mut said = pipe::Receiver::from_owned_fd(OwnedFd::from(said))?;
    let (mut output, mut chunk, mut is_open) = (Vec::new(), [0; 1_024], true);
    let keep = |output: &mut Vec<u8>, bytes: &[u8]| {
        let room = OUTPUT_LEN_MAX.saturating_sub(output.len());
        output.extend_from_slice(&bytes[..bytes.len().min(room)]);
    };
    let status = loop {
        tokio::select! {
            biased;
            status = child.wait() => break status?,
            read = said.read(&mut chunk), if is_open => match read {
                Ok(0) | Err(_) => is_open = false,
                Ok(len) => keep(&mut output, &chunk[..len]),
            },
        }
    };
    // What it said at the very end is in the pipe already. What it left behind may write for ever.
    while output.len() < OUTPUT_LEN_MAX
        && let Ok(len @ 1..) = rustix::io::read(&said, &mut chunk)
    {
        keep(&mut output, &chunk[..len]);
    }
    Ok((status.code(), output))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    async fn sh(script: &str) -> Finding {
        run(&["sh", "-c", script].map(str::to_owned)).await.unwrap()
    }

    #[tokio::test]
    async fn exit_codes_pass_warn_and_fail_and_both_outputs_are_kept() {
        assert_eq!(sh("echo fine").await, (CheckResult::Pass, "exit code 0: fine".to_owned()));
        let warned = (CheckResult::Warn, "exit code 1: out\nerr".to_owned());
        assert_eq!(sh("echo out; echo err >&2; exit 1").await, warned);
        assert_eq!(sh("exit 7").await, (CheckResult::Fail, "exit code 7".to_owned()));
        assert_eq!(sh("kill -9 $$").await, (CheckResult::Fail, "a signal".to_owned()));
        let absent = run(&["/nonexistent/check".to_owned()]).await.unwrap_err();
        assert!(absent.starts_with("/nonexistent/check: "), "{absent}");
    }

    #[tokio::test]
    async fn much_output_is_read_to_the_end_and_cut() {
        let (result, said) = sh("head -c 1000000 /dev/zero | tr '\\0' x; exit 3").await;
        assert_eq!(result, CheckResult::Fail);
        assert!(said.len() > OUTPUT_LEN_MAX && said.len() < OUTPUT_LEN_MAX + 100, "{}", said.len());
    }

    #[tokio::test]
    async fn a_program_that_is_given_up_is_killed_with_what_it_started() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pids");
        let script =
            format!("sleep 600 & echo $! $$ > {}.new; mv {0}.new {0}; wait", file.display());
        let words = ["sh", "-c", &script].map(str::to_owned);
        let pids = async {
            loop {
                match std::fs::read_to_string(&file) {
                    Ok(text) => break text,
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        };
        let pids = tokio::select! {
            biased;
            pids = timeout(Duration::from_secs(30), pids) => pids.unwrap(),
            ended = run(&words) => panic!("{ended:?}"),
        };
        for pid in pids.split_whitespace() {
            let is_gone = || match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
                Ok(stat) => stat.contains(") Z "),
                Err(_) => true,
            };
            let gone = async {
                while !is_gone() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            timeout(Duration::from_secs(30), gone).await.expect("it is gone");
        }
    }

    #[tokio::test]
    async fn what_outlives_a_program_is_not_waited_for() {
        let begun = timeout(Duration::from_secs(30), sh("sleep 600 & echo $!; exit 0")).await;
        let (result, said) = begun.expect("it returns");
        assert_eq!(result, CheckResult::Pass);
        let pid = said.rsplit(' ').next().unwrap().parse().ok().and_then(Pid::from_raw).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
    }

    #[tokio::test]
    async fn what_a_program_leaves_behind_may_write_for_ever() {
        let ended = timeout(Duration::from_secs(30), sh("yes & exit 0")).await;
        assert_eq!(ended.expect("it returns").0, CheckResult::Pass);
    }
}
