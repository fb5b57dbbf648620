"""The run as a whole: what was asked for, the programs, the rounds, what is written."""

import argparse
import contextlib
import datetime
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import machine
import plan
import report
import requirements
from bench import ROOT, Bench, Failed, peers, say

FORMAT = 1
"""Of the JSON file; higher when an old reader would misread it."""

OUT = ROOT / "docs" / "benchmarks"
SCRATCH = ROOT / "target" / "bench"

FREE_BYTES_MIN = 6 << 30
"""A million messages stand in each store at once, with their logs."""
FAILURES_MAX = 2
"""What has failed so often is not tried again: each time may cost its whole patience."""
MISHAPS = (Failed, OSError, http.client.HTTPException, KeyError, ValueError)
"""What can go wrong with one measurement: its program, its sockets, or what it printed."""


def main() -> int:
    args = arguments()
    if args.report:
        return report_again(args.report)
    listen_to_signals()
    try:
        return measure(args)
    except KeyboardInterrupt:
        say("\ninterrupted: everything that was started is stopped, nothing is left in the directory")
        return 130
    except Failed as why:
        say(f"error: {why}")
        return 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Runs every measurement of Pumphouse, each beside its ceiling and its peers in the same rounds.",
        epilog="A whole run takes one to two hours; --only enqueue,drain minutes; --quick tries whether it works at all.",
    )
    parser.add_argument("--runs", type=positive, help="rounds of each group, whose median counts (default: 5; 2 with --quick)")
    parser.add_argument("--only", type=plan.chosen, help=f"of {','.join(plan.TOPICS)}, separated by commas (default: all)")
    parser.add_argument("--peer", action="append", choices=list(peers.PEERS), help="only this peer (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="sizes that show whether everything runs; the figures say nothing")
    parser.add_argument("--seconds", type=float, help="how long each load lasts (default: 5; 0.5 with --quick)")
    parser.add_argument("--messages", type=positive, help="how many messages are drained (default: 200,000; 5,000 with --quick)")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where databases stand: the disk that is measured (default: /var/tmp)")
    parser.add_argument("--out", type=Path, help="the JSON file; the summary and the plots stand beside it (default: docs/benchmarks/DATE.json)")
    parser.add_argument("--pumphouse", type=Path, help="a built pumphouse (default: built here, release)")
    parser.add_argument("--bare", type=Path, help="a built bare (default: built here, release)")
    parser.add_argument("--install", action="store_true", help="install the peers that are missing first (Debian packages need root)")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="measure nothing: write the summary and the plots of this file again")
    args = parser.parse_args()
    if args.seconds is not None and not 0.1 <= args.seconds <= 600:
        parser.error("--seconds is from 0.1 to 600")
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def listen_to_signals() -> None:
    """The first one ends the run in good order. Those that follow change nothing: cleaning up has limits of its own."""

    def interrupted(*_) -> None:
        for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, interrupted)


def measure(args: argparse.Namespace) -> int:
    peers.refuse_a_disk_that_never_syncs(args.dir)
    sizes = plan.sizes(args.quick, args.seconds, args.messages)
    runs = args.runs or (2 if args.quick else 5)
    check_room(args)
    topics = args.only or list(plan.TOPICS)
    if args.install and "peers" in topics:
        run([sys.executable, ROOT / "benches" / "peers" / "run.py", "install"])
    with contextlib.ExitStack() as running:
        bench = Bench(running, args.dir, sizes, program(args.pumphouse, "pumphouse"), program(args.bare, "bare"))
        groups = plan.groups(bench, topics, args.peer)
        result = head(args, bench, runs, topics)
        result["disk"]["before"] = machine.disk(bench.directory)
        steal = machine.stolen()
        steps = Steps(groups, runs)
        for group in groups:
            result["groups"].append(rounds(bench, group, runs, steps))
            # What was measured is not lost when a later step is cut.
            write_json(SCRATCH / "last.json", result)
        result["disk"]["after"] = machine.disk(bench.directory)
        result["machine"]["stolen"] = machine.stolen_since(steal)
        result["programs_changed"] = machine.programs(bench) != result["programs"]
    result["finished"] = now()
    result["complete"] = True
    result["requirements"] = requirements.judge(result)
    print(report.text(result))
    out = args.out or default_out(args.quick)
    write_json(out, result)
    for path in [out, *report.write(result, out)]:
        say(f"wrote {shown(path)}")
    return 0


def check_room(args: argparse.Namespace) -> None:
    free = shutil.disk_usage(args.dir).free
    if not args.quick and free < FREE_BYTES_MIN:
        raise Failed(f"{args.dir} has {free >> 20} MiB free, and a run needs {FREE_BYTES_MIN >> 20}")
    busy = os.getloadavg()[0]
    if busy > 1:
        say(f"note: this machine is busy (load {busy:.1f}); ratios suffer less than figures, but they suffer")


