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

#[test]
fn the_steps_around_a_delivery_run_in_this_order() {
    let list = fs::read_to_string("src/deliver/pipeline.rs").unwrap();
    let steps = [
        "layer_fn(trace)",
        "measure(inner",
        "patience(inner",
        "layer_fn(catch)",
        ".service(handler)",
    ];
    let places = steps.map(|step| list.find(step).unwrap_or_else(|| panic!("{step} is missing")));
    assert!(places.is_sorted(), "outermost first: {steps:?}");
    assert_eq!(list.matches(".layer_fn(").count(), 4, "a new step belongs into this test too");
}

#[test]
fn the_example_runs() {
    let folder = tempfile::tempdir().unwrap();
    // Cargo builds examples beside the tests, so it is there whenever this runs.
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_pumphouse"));
    let example = program.parent().unwrap().join("examples/embed");
    let output = Command::new(example).arg(folder.path()).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for user in ["ada", "grace"] {
        assert!(said.contains(&format!("welcome, {user} (attempt 1)")), "{said}");
    }
}
