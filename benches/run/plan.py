"""What is measured: groups of series, each group in rounds. Whatever is compared stands in one group."""

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, Callable

from bench import BATCH, ROOT, STEP_SECONDS_MAX, Bench, Failed, arrived, delivered, last_line, peers, stop

TOPICS = ("enqueue", "bulk", "drain", "end-to-end", "latency", "depth", "peers")

PAYLOAD = 256
CONNECTIONS = 64
BULK_CONNECTIONS = 4
"""Batches of 1,000 fill one core of the store with few senders."""
DRAIN_BATCH = 1000
"""The pump's largest claim, `policy::LEASE_BATCH_MAX`: the bare drain claims as many at once."""
SINK_SECONDS_MAX = 20
RATE = 200
PAUSE_MS = 5
"""The pace of 200 a second, for what latency is compared with."""

STORES = ("sqlite", "postgres")
NAMES = {"sqlite": "SQLite", "postgres": "Postgres"}
POSTGRES_PEERS = ("graphile-worker", "graphile-worker-rs", "pg-boss", "procrastinate", "apalis-postgres")
REDIS_PEERS = ("bullmq",)
PEER_NAMES = {
    "rabbitmq": "RabbitMQ",
    "bullmq": "BullMQ, Redis",
    "nats": "NATS JetStream",
    "beanstalkd": "beanstalkd",
    "graphile-worker": "graphile-worker (npm)",
    "graphile-worker-rs": "graphile_worker (Rust)",
    "pg-boss": "pg-boss",
    "procrastinate": "procrastinate",
    "apalis-sqlite": "apalis, SQLite",
    "apalis-postgres": "apalis, Postgres",
}
PEERS_WITH_ALL_MESSAGES = ("graphile-worker", "graphile-worker-rs", "pg-boss", "apalis-postgres")
"""Those that drain as many messages as the pump does; the others take fewer, or the run would take hours."""


@dataclass
class Sizes:
    quick: bool
    seconds: float
    drained: int
    drained_over_http: int
    latency_seconds: float
    commits: int
    backlogs: tuple[int, int]
    backlog_seconds: float
    peer_seconds: int
    peer_jobs: int | None

    def as_json(self) -> dict:
        return asdict(self)