def head(args: argparse.Namespace, bench: Bench, runs: int, topics: list[str]) -> dict:
    return {
        "format": FORMAT,
        "started": now(),
        "finished": None,
        "complete": False,
        "quick": args.quick,
        "runs": runs,
        "topics": topics,
        "sizes": bench.sizes.as_json(),
        "source": machine.source(ROOT) | {"built_here": args.pumphouse is None},
        "versions": machine.versions(bench, ROOT),
        "programs": machine.programs(bench),
        "machine": machine.facts(bench.directory),
        "disk": {"before": None, "after": None},
        "groups": [],
    }


def rounds(bench: Bench, group: plan.Group, runs: int, steps: "Steps") -> dict:
    """A B C, A B C, …: what is compared is measured within the same minutes, never all of one and then all of the other."""
    found = {series.key: [] for series in group.series}
    syncs = []
    with contextlib.ExitStack() as open_for_all_rounds:
        state, broken = None, None
        if group.open:
            steps.note(f"{group.key}: {group.opening}")
            try:
                state = group.open(open_for_all_rounds)
            except MISHAPS as why:
                broken = reason(bench, why)
        for number in range(1, runs + 1):
            syncs.append(peers.syncs_per_second(bench.directory))
            for series in group.series:
                steps.begin(f"{group.key}, round {number} of {runs}: {series.label}", series.seconds)
                figures = {"failed": broken} if broken else one(bench, series, state, found[series.key])
                found[series.key].append(figures)
                steps.end(figures)
    return {
        "key": group.key,
        "title": group.title,
        "syncs_per_second": syncs,
        "series": [
            {"key": series.key, "label": series.label, "kind": series.kind, "how": series.how, "runs": found[series.key]}
            for series in group.series
        ],
    }


def one(bench: Bench, series: plan.Series, state, before: list[dict]) -> dict:
    """One measurement; what stands in its way is a finding, not the end of the run."""
    skipped = [run for run in before if "skipped" in run]
    if skipped:
        return skipped[0]
    failed = [run for run in before if "failed" in run]
    if len(failed) >= FAILURES_MAX:
        return {"failed": f"not tried again after it failed {FAILURES_MAX} times; first: {failed[0]['failed']}"}
    try:
        return series.measure(state)
    except MISHAPS as why:
        return {"failed": reason(bench, why)}


def reason(bench: Bench, why: Exception) -> str:
    text = str(why) if isinstance(why, Failed) else f"{type(why).__name__}: {why}"
    return bench.without_paths(text)


class Steps:
    """Tells on stderr which step it is, how long it took, and how long the rest will take."""

    def __init__(self, groups: list[plan.Group], runs: int) -> None:
        self.count = sum(len(group.series) for group in groups) * runs
        self.expected_left = sum(series.seconds for group in groups for series in group.series) * runs
        self.expected_done = 0.0
        self.number = 0
        self.began = time.monotonic()
        say(f"{self.count} steps, {span(self.expected_left)} or so")

    def note(self, text: str) -> None:
        say(f"{'':11}{text}")

    def begin(self, what: str, expected: float) -> None:
        self.number += 1
        self.step_began, self.step_expected = time.monotonic(), expected
        width = len(str(self.count))
        print(f"[{self.number:{width}}/{self.count}] {what} … ", end="", file=sys.stderr, flush=True)

    def end(self, figures: dict) -> None:
        took = time.monotonic() - self.step_began
        self.expected_done += self.step_expected
        self.expected_left -= self.step_expected
        factor = (time.monotonic() - self.began) / self.expected_done
        left = span(max(0, self.expected_left) * factor)
        say(f"{report.brief(figures)} ({took:.1f} s; {left} left)")


def span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


# --- programs and files ----------------------------------------------------------------------------------------------


def program(named: Path | None, name: str) -> Path:
    if named:
        if not os.access(named, os.X_OK):
            raise Failed(f"{named} is no program")
        return named.resolve()
    home = ROOT if name == "pumphouse" else ROOT / "benches" / "bare"
    say(f"building {name}")
    build = ["cargo", "build", "--release", "--locked", "--bin", name]
    run([*build, "--manifest-path", home / "Cargo.toml", "--target-dir", home / "target"])
    return home / "target" / "release" / name


def run(command: list) -> None:
    # Stdout is for the table.
    done = subprocess.run([str(part) for part in command], stdout=sys.stderr)
    if done.returncode != 0:
        raise Failed(f"{Path(str(command[0])).name} ended with {done.returncode}")


def report_again(path: Path) -> int:
    result = json.loads(path.read_text())
    if result["format"] != FORMAT:
        say(f"error: {path} has format {result['format']}, and this program reads {FORMAT}")
        return 1
    result["requirements"] = requirements.judge(result)
    print(report.text(result))
    for written in report.write(result, path):
        say(f"wrote {shown(written)}")
    return 0


def default_out(quick: bool) -> Path:
    """A quick run stays out of the documentation."""
    return (SCRATCH / "quick" if quick else OUT) / f"{datetime.date.today().isoformat()}.json"


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)


def shown(path: Path) -> Path:
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
