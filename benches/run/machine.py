"""What a figure was measured on: the machine, its disk at that moment, the programs."""

import hashlib
import os
import platform
import re
import statistics
import subprocess
import tomllib
from pathlib import Path

from bench import Bench, peers

PROBES = 5
LIBRARIES = ("axum", "hyper", "hyper-util", "tokio", "sqlx", "rusqlite", "libsqlite3-sys", "tokio-postgres")


def disk(directory: Path) -> dict:
    """How often 4 kB were synced in a second, over and over in a file that does not grow."""
    rates = [peers.syncs_per_second(directory) for _ in range(PROBES)]
    return {"syncs_per_second": {"median": round(statistics.median(rates)), "min": min(rates), "max": max(rates)}}


def facts(directory: Path) -> dict:
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": model.group(1) if model else platform.machine(),
        "memory_mb": int(memory.group(1)) // 1024 if memory else None,
        "kernel": platform.release(),
        "file_system": output(["stat", "--file-system", "--format=%T", directory]),
        "load_before": round(os.getloadavg()[0], 2),
    }


def source(root: Path) -> dict:
    commit = output(["git", "-C", root, "rev-parse", "HEAD"]) or None
    changed = output(["git", "-C", root, "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "changed": bool(changed)}


def versions(bench: Bench, root: Path) -> dict:
    found = {
        "pumphouse": output([bench.pumphouse, "--version"]).removeprefix("pumphouse "),
        "bare": output([bench.bare, "--version"]).removeprefix("bare "),
        "rustc": output(["rustc", "--version"]) or None,
        "python": platform.python_version(),
    }
    try:
        postgres = output([peers.postgres_programs() / "postgres", "--version"])
        found["postgres"] = postgres.removeprefix("postgres (PostgreSQL) ")
    except peers.Unavailable:
        found["postgres"] = None
    return found | {"locked": locked(root / "Cargo.lock"), "bare_locked": locked(root / "benches" / "bare" / "Cargo.lock")}


def programs(bench: Bench) -> dict:
    """Which files were measured: a version does not tell two builds apart."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (bench.pumphouse, bench.bare)}


def locked(path: Path) -> dict:
    packages = tomllib.loads(path.read_text())["package"]
    return {one["name"]: one["version"] for one in packages if one["name"] in LIBRARIES}


def stolen() -> tuple[int, int]:
    """Ticks that a hypervisor gave to others, and all ticks."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return fields[7], sum(fields)


def stolen_since(before: tuple[int, int]) -> float | None:
    (stole, all_ticks), (stole_before, all_before) = stolen(), before
    return round((stole - stole_before) / (all_ticks - all_before), 4) if all_ticks > all_before else None


def output(command: list) -> str:
    try:
        return subprocess.run([str(part) for part in command], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
