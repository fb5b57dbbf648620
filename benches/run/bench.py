"""What every measurement stands on: programs that are started and stopped, databases that are new and go."""

import contextlib
import http.client
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

STEP_SECONDS_MAX = 900
"""How long one measurement may take before it counts as failed."""
START_SECONDS_MAX = 60
STOP_SECONDS_MAX = 20
ENVIRONMENT_PREFIX = "PUMPHOUSE_"


class Failed(Exception):
    """A measurement that could not be taken; the text says why, and stands in the report."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def load_peers():
    """benches/peers/run.py knows how to start servers and how fast the disk syncs; it is a program, not on the path."""
    spec = importlib.util.spec_from_file_location("peers_run", ROOT / "benches" / "peers" / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers_run"] = module
    spec.loader.exec_module(module)
    return module


peers = load_peers()


class Bench:
    def __init__(self, running: contextlib.ExitStack, parent: Path, sizes, pumphouse: Path, bare: Path) -> None:
        self.directory = running.enter_context(peers.fresh_directory(parent.resolve()))
        self.sizes = sizes
        self.pumphouse = pumphouse
        self.bare = bare
        self._running = running
        self._postgres = None
        self._databases = 0

    # --- places ---

    def fresh(self):
        """A directory that is gone afterwards."""
        return peers.fresh_directory(self.directory)

    def postgres(self):
        """A cluster of our own with durable settings, started when it is first needed."""
        if self._postgres is None:
            directory = self._running.enter_context(self.fresh())
            try:
                self._postgres = peers.start_postgres(self._running, directory)
            except (peers.Unavailable, peers.Failed) as why:
                raise Failed(f"Postgres: {why}") from None
        return self._postgres

    @contextlib.contextmanager
    def database(self):
        """The URL of a new Postgres database. Dropping the one before made a checkpoint, so each begins alike."""
        server = self.postgres()
        self._databases += 1
        name = f"bench_{self._databases}"
        self._sql(server.url, f"create database {name}")
        try:
            yield server.url.removesuffix("/postgres") + f"/{name}"
        finally:
            with contextlib.suppress(Failed):
                self._sql(server.url, f"drop database {name} with (force)")

    def _sql(self, url: str, statement: str) -> None:
        psql = [peers.postgres_programs() / "psql", "-X", "-q", url, "-c", statement]
        done = subprocess.run([str(part) for part in psql], capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"psql: {done.stderr.strip()}")

    # --- programs ---

    def own(self, *arguments, beside=contextlib.nullcontext()) -> dict:
        """One `pumphouse bench`, its only run's figures."""
        said = self.json([self.pumphouse, "bench", *arguments, "--json", "--quiet"], beside)
        if said["build"] != "release" and not self.sizes.quick:
            raise Failed(f"{self.pumphouse.name} is a {said['build']} build, whose figures say nothing")
        return said["runs"][0] | ({"notes": said["notes"]} if said["notes"] else {})

    def bare_json(self, *arguments) -> dict:
        return self.json([self.bare, *arguments])

    def json(self, command: list, beside=contextlib.nullcontext()) -> dict:
        """Runs a program to its end, with something beside it; its last line is what it found."""
        process = self._start(command)
        try:
            with beside:
                out, complaint = process.communicate(timeout=STEP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            raise Failed(f"it did not end within {STEP_SECONDS_MAX} seconds") from None
        finally:
            stop(process)
        if process.returncode != 0:
            raise Failed(last_line(complaint) or f"it ended with {process.returncode} and said nothing")
        try:
            return json.loads(out.strip().splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            raise Failed("it printed no figures") from None

    @contextlib.contextmanager
    def serving(self, *arguments):
        """A bare server; where it listens."""
        process = self._start([self.bare, *arguments])
        try:
            address = first(lines_of(process.stdout), lambda line: line.partition("listening on ")[2].strip())
            if not address:
                process.kill()
                raise Failed(last_line(process.communicate()[1]) or "it did not listen")
            yield address
        finally:
            stop(process)

    @contextlib.contextmanager
    def pump(self, database: str, directory: Path):
        """A `pumphouse serve` with nobody's settings."""
        settings = directory / "none.toml"
        settings.write_text("")
        command = [self.pumphouse, "serve", "--config", settings, "--listen", "127.0.0.1:0"]
        command += ["--log-format", "json", "--log", "warn,pumphouse::cli::serve=info"]
        process = self._start(command, {ENVIRONMENT_PREFIX + "DATABASE": database})
        try:
            lines = lines_of(process.stderr)
            address = first(lines, lambda line: address_in(line))
            if not address:
                raise Failed("the server did not start")
            yield Pump(process, address)
        finally:
            stop(process)

    def _start(self, command: list, environment: dict | None = None) -> subprocess.Popen:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
        # A session of its own: Ctrl-C reaches only us, and we stop what sends before what answers.
        return subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.directory,
            env=kept | (environment or {}),
            start_new_session=True,
        )

    def without_paths(self, text: str) -> str:
        """What is published names nobody's directories."""
        for path, word in ((self.directory, "DIR"), (ROOT, "."), (Path.home(), "~")):
            text = text.replace(str(path), word) if len(str(path)) > 1 else text
        return text


def stop(process: subprocess.Popen) -> None:
    """In good order first: a `pumphouse bench` has a server of its own to stop."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS_MAX)
    peers.kill_group(process)
    for stream in (process.stdout, process.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.close()


def lines_of(stream) -> queue.Queue:
    """Reads to the end whatever anybody wants of it: a full pipe would stop the program."""
    lines = queue.Queue()

    def read() -> None:
        with contextlib.suppress(ValueError, OSError):
            for line in stream:
                if lines.qsize() < 1000:
                    lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def first(lines: queue.Queue, wanted) -> str | None:
    deadline = time.monotonic() + START_SECONDS_MAX
    with contextlib.suppress(queue.Empty):
        while (line := lines.get(timeout=max(0.01, deadline - time.monotonic()))) is not None:
            if found := wanted(line):
                return found
    return None


def address_in(line: str) -> str | None:
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(line).get("address")
    return None


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else ""


# --- a pump with a backlog -------------------------------------------------------------------------------------------

BATCH = 1000
FILL_CONNECTIONS = 4
QUEUE = "bench"
"""The name that `pumphouse bench --bare` sends to, so that the same generator loads a queue that has a backlog."""


class Pump:
    """A running server, and what is asked of it."""

    def __init__(self, process: subprocess.Popen, address: str) -> None:
        self.process = process
        self.address = address
        self.url = f"http://{address}"

    def make_queue(self, handler_url: str, concurrency: int) -> None:
        settings = {"handler": {"kind": "http", "url": handler_url}, "concurrency": {"limit": concurrency}}
        self.ask("PUT", f"/admin/v1/queues/{QUEUE}", settings)
        self.stop_queue()

    def stop_queue(self) -> None:
        self.ask("POST", f"/admin/v1/queues/{QUEUE}/stop", {"reason": "a bench fills it", "deadline": "10s"})

    def start_queue(self) -> None:
        self.ask("POST", f"/admin/v1/queues/{QUEUE}/start")

    def ready(self) -> int:
        return self.ask("GET", f"/admin/v1/queues/{QUEUE}")["stats"]["ready"]

    def left(self) -> int:
        stats = self.ask("GET", f"/admin/v1/queues/{QUEUE}")["stats"]
        if stats["dead"]:
            raise Failed(f"{stats['dead']} messages are dead letters: the sink was not reached")
        return stats["ready"] + stats["scheduled"] + stats["in_flight"]

    def fill(self, messages: int, payload: int) -> None:
        line = b'{"payload":{"pad":"' + b"x" * (payload - 10) + b'"}}\n'
        shares = [messages // FILL_CONNECTIONS + (n < messages % FILL_CONNECTIONS) for n in range(FILL_CONNECTIONS)]
        wrong = deque()

        def send(share: int) -> None:
            try:
                connection = http.client.HTTPConnection(self.address, timeout=60)
                while share > 0:
                    some = min(share, BATCH)
                    headers = {"content-type": "application/x-ndjson"}
                    connection.request("POST", f"/v1/queues/{QUEUE}/messages/batch", line * some, headers)
                    answer = connection.getresponse()
                    said = answer.read()
                    if answer.status >= 300:
                        raise Failed(f"a batch was answered with {answer.status}: {said[:200].decode(errors='replace')}")
                    share -= some
                connection.close()
            except (Failed, OSError, http.client.HTTPException) as why:
                wrong.append(why)

        threads = [threading.Thread(target=send, args=(share,), daemon=True) for share in shares]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if wrong:
            raise Failed(f"the backlog was not filled: {wrong[0]}")

    def resident_mb(self) -> float:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise Failed("the server has ended")

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ask(self, method: str, path: str, body: dict | None = None) -> dict:
        try:
            return ask(self.address, method, path, body)
        except (OSError, http.client.HTTPException) as why:
            raise Failed(f"{method} {path}: {why}") from None


def ask(address: str, method: str, path: str, body: dict | None = None) -> dict:
    connection = http.client.HTTPConnection(address, timeout=60)
    headers = {"content-type": "application/json"} if body is not None else {}
    connection.request(method, path, json.dumps(body) if body is not None else None, headers)
    answer = connection.getresponse()
    said = answer.read()
    connection.close()
    if answer.status >= 300:
        raise Failed(f"{method} {path} was answered with {answer.status}: {said[:200].decode(errors='replace')}")
    return json.loads(said) if said.strip() else {}


LOOK_SECONDS = 0.005
STANDSTILL_SECONDS_MAX = 30


def delivered(sink: str) -> int:
    """How many deliveries a bare sink has counted."""
    return ask(sink, "GET", "/count")


def arrived(sink: str, wanted: int) -> float:
    """When the sink's count had reached so many."""
    connection = http.client.HTTPConnection(sink, timeout=60)
    before, since = -1, time.monotonic()
    while True:
        connection.request("GET", "/count")
        count = int(connection.getresponse().read())
        now = time.monotonic()
        if count >= wanted:
            connection.close()
            return now
        if count != before:
            before, since = count, now
        elif now - since > STANDSTILL_SECONDS_MAX:
            raise Failed(f"nothing arrived for {STANDSTILL_SECONDS_MAX} seconds, at {count} of {wanted}")
        time.sleep(LOOK_SECONDS)
