//! Python with the libraries that stand for programs of others: an SDK, a generator of clients. Fetched from their registry
//! once, in pinned versions, into the build directory; without a network the tests that want it fail and say so.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;
use tokio::sync::OnceCell;

/// What is wanted, and in which versions.
const WANTED: [&str; 3] = ["cloudevents==2.2.0", "openapi-python-client==0.29.1", "ruff==0.17.6"];

/// The folder of an environment with what is wanted in it.
async fn environment() -> &'static Path {
    static MADE: OnceCell<PathBuf> = OnceCell::const_new();
    MADE.get_or_init(make).await
}

async fn make() -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_pumphouse"));
    let folder = program.parent().expect("a program lies in a folder").join("python");
    let done = folder.join(WANTED.join("+"));
    if done.is_file() {
        return folder;
    }
    let make = Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder).output().await;
    let made = make.expect("there is a python3");
    let said = String::from_utf8_lossy(&made.stderr).into_owned();
    assert!(made.status.success(), "Python's venv is missing (apt install python3-venv): {said}");
    let mut pip = Command::new(folder.join("bin/pip"));
    pip.args(["install", "--quiet", "--disable-pip-version-check"]).args(WANTED);
    let installed = pip.output().await.expect("there is a pip");
    let said = String::from_utf8_lossy(&installed.stderr).into_owned();
    assert!(installed.status.success(), "they could not be fetched from PyPI: {said}");
    std::fs::write(&done, "").expect("the folder can be written");
    folder
}

/// Runs a script with these arguments, and gives what it printed.
pub(crate) async fn run(script: &str, arguments: &[&str]) -> String {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let path = folder.path().join("script.py");
    std::fs::write(&path, script).expect("a file can be written");
    let mut python = Command::new(environment().await.join("bin/python"));
    let output = python.arg(path).args(arguments).stdin(Stdio::null()).output().await;
    let output = output.expect("it can be run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("it prints text")
}

/// Makes a client from a document; it is the package `generated` in the folder.
pub(crate) async fn generate(document: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let bin = environment().await.join("bin");
    let mut generator = Command::new(bin.join("openapi-python-client"));
    generator.args(["generate", "--meta", "none", "--path", document, "--output-path"]);
    let path = std::env::var("PATH").unwrap_or_default();
    generator.env("PATH", format!("{}:{path}", bin.display()));
    let output = generator.arg(folder.path().join("generated")).output().await;
    let output = output.expect("it can be run");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stdout));
    folder
}
