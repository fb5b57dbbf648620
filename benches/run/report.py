"""What was found, for people: a table on the terminal, and a summary in Markdown with plots beside it."""

from pathlib import Path

import plots
from figures import Found
from plan import NAMES, PEER_NAMES, STORES

PEER_COLUMNS = (
    ("enqueue-1", "per_second", "enqueue, 1 producer, /s"),
    ("enqueue-64", "per_second", "64 producers, /s"),
    ("bulk-1", "per_second", "bulk of 1,000, /s"),
    ("drain", "handled_per_second", "drain, no-op handler, /s"),
    ("latency", "p50_ms", "latency at 200/s, p50, ms"),
    ("latency", "p99_ms", "p99, ms"),
)
QUICK = "A quick run: it shows that everything runs. Its figures say nothing, so they are held to no target."
MILLIS, MICROS, MEGABYTES = "ms", "µs", "MB"


def text(result: dict) -> str:
    found = Found(result)
    short = [required(result), beside_peers(found), missing(result)]
    parts = [columns(table) for table in short if table.rows]
    parts += [f"note: {note}" for note in all_notes(result)]
    parts.append(standing(result))
    return "\n\n".join(part for part in parts if part)


def write(result: dict, out: Path) -> list[Path]:
    """The summary and the plots, beside the JSON file; returns what was written."""
    written = []
    for name, drawing in plots.all_of(result).items():
        path = out.parent / f"{name}.svg"
        path.write_text(drawing)
        written.append(path)
    summary = out.with_suffix(".md")
    summary.write_text(markdown(result, out.name, [path.name for path in written]))
    return [summary, *written]


def brief(figures: dict) -> str:
    """A measurement in a few words, for the progress."""
    for word in ("failed", "skipped"):
        if word in figures:
            return f"{word}: {figures[word]}"
    known = ("per_second", "enqueue_per_second", "drain_per_second", "p50_ms", "p99_ms", "resident_mb")
    return ", ".join(f"{label_of(key)}{number(key, figures[key])}{unit(key)}" for key in known if key in figures)


# --- the tables, as rows of cells ------------------------------------------------------------------------------------


class Table:
    def __init__(self, title: str, head: list[str], rows: list[list[str]], right: set[int]) -> None:
        self.title, self.head, self.rows, self.right = title, head, rows, right


def required(result: dict) -> Table:
    head = ["", "what", "median (min–max)", "compared with", "its median", "ratio (min–max)", "target", ""]
    rows = []
    for one in result["requirements"]:
        if one["figure"] is None and one["group"] not in {group["key"] for group in result["groups"]}:
            continue
        rows.append(
            [
                one["item"],
                one["text"],
                shown(one["unit"], one["figure"]) if one["figure"] else "not measured",
                one["against"] or "",
                number(one["unit"], one["ceiling"]["median"]) + unit(one["unit"]) if one["ceiling"] else "",
                ratio(one["ratio"]) if one["ratio"] else "",
                target(one),
                verdict(one),
            ]
        )
    return Table("What must be shown", head, rows, {2, 4, 5})


def target(one: dict) -> str:
    if one["target"] is None:
        return ""
    if one["figure"] and one["against"] is None:
        return f"{one['sense']} {number(one['unit'], one['target'])}{unit(one['unit'])}"
    also = f", or {number(one['unit'], one['or_figure'])}{unit(one['unit'])}" if one["or_figure"] else ""
    return f"{one['sense']} {one['target']:.2f}{also}"


def verdict(one: dict) -> str:
    if one["figure"] is None or (one["against"] and one["ratio"] is None):
        return "not measured"
    return {True: "met", False: "MISSED", None: ""}[one["met"]]


def beside_peers(found: Found) -> Table:
    names = list(dict.fromkeys(one["key"] for group, _, _ in PEER_COLUMNS for one in found.all(group, "peer")))
    rows = []
    for key in [*STORES, *names] if names else []:
        cells = [peer_cell(found, group, key, figure) for group, figure, _ in PEER_COLUMNS]
        version = next((run["version"] for group, _, _ in PEER_COLUMNS for run in runs_of(found, group, key) if "version" in run), "")
        rows.append([f"Pumphouse, {NAMES[key]}" if key in NAMES else f"{PEER_NAMES.get(key, key)} {version}".strip(), *cells])
    head = ["", *(title for _, _, title in PEER_COLUMNS)]
    return Table("Beside what people use today", head, rows, set(range(1, len(head))))


