//! Does the command line do what its help says? Here is what needs no server; `talking` talks to one, as do `lines`
//! and `following`, `bench` to its own.

mod running;
mod talking;
mod lines;
mod following;
mod bench;

use std::process::{Command, Output};

/// Runs the program in an empty directory, with this environment and no other `PUMPHOUSE_*` variable.
fn run(environment: &[(&str, &str)], arguments: &[&str]) -> Output {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let mut command = Command::new(env!("CARGO_BIN_EXE_pumphouse"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PUMPHOUSE_") {
            command.env_remove(name);
        }
    }
    command.envs(environment.iter().copied()).args(arguments).current_dir(directory.path());
    command.output().expect("the program can be started")
}

/// Its exit code, and what it says on standard error.
fn fate(output: &Output) -> (Option<i32>, String) {
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_wrong_argument_exits_with_2_and_a_failure_with_1() {
    for usage in [
        &["serve", "--bogus"][..],
        &["send", "Not-A-Queue", "x"],
        &["queues", "put", "a"],
        &["queues", "put", "a=ftp://h"],
        &["queues", "put", "a=log:", "--settings", "{}"],
        &[],
    ] {
        let (code, said) = fate(&run(&[], usage));
        assert_eq!(code, Some(2), "{usage:?}: {said}");
    }
    // Port 1 is privileged and nobody listens there.
    let (code, said) = fate(&run(&[], &["health", "--url", "http://127.0.0.1:1"]));
    assert_eq!(code, Some(1), "{said}");
    assert!(said.starts_with("pumphouse: not ready\n  because: "), "{said}");
}

#[test]
fn the_flag_goes_over_the_variable_and_both_are_named() {
    let environment = [("PUMPHOUSE_LOG", "warn"), ("PUMPHOUSE_BODY_LIMIT", "1KiB")];
    let output = run(&environment, &["config", "--log", "error"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text}");
    let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap_or_default();
    assert!(line("log ").contains("\"error\"") && line("log ").ends_with("# flag --log"), "{text}");
    assert!(line("body_limit").ends_with("# environment PUMPHOUSE_BODY_LIMIT"), "{text}");
}

#[test]
fn a_server_does_not_start_from_a_mistake() {
    for (environment, arguments, says) in [
        (&[("PUMPHOUSE_LISTN", "x")][..], &["serve"][..], "did you mean PUMPHOUSE_LISTEN?"),
        (&[], &["serve", "--listen", "0.0.0.0:0"], "there are no API keys yet"),
        (&[], &["serve", "--config", "missing.toml"], "cannot read the file missing.toml"),
        (&[], &["serve", "--database", "mysql://h"], "postgres://USER@HOST/NAME"),
    ] {
        let (code, said) = fate(&run(environment, arguments));
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains(says), "{said}");
    }
}
