//! Real input: ten thousand envelopes made of text that every machine with this repository has.
//!
//! The lines are those of the repository's own files, and of the licences that Debian installs where there
//! are any: prose, code, hashes, box drawings, umlauts. The same repository gives the same envelopes.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

/// A line of text, and where it stands.
struct Line {
    file: String,
    number: usize,
    text: String,
}

/// An envelope as it is sent, and the bytes that a handler must get for it.
pub(crate) struct Sample {
    /// One line of NDJSON, without the line's end.
    pub(crate) line: String,
    /// Its payload.
    pub(crate) payload: Vec<u8>,
}

/// So many envelopes: JSON and bytes, with types, priorities, headers, and one in fifty delayed.
pub(crate) fn samples(count: usize) -> Vec<Sample> {
    let lines = lines();
    assert!(lines.len() > 1000, "a repository has more text than {} lines", lines.len());
    (0..count).map(|index| sample(index, &lines[index % lines.len()])).collect()
}

fn sample(index: usize, line: &Line) -> Sample {
    let payload =
        json!({"index": index, "file": line.file, "line": line.number, "text": line.text});
    let mut envelope = json!({
        "type": format!("line.{}", extension(&line.file)),
        "priority": (index % 7) as i64 - 3,
        "correlation_id": line.file,
    });
    let payload = if index.is_multiple_of(4) {
        let bytes = payload.to_string().into_bytes();
        envelope["payload_base64"] = Value::String(STANDARD.encode(&bytes));
        envelope["content_type"] = json!("text/plain; charset=utf-8");
        bytes
    } else {
        envelope["payload"] = payload.clone();
        payload.to_string().into_bytes()
    };
    if index % 10 == 1 {
        envelope["headers"] =
            json!({"x-line": line.number.to_string(), "x-index": index.to_string()});
    }
    if index % 50 == 7 {
        envelope["delay"] = json!(format!("{}ms", 20 * (index % 13)));
    }
    Sample { line: envelope.to_string(), payload }
}

fn extension(file: &str) -> String {
    let found = Path::new(file).extension().and_then(|text| text.to_str());
    found.unwrap_or("text").to_lowercase()
}

fn lines() -> Vec<Line> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = vec![root.join("Cargo.lock"), root.join("Cargo.toml")];
    files_below(&root.join("src"), &mut files);
    files_below(&root.join("tests"), &mut files);
    files_below(Path::new("/usr/share/common-licenses"), &mut files);
    files.iter().flat_map(|file| lines_of(root, file)).collect()
}

fn files_below(directory: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path())).collect::<Vec<_>>();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            files_below(&path, files);
        } else {
            files.push(path);
        }
    }
}

fn lines_of(root: &Path, file: &Path) -> Vec<Line> {
    let text = fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let name = file.strip_prefix(root).unwrap_or(file).display().to_string();
    let full = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    full.map(|(at, line)| Line { file: name.clone(), number: at + 1, text: line.to_owned() })
        .collect()
}