def peer_cell(found: Found, group: str, key: str, figure: str) -> str:
    spread = found.spread(group, key, figure) or found.spread(group, key, figure.removeprefix("handled_"))
    return number(figure, spread["median"]) if spread else "–"


def runs_of(found: Found, group: str, key: str) -> list[dict]:
    series = found.series(group, key)
    return series["runs"] if series else []


def everything(found: Found, group: dict) -> Table:
    rows = []
    for one in group["series"]:
        label = one["label"]
        for figure in figures_of(one):
            spread = found.spread(group["key"], one["key"], figure)
            rows.append([label, name_of(figure), shown(figure, spread), str(spread["runs"]), f"`{one['how']}`" if label else ""])
            label = ""
    return Table(group["title"], ["what", "figure", "median (min–max)", "runs", "measured with"], rows, {2, 3})


def all_notes(result: dict) -> list[str]:
    """What the programs said that a reader must know."""
    runs = (run for group in result["groups"] for one in group["series"] for run in one["runs"])
    notes = list(dict.fromkeys(note for run in runs for note in run.get("notes", [])))
    if result.get("programs_changed"):
        notes.append("a measured program was replaced while it was measured, so nothing here compares")
    return notes


def figures_of(one: dict) -> list[str]:
    """Those that were measured, in the order in which they were told."""
    keys = dict.fromkeys(key for run in one["runs"] for key, value in run.items() if isinstance(value, (int, float)))
    return [key for key in keys if key in FIGURES]


def missing(result: dict) -> Table:
    rows = []
    for group in result["groups"]:
        for one in group["series"]:
            bad = [run for run in one["runs"] if "failed" in run or "skipped" in run]
            if bad:
                why = bad[-1].get("failed") or bad[-1].get("skipped")
                rows.append([group["title"], one["label"], f"{len(bad)} of {len(one['runs'])}", why])
    chosen = {group["key"] for group in result["groups"]}
    left_out = [one["item"] for one in result["requirements"] if one["group"] not in chosen]
    for item in dict.fromkeys(left_out):
        rows.append([f"requirement {item}", f"{left_out.count(item)} of its figures", "all", "not chosen in this run"])
    return Table("What was not measured, and why", ["group", "what", "runs", "why"], rows, set())


# --- numbers ---------------------------------------------------------------------------------------------------------

FIGURES = {
    "per_second": ("", "rate", "/s"),
    "handled_per_second": ("handled ", "rate until the last was handled", "/s"),
    "enqueue_per_second": ("POST ", "POST", "/s"),
    "drain_per_second": ("drain ", "drain", "/s"),
    "enqueue_cpu_us": ("CPU ", "the server's CPU a message, POST", " " + MICROS),
    "drain_cpu_us": ("CPU ", "the server's CPU a message, drain", " " + MICROS),
    "resident_mb": ("resident ", "resident memory", " " + MEGABYTES),
    "p50_ms": ("p50 ", "p50", " " + MILLIS),
    "p99_ms": ("p99 ", "p99", " " + MILLIS),
    "answered_p50_ms": ("answered ", "to the answer, p50", " " + MILLIS),
    "answered_p99_ms": ("answered ", "to the answer, p99", " " + MILLIS),
    "late_p99_ms": ("late ", "of it the generator's own lateness, p99", " " + MILLIS),
    "behind_ms": ("behind ", "last call to last handler", " " + MILLIS),
}


def label_of(figure: str) -> str:
    return FIGURES[figure][0]


def name_of(figure: str) -> str:
    return FIGURES[figure][1]


def unit(figure: str) -> str:
    return FIGURES[figure][2]


def number(figure: str, value: float) -> str:
    if figure.endswith("per_second"):
        return f"{value:,.0f}"
    return f"{value:.2f}" if value < 10 else f"{value:,.1f}"