def sizes(quick: bool, seconds: float | None, messages: int | None) -> Sizes:
    if quick:
        seconds, messages = seconds or 0.5, messages or 5_000
        latency_seconds, commits = max(1.0, seconds), 100
        backlogs, peer_jobs = (1_000, 20_000), 2_000
    else:
        seconds, messages = seconds or 5.0, messages or 200_000
        latency_seconds, commits = max(10.0, 2 * seconds), 1000
        backlogs, peer_jobs = (10_000, 1_000_000), None
    return Sizes(
        quick=quick,
        seconds=seconds,
        drained=messages,
        drained_over_http=max(1, messages // 2),
        latency_seconds=latency_seconds,
        commits=commits,
        backlogs=backlogs,
        backlog_seconds=0.3 if quick else 0.5,
        peer_seconds=max(1, round(seconds)),
        peer_jobs=peer_jobs,
    )


@dataclass
class Series:
    """One thing that is measured once a round. `seconds` is a guess, for the progress only."""

    key: str
    label: str
    kind: str  # own, bare, or peer
    how: str
    seconds: float
    measure: Callable[[Any], dict]


@dataclass
class Group:
    key: str
    title: str
    series: list[Series]
    # What stands for all rounds, as a backlog that takes long to fill.
    open: Callable[[contextlib.ExitStack], Any] | None = None
    opening: str = ""


def chosen(text: str) -> list[str]:
    topics = [topic.strip() for topic in text.split(",") if topic.strip()]
    unknown = [topic for topic in topics if topic not in TOPICS]
    if unknown or not topics:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'} is not of {', '.join(TOPICS)}")
    return topics


def groups(bench: Bench, topics: list[str], only_peers: list[str] | None) -> list[Group]:
    """With `peers`, those stand in the rounds of what they are compared with; alone, only the pump stands beside them."""
    with_peers = "peers" in topics
    names = (only_peers or list(peers.PEERS)) if with_peers else []

    def compared(topic: str, key: str, title: str, own: list[Series], bare: list[Series], measure=None, producers=None):
        if topic not in topics and not (names and measure):
            return []
        ceilings = bare if topic in topics else []
        others = [peer(bench, name, measure, producers) for name in names] if measure else []
        return [Group(key, title, alternating(own, ceilings) + others)]

    found = []
    for connections in (1, 16, CONNECTIONS):
        stores = STORES if connections > 1 or with_peers else ("sqlite",)
        found += compared(
            "enqueue",
            f"enqueue-{connections}",
            f"Single messages by POST, {connections} connection{'s' if connections > 1 else ''}",
            [own_enqueue(bench, store, connections) for store in stores],
            [bare_enqueue(bench, store, connections) for store in stores],
            "enqueue" if connections in (1, CONNECTIONS) else None,
            connections,
        )
    # A peer's bulk is one producer's; the targets are held with a few.
    found += compared(
        "bulk",
        "bulk",
        "Batches of 1,000 by POST",
        [own_bulk(bench, store, BULK_CONNECTIONS) for store in STORES],
        [bare_bulk(bench, store) for store in STORES],
    )
    if with_peers:
        own = [own_bulk(bench, store, 1) for store in STORES]
        found += compared("peers", "bulk-1", "Batches of 1,000, one producer", own, [], "bulk", 1)
    found += compared(
        "drain",
        "drain",
        "Drain of a backlog into a handler that does nothing",
        [own_drain(bench, store) for store in STORES],
        [bare_drain(bench, store) for store in STORES],
        "drain",
    )
    if "end-to-end" in topics:
        own = [own_end_to_end(bench, store) for store in STORES]
        bare = [bare_end_to_end(bench, store) for store in STORES]
        found.append(Group("end-to-end", "POST to HTTP handler to settled, 64 connections", alternating(own, bare)))
        own = [drain(bench, store) for drain in (drain_over_http, drain_to_bare_sink) for store in STORES]
        bare = [bare_client(bench, how) for how in ("raw", "pool")]
        found.append(Group("drain-http", "Drain of a backlog to a trivial HTTP handler, 64 at once", alternating(own, bare)))
    found += compared(
        "latency",
        "latency",
        f"From POST to handler at {RATE}/s, open loop",
        [own_latency(bench, store) for store in STORES],
        [bare_commit(bench, store) for store in STORES] + [bare_request(bench)],
        "latency",
    )
    if "depth" in topics:
        found += [depth(bench, store) for store in STORES]
    return found


def alternating(own: list[Series], bare: list[Series]) -> list[Series]:
    """Each of ours next to its ceiling, so that both see the same minute."""
    most = max(len(own), len(bare))
    return [series for n in range(most) for series in (*own[n : n + 1], *bare[n : n + 1])]


# --- single messages and batches -------------------------------------------------------------------------------------


@contextlib.contextmanager
def place(bench: Bench, store: str):
    """What `pumphouse bench` is told of a new database."""
    if store == "sqlite":
        with bench.fresh() as directory:
            yield ["--dir", directory]
    else:
        with bench.database() as url:
            yield ["--database", url]


@contextlib.contextmanager
def bare_place(bench: Bench, store: str):
    """What a bare program is told of a new database."""
    if store == "sqlite":
        with bench.fresh() as directory:
            yield ["--file", directory / "bare.db"]
    else:
        with bench.database() as url:
            yield ["--url", url]


def load(bench: Bench, connections: int) -> list:
    return ["--connections", connections, "--seconds", bench.sizes.seconds, "--payload", PAYLOAD]


def sent(found: dict) -> dict:
    return {"per_second": found["messages_per_second"], "p50_ms": found["request_p50_ms"], "p99_ms": found["request_p99_ms"]} | notes(found)


def notes(found: dict) -> dict:
    return {"notes": found["notes"]} if "notes" in found else {}


def own_enqueue(bench: Bench, store: str, connections: int) -> Series:
    def measure(_) -> dict:
        with place(bench, store) as where:
            return sent(bench.own("enqueue", *where, *load(bench, connections)))

    how = f"pumphouse bench enqueue --connections {connections}"
    return Series(store, f"Pumphouse, {NAMES[store]}", "own", how, bench.sizes.seconds + 1.5, measure)


def bare_enqueue(bench: Bench, store: str, connections: int) -> Series:
    def measure(_) -> dict:
        with bare_place(bench, store) as where, bench.serving(f"{store}-enqueue", *where) as address:
            return sent(bench.own("enqueue", "--url", f"http://{address}", "--bare", *load(bench, connections)))

    how = f"bare {store}-enqueue, pumphouse bench enqueue --bare --connections {connections}"
    return Series(f"bare-{store}", f"bare group commit, {NAMES[store]}", "bare", how, bench.sizes.seconds + 1, measure)


def own_bulk(bench: Bench, store: str, connections: int) -> Series:
    def measure(_) -> dict:
        with place(bench, store) as where:
            return sent(bench.own("enqueue", *where, "--batch", BATCH, *load(bench, connections)))

    how = f"pumphouse bench enqueue --batch {BATCH} --connections {connections}"
    return Series(store, f"Pumphouse, {NAMES[store]}", "own", how, bench.sizes.seconds + 3, measure)


def bare_bulk(bench: Bench, store: str) -> Series:
    def measure(_) -> dict:
        with bare_place(bench, store) as where:
            return inserted(bench.bare_json(f"{store}-insert", *where, "--batch", BATCH, "--seconds", bench.sizes.seconds))

    how = f"bare {store}-insert --batch {BATCH}"
    return Series(f"bare-{store}", f"bare insert, {NAMES[store]}", "bare", how, bench.sizes.seconds + 1, measure)


def inserted(found: dict) -> dict:
    return {key: found[key] for key in ("per_second", "p50_ms", "p99_ms") if key in found}


# --- drain -----------------------------------------------------------------------------------------------------------


def drained(found: dict) -> dict:
    """`per_second` counts until nothing is left to settle, as the bare drain does; `handled_per_second` until the last
    message was handled, as the peers' drains do."""
    if found["delivered"] < found["sent"]:
        raise Failed(f"{found['delivered']} of {found['sent']} messages were delivered")
    figures = {"per_second": found["settled_per_second"], "handled_per_second": found["messages_per_second"]}
    return figures | {"repeats": found["repeats"]} | notes(found)


def own_drain(bench: Bench, store: str) -> Series:
    def measure(_) -> dict:
        with place(bench, store) as where:
            options = ["--handler", "service", "--messages", bench.sizes.drained, "--payload", PAYLOAD]
            return drained(bench.own("drain", *where, *options))

    how = f"pumphouse bench drain --handler service --messages {bench.sizes.drained}"
    return Series(store, f"Pumphouse, {NAMES[store]}", "own", how, bench.sizes.drained / 25_000 + 2, measure)


def bare_drain(bench: Bench, store: str) -> Series:
    def measure(_) -> dict:
        with bare_place(bench, store) as where:
            options = ["--batch", DRAIN_BATCH, "--jobs", bench.sizes.drained, "--payload", PAYLOAD]
            return inserted(bench.bare_json(f"{store}-drain", *where, *options))

    how = f"bare {store}-drain --batch {DRAIN_BATCH} --jobs {bench.sizes.drained}"
    return Series(f"bare-{store}", f"bare claim + delete, {NAMES[store]}", "bare", how, bench.sizes.drained / 40_000 + 1, measure)


def drain_over_http(bench: Bench, store: str) -> Series:
    def measure(_) -> dict:
        with place(bench, store) as where:
            options = ["--handler", "http", "--concurrency", CONNECTIONS, "--messages", bench.sizes.drained_over_http]
            return drained(bench.own("drain", *where, *options, "--payload", PAYLOAD))

    how = f"pumphouse bench drain --handler http --concurrency {CONNECTIONS} --messages {bench.sizes.drained_over_http}"
    return Series(store, f"Pumphouse, {NAMES[store]}", "own", how, bench.sizes.drained_over_http / 10_000 + 3, measure)


def drain_to_bare_sink(bench: Bench, store: str) -> Series:
    """The same drain to the very sink that the bare client sends to."""

    def measure(_) -> dict:
        messages = bench.sizes.drained_over_http
        with contextlib.ExitStack() as running:
            sink = running.enter_context(bench.serving("sink"))
            pump = running.enter_context(new_pump(bench, store))
            pump.make_queue(f"http://{sink}/", CONNECTIONS)
            pump.fill(messages, PAYLOAD)
            began = time.monotonic()
            pump.start_queue()
            handled = arrived(sink, messages)
            while pump.left():
                if time.monotonic() - handled > 30:
                    raise Failed("not everything was settled within 30 seconds")
                time.sleep(0.005)
            settled = time.monotonic()
        return {"per_second": messages / (settled - began), "handled_per_second": messages / (handled - began)}

    how = f"pumphouse serve with {bench.sizes.drained_over_http} messages, concurrency {CONNECTIONS}, to bare sink"
    seconds = bench.sizes.drained_over_http / 10_000 + 3
    return Series(f"{store}-to-bare-sink", f"Pumphouse, {NAMES[store]}, to the bare sink", "own", how, seconds, measure)


@contextlib.contextmanager
def new_pump(bench: Bench, store: str):
    with contextlib.ExitStack() as running:
        directory = running.enter_context(bench.fresh())
        url = f"sqlite://{directory / 'pump.db'}"
        if store == "postgres":
            url = running.enter_context(bench.database())
        yield running.enter_context(bench.pump(url, directory))


def bare_client(bench: Bench, how_it_sends: str) -> Series:
    def measure(_) -> dict:
        with bench.serving("sink") as sink:
            options = ["--how", how_it_sends, "--threads", 2, "--payload", PAYLOAD]
            options += ["--connections", CONNECTIONS, "--seconds", bench.sizes.seconds]
            return inserted(bench.bare_json("client", "--url", f"http://{sink}/", *options))

    how = f"bare client --how {how_it_sends} --threads 2 --connections {CONNECTIONS}, to bare sink"
    label = {"raw": "bare client, a connection a task", "pool": "bare client, hyper-util's pool"}[how_it_sends]
    return Series(f"bare-client-{how_it_sends}", label, "bare", how, bench.sizes.seconds + 1, measure)


# --- end to end ------------------------------------------------------------------------------------------------------


def end_to_end(found: dict) -> dict:
    if found["delivered"] < found["sent"]:
        raise Failed(f"{found['delivered']} of {found['sent']} messages were delivered")
    figures = {"per_second": found["messages_per_second"], "p50_ms": found["delivered_p50_ms"], "p99_ms": found["delivered_p99_ms"]}
    return figures | {"repeats": found["repeats"]} | notes(found)


def own_end_to_end(bench: Bench, store: str) -> Series:
    def measure(_) -> dict:
        with place(bench, store) as where:
            return end_to_end(bench.own("end-to-end", *where, *load(bench, CONNECTIONS)))

    how = f"pumphouse bench end-to-end --connections {CONNECTIONS}"
    return Series(store, f"Pumphouse, {NAMES[store]}", "own", how, bench.sizes.seconds * 1.3 + 2, measure)


def bare_end_to_end(bench: Bench, store: str) -> Series:
    def measure(_) -> dict:
        port, sink_port = peers.free_port(), peers.free_port()
        with bare_place(bench, store) as where:
            chain = bare_chain(bench, store, where, port, sink_port)
            options = ["--url", f"http://127.0.0.1:{port}", "--bare", "--sink", f"127.0.0.1:{sink_port}"]
            return end_to_end(bench.own("end-to-end", *options, *load(bench, CONNECTIONS), beside=chain))

    how = f"bare chain-{store}, pumphouse bench end-to-end --bare --connections {CONNECTIONS}"
    return Series(f"bare-{store}", f"bare chain, {NAMES[store]}", "bare", how, bench.sizes.seconds + 2, measure)


@contextlib.contextmanager
def bare_chain(bench: Bench, store: str, where: list, port: int, sink_port: int):
    """The chain connects to its sink when it starts, so the sink, which the generator opens, comes first."""
    deadline = time.monotonic() + SINK_SECONDS_MAX
    while not listens(sink_port):
        if time.monotonic() > deadline:
            raise Failed("the generator's sink did not listen")
        time.sleep(0.01)
    options = ["--to", f"http://127.0.0.1:{sink_port}/", "--listen", f"127.0.0.1:{port}"]
    with bench.serving(f"chain-{store}", *where, *options):
        yield


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --- latency ---------------------------------------------------------------------------------------------------------


def own_latency(bench: Bench, store: str) -> Series:
    def measure(_) -> dict:
        with place(bench, store) as where:
            options = ["--rate", RATE, "--seconds", bench.sizes.latency_seconds, "--payload", PAYLOAD]
            found = bench.own("latency", *where, *options)
        figures = {"p50_ms": found["delivered_p50_ms"], "p99_ms": found["delivered_p99_ms"]}
        figures |= {"answered_p50_ms": found["answered_p50_ms"], "answered_p99_ms": found["answered_p99_ms"]}
        return figures | {"late_p50_ms": found["late_p50_ms"], "late_p99_ms": found["late_p99_ms"]} | notes(found)

    how = f"pumphouse bench latency --rate {RATE}"
    return Series(store, f"Pumphouse, {NAMES[store]}", "own", how, bench.sizes.latency_seconds + 2, measure)


def bare_commit(bench: Bench, store: str) -> Series:
    def measure(_) -> dict:
        with bare_place(bench, store) as where:
            found = bench.bare_json("commit", *where, "--pause", PAUSE_MS, "--count", bench.sizes.commits)
        return {"p50_ms": found["p50_ms"], "p99_ms": found["p99_ms"]}

    how = f"bare commit --pause {PAUSE_MS} --count {bench.sizes.commits}"
    seconds = bench.sizes.commits * (PAUSE_MS + 1) / 1000 + 1
    return Series(f"bare-commit-{store}", f"one commit, {NAMES[store]}", "bare", how, seconds, measure)


def bare_request(bench: Bench) -> Series:
    def measure(_) -> dict:
        with bench.serving("echo") as echo:
            options = ["--connections", 1, "--pause", PAUSE_MS, "--payload", PAYLOAD, "--seconds", bench.sizes.seconds]
            # Echo answers every path but the root.
            found = bench.bare_json("client", "--url", f"http://{echo}/v1/queues/bench/messages", *options)
        return {"p50_ms": found["p50_ms"], "p99_ms": found["p99_ms"]}

    how = f"bare client --connections 1 --pause {PAUSE_MS}, to bare echo"
    return Series("bare-request", "one request", "bare", how, bench.sizes.seconds + 1, measure)


# --- a backlog -------------------------------------------------------------------------------------------------------


def depth(bench: Bench, store: str) -> Group:
    """Two servers, one with a small backlog and one with a large one, stand beside each other through all rounds; in each
    round as much is drained as was sent before, so that the backlogs stay what they are."""

    def open_both(running: contextlib.ExitStack) -> dict:
        sink = running.enter_context(bench.serving("sink"))
        pumps = {}
        for backlog in bench.sizes.backlogs:
            pump = running.enter_context(new_pump(bench, store))
            pump.make_queue(f"http://{sink}/", CONNECTIONS)
            pump.fill(backlog, PAYLOAD)
            pumps[backlog] = pump
        return {"sink": sink, "pumps": pumps}

    def at(backlog: int) -> Callable[[dict], dict]:
        return lambda both: cost_at(bench, both["pumps"][backlog], both["sink"], backlog)

    series = [
        Series(
            f"{store}-{name}",
            f"Pumphouse, {NAMES[store]}, {backlog:,} waiting",
            "own",
            f"pumphouse serve with {backlog} messages; pumphouse bench enqueue --bare, then as many drained to bare sink",
            bench.sizes.backlog_seconds + 4,
            at(backlog),
        )
        for name, backlog in zip(("small", "large"), bench.sizes.backlogs)
    ]
    opening = f"filling {' and '.join(f'{backlog:,}' for backlog in bench.sizes.backlogs)} messages"
    return Group(f"depth-{store}", f"Cost of a message at a backlog, {NAMES[store]}", series, open_both, opening)


def cost_at(bench: Bench, pump, sink: str, backlog: int) -> dict:
    missing = backlog - pump.ready()
    if missing > 0:
        pump.fill(missing, PAYLOAD)
    resident = pump.resident_mb()

    cpu = pump.cpu_seconds()
    options = ["--connections", CONNECTIONS, "--seconds", bench.sizes.backlog_seconds, "--warm-up", 0, "--payload", PAYLOAD]
    taken = bench.own("enqueue", "--url", pump.url, "--bare", *options)
    enqueue_cpu = pump.cpu_seconds() - cpu

    added = pump.ready() - backlog
    if added <= 0:
        raise Failed("nothing was added to the backlog")
    seen = delivered(sink)
    cpu = pump.cpu_seconds()
    began = time.monotonic()
    pump.start_queue()
    done = arrived(sink, seen + added)
    drain_cpu = pump.cpu_seconds() - cpu
    pump.stop_queue()
    return {
        "enqueue_per_second": taken["messages_per_second"],
        "drain_per_second": added / (done - began),
        "enqueue_cpu_us": enqueue_cpu * 1e6 / taken["sent"],
        "drain_cpu_us": drain_cpu * 1e6 / added,
        # Before and after: the higher one counts.
        "resident_mb": max(resident, pump.resident_mb()),
        "drained": added,
    }


# --- peers -----------------------------------------------------------------------------------------------------------


def peer(bench: Bench, name: str, measure: str, producers: int | None) -> Series:
    def ask(_) -> dict:
        command = [sys.executable, ROOT / "benches" / "peers" / "run.py", "measure", "--json"]
        command += ["--peer", name, "--measure", measure, "--dir", bench.directory]
        command += ["--seconds", bench.sizes.peer_seconds, "--payload", PAYLOAD, "--rate", RATE]
        if producers:
            command += ["--producers", producers]
        jobs = bench.sizes.peer_jobs or (bench.sizes.drained if name in PEERS_WITH_ALL_MESSAGES else None)
        if jobs:
            command += ["--jobs", jobs]
        return line_of(command)

    how = f"benches/peers/run.py measure --peer {name} --measure {measure}" + (f" --producers {producers}" if producers else "")
    return Series(name, PEER_NAMES.get(name, name), "peer", how, bench.sizes.peer_seconds + 6, ask)


def line_of(command: list) -> dict:
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, complaint = process.communicate(timeout=STEP_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        raise Failed(f"it did not end within {STEP_SECONDS_MAX} seconds") from None
    finally:
        stop(process)
    try:
        line = json.loads(out.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        raise Failed(last_line(complaint) or "it printed no figures") from None
    if "failed" in line:
        raise Failed(f"{line['failed']}: {last_line(complaint)}")
    return {key: value for key, value in line.items() if key not in ("peer", "measure", "payload")}
