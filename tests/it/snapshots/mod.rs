//! Did a face of the house change? The OpenAPI document, the error codes, the metrics, the example.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use pumphouse::api;
use pumphouse::telemetry::metrics;

#[test]
fn the_openapi_document_is_the_one_in_the_tree() {
    let stored = fs::read_to_string("openapi/pumphouse.json").unwrap_or_default();
    let how = "it is stale: cargo run -- openapi > openapi/pumphouse.json";
    assert_eq!(first_difference(&stored, &format!("{}\n", api::openapi_json())), None, "{how}");
}

#[test]
fn the_program_prints_the_same_document() {
    let output = Command::new(env!("CARGO_BIN_EXE_pumphouse")).arg("openapi").output().unwrap();
    assert!(output.status.success());
    let printed = String::from_utf8(output.stdout).unwrap();
    assert_eq!(first_difference(printed.trim_end(), &api::openapi_json()), None);
}

/// The first line that two texts do not share.
fn first_difference(one: &str, other: &str) -> Option<(String, String)> {
    let mut lines = one.lines().zip(other.lines());
    let differ = lines.find(|(a, b)| a != b).map(|(a, b)| (a.to_owned(), b.to_owned()));
    let longer = (one.len() != other.len()).then(|| (String::new(), "one is longer".to_owned()));
    differ.or(longer)
}

#[test]
fn every_error_code_has_a_page_and_every_page_a_code() {
    let codes = api::CODES.iter().map(|code| code.word.to_owned()).collect::<BTreeSet<_>>();
    let pages = fs::read_dir("docs/problems").unwrap().map(|entry| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        name.trim_end_matches(".md").to_owned()
    });
    assert_eq!(codes, pages.collect());
    for code in api::CODES {
        let status = format!("status {}", code.status.as_u16());
        assert!(code.page.contains(code.word), "{}: the page names its code", code.word);
        assert!(code.page.contains(&status), "{}: the page says {status}", code.word);
    }
}

#[test]
fn the_protocol_names_every_metric() {
    let protocol = fs::read_to_string("docs/protocol.md").unwrap();
    for metric in metrics::ALL {
        let name = metric.name.strip_prefix("pumphouse_").expect("every metric has the prefix");
        assert!(protocol.contains(&format!("`{name}")), "docs/protocol.md lacks {name}");
        assert!(metric.help.ends_with('.'), "{name}: help is a sentence");
    }
}

/// What stands around a handler, outermost first, as it was approved. A step that is added or moved changes what every
/// queue does, and is to be approved here: in `pipeline.approved.txt`.
#[test]
fn the_steps_around_a_delivery_run_in_the_order_that_was_approved() {
    let list = fs::read_to_string("src/deliver/pipeline.rs").unwrap();
    let calls = list.lines().map(str::trim);
    let calls = calls.filter(|line| line.starts_with(".layer") || line.starts_with(".service"));
    let order = calls.map(|line| format!("{}\n", line.trim_end_matches(';'))).collect::<String>();
    let approved = fs::read_to_string("tests/it/snapshots/pipeline.approved.txt").unwrap();
    assert_eq!(order, approved, "outermost first; is this what was meant?");
}

/// Runs an example. Cargo builds examples beside the tests, so it is there whenever this runs.
fn run_example(name: &str, arguments: &[&std::path::Path]) -> String {
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_pumphouse"));
    let example = program.parent().unwrap().join("examples").join(name);
    let output = Command::new(example).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_program_with_a_queue_of_its_own_runs() {
    let folder = tempfile::tempdir().unwrap();
    let said = run_example("embed", &[folder.path()]);
    for user in ["ada", "grace"] {
        assert!(said.contains(&format!("welcome, {user} (attempt 1)")), "{said}");
    }
}

#[test]
fn a_step_of_ones_own_stands_around_a_handler() {
    let said = run_example("own_step", &[]);
    assert!(said.contains("shipped to ada") && said.contains("shipped to edsger"), "{said}");
    assert!(!said.contains("grace") && said.ends_with("2 passed\n"), "{said}");
}

#[test]
fn a_worker_on_the_library_pulls_and_goes_home() {
    let folder = tempfile::tempdir().unwrap();
    let said = run_example("worker", &[folder.path()]);
    assert_eq!(said, "printed with ink\nprinted with paper\nprinted with lead\n");
}

#[test]
fn the_examples_are_as_short_as_they_say() {
    for (example, most) in [("embed.rs", 50), ("worker.py", 60)] {
        let lines = fs::read_to_string(format!("examples/{example}")).unwrap().lines().count();
        assert!(lines < most, "{example} has {lines} lines");
    }
}