def shown(figure: str, spread: dict) -> str:
    middle, low, high = (number(figure, spread[which]) for which in ("median", "min", "max"))
    return f"{middle}{unit(figure)} ({low}–{high})"


def ratio(spread: dict) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f}–{spread['max']:.2f})"


# --- text and Markdown -----------------------------------------------------------------------------------------------


def columns(table: Table) -> str:
    rows = [table.head, *table.rows]
    widths = [max(len(row[n]) for row in rows) for n in range(len(table.head))]
    lines = [table.title]
    for row in rows:
        cells = [cell.rjust(width) if n in table.right else cell.ljust(width) for n, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def standing(result: dict) -> str:
    """How many requirements are met, on one line."""
    if not result["complete"]:
        return "This run was cut: what follows is what it had measured until then."
    if result["quick"]:
        return QUICK
    held = [one for one in result["requirements"] if one["target"] is not None]
    met = sum(one["met"] is True for one in held)
    missed = sum(one["met"] is False for one in held)
    return f"{len(held)} targets: {met} met, {missed} missed, {len(held) - met - missed} not measured."


def markdown(result: dict, source: str, drawings: list[str]) -> str:
    machine, versions = result["machine"], result["versions"]
    commit = (result["source"]["commit"] or "unknown")[:12] + (" with changes" if result["source"]["changed"] else "")
    built = "" if result["source"]["built_here"] else "; the measured program was built before, perhaps from another commit"
    parts = [
        f"# Measured on {result['started'][:10]}",
        "\n".join(
            [
                f"Made from [{source}]({source}) by `scripts/bench`; [how to read it](../performance.md).",
                "",
                f"* {machine['cpus']} CPUs ({machine['cpu']}), {machine['memory_mb']:,} MB, Linux {machine['kernel']}, {machine['file_system']};",
                f"  the load runs on the same machine. {stolen(machine)}",
                f"* The disk synced 4 kB {syncs(result['disk']['before'])} times a second before and {syncs(result['disk']['after'])} after.",
                f"* Pumphouse {versions['pumphouse']}, commit {commit}{built}; PostgreSQL {versions['postgres'] or 'not installed'}; "
                f"{versions['rustc'] or 'no rustc here'}.",
                f"* {result['runs']} rounds; medians, and in brackets the lowest and the highest. Ratios are of each round.",
            ]
        ),
    ]
    parts.append(f"**{standing(result)}**")
    parts += [f"![{DRAWINGS[Path(name).stem]}]({name})" for name in drawings]
    found = Found(result)
    short = [required(result), beside_peers(found), missing(result)]
    parts += [f"## {table.title}\n\n{markdown_table(table)}" for table in short if table.rows]
    if notes := all_notes(result):
        parts.append("## Notes\n\n" + "\n".join(f"* {note}" for note in notes))
    parts.append("## Everything that was measured")
    for group in result["groups"]:
        disk = ", ".join(f"{rate:,}" for rate in group["syncs_per_second"])
        rounds = f"Disk syncs a second before each round: {disk}."
        parts.append(f"### {group['title']}\n\n{rounds}\n\n{markdown_table(everything(found, group))}")
    return "\n\n".join(parts) + "\n"


DRAWINGS = {
    "enqueue": "Messages taken a second, each synced before the answer",
    "drain": "Messages drained a second into a handler that does nothing",
    "latency": "From the call to the handler at 200 messages a second",
}


def stolen(machine: dict) -> str:
    share = machine.get("stolen")
    return f"The hypervisor took {share:.1%} of its time." if share else ""


def syncs(disk: dict | None) -> str:
    return "(not measured)" if not disk else f"{disk['syncs_per_second']['median']:,}"


def markdown_table(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    marks = ["---:" if n in table.right else "---" for n in range(len(table.head))]
    rows = [[bold(cell) for cell in row] for row in table.rows]
    return "\n".join([line(table.head), "| " + " | ".join(marks) + " |", *map(line, rows)])


def bold(cell: str) -> str:
    return f"**{cell.lower()}**" if cell == "MISSED" else cell
