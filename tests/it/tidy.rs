//! Are the rules of the house kept? Arrows between rooms, a first line for every file, twins that match.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The floors, from the ground up. A room may use rooms on lower floors, and itself.
const FLOORS: [&[&str]; 6] = [
    &["model"],
    &["policy", "clock", "telemetry"],
    &["store", "deliver"],
    &["pump"],
    &["api"],
    &["cli"],
];

#[test]
fn arrows_between_rooms_only_point_down() {
    let mut wrong = Vec::new();
    for file in rust_files("src") {
        let Some(room) = room_of(&file) else { continue };
        for used in rooms_used(&fs::read_to_string(&file).unwrap()) {
            if used != room && floor(&used) >= floor(&room) {
                wrong.push(format!("{}: {room} uses {used}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "a room uses only rooms on lower floors:\n{}", wrong.join("\n"));
}

#[test]
fn the_picture_of_the_arrows_is_the_truth() {
    let mut arrows = BTreeMap::<String, BTreeSet<String>>::new();
    for file in rust_files("src") {
        let Some(room) = room_of(&file) else { continue };
        let used = rooms_used(&fs::read_to_string(&file).unwrap());
        arrows.entry(room.clone()).or_default().extend(used.into_iter().filter(|r| *r != room));
    }
    let picture = fs::read_to_string("ARCHITECTURE.md").unwrap();
    for (room, used) in arrows {
        let used = used.into_iter().collect::<Vec<_>>().join(" ");
        let line = format!("{room:<9} → {}", if used.is_empty() { "nothing" } else { &used });
        assert!(
            picture.lines().any(|drawn| drawn == line),
            "ARCHITECTURE.md should have the line:\n{line}"
        );
    }
}

#[test]
fn every_file_says_what_it_is_for() {
    let silent = ["src", "tests", "examples"].into_iter().flat_map(rust_files);
    let silent = silent.filter(|file| !fs::read_to_string(file).unwrap().starts_with("//!"));
    let silent = silent.collect::<Vec<_>>();
    assert!(
        silent.is_empty(),
        "the first line of a file is //! and says what it is for: {silent:?}"
    );
}

#[test]
fn no_file_holds_two_rooms() {
    let long = rust_files("src").into_iter().filter_map(|file| {
        let lines = fs::read_to_string(&file).unwrap().lines().count();
        (lines > 600).then(|| format!("{} has {lines} lines", file.display()))
    });
    let long = long.collect::<Vec<_>>();
    assert!(long.is_empty(), "split it: {long:?}");
}

#[test]
fn the_features_are_told_apart_in_few_places() {
    let allowed = ["src/lib.rs", "src/store/mod.rs"];
    let wrong = rust_files("src").into_iter().filter(|file| {
        let text = fs::read_to_string(file).unwrap();
        !allowed.iter().any(|path| file.ends_with(path))
            && (text.contains("cfg(feature") || text.contains("cfg(any(feature"))
    });
    let wrong = wrong.collect::<Vec<_>>();
    assert!(wrong.is_empty(), "cfg(feature) belongs into lib.rs and store/mod.rs: {wrong:?}");
}

#[test]
fn a_todo_names_its_issue() {
    for file in rust_files("src") {
        let text = fs::read_to_string(&file).unwrap();
        let bare = text.lines().find(|line| line.contains("TODO") && !line.contains("TODO(#"));
        assert_eq!(bare, None, "{}", file.display());
    }
}

/// The rooms that a file names as `crate::room`.
fn rooms_used(text: &str) -> BTreeSet<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code = code.collect::<Vec<_>>().join("\n");
    let mut used = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        // `use crate::{a, b::c}` is not written here, so one name follows.
        let room = rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_');
        let room = room.collect::<String>();
        if FLOORS.iter().any(|rooms| rooms.contains(&room.as_str())) {
            used.insert(room);
        } else {
            assert!(!rest.starts_with('{'), "name one room a line: use crate::room::…");
        }
    }
    used
}

fn room_of(file: &Path) -> Option<String> {
    let inside = file.strip_prefix("src").ok()?;
    let first = inside.components().next()?.as_os_str().to_str()?;
    let room = first.trim_end_matches(".rs");
    (!matches!(room, "lib" | "main")).then(|| room.to_owned())
}

fn floor(room: &str) -> usize {
    let found = FLOORS.iter().position(|rooms| rooms.contains(&room));
    found.unwrap_or_else(|| panic!("{room} stands on no floor: add it to FLOORS"))
}

fn rust_files(folder: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![PathBuf::from(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}
