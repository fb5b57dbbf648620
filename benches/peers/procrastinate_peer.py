"""procrastinate on Postgres. The twin of lib.mjs in the one driver that is Python."""

import asyncio
import json
import logging
import os
import sys
import time
from importlib.metadata import version

import procrastinate

QUEUE = "bench"
CONNECTIONS_MAX = 20
CONCURRENCY = 64
WARMUP_SECONDS = 1
BATCH = 1_000

SETTINGS = {
    "enqueue": f"defer_async, pool of {CONNECTIONS_MAX}",
    "bulk": "batch_defer_async",
    "drain": f"concurrency {CONCURRENCY}, delete_jobs always",
    "latency": f"concurrency {CONCURRENCY}, NOTIFY, delete_jobs always",
}


async def main() -> None:
    # It warns about an app that lives in the main module, which matters to workers in other processes.
    logging.getLogger("procrastinate").setLevel(logging.ERROR)
    ask = json.loads(sys.argv[1])
    connector = procrastinate.PsycopgConnector(conninfo=ask["url"], min_size=1, max_size=CONNECTIONS_MAX)
    app = procrastinate.App(connector=connector)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        measure = {"enqueue": enqueue, "bulk": bulk, "drain": drain, "latency": latency}[ask["measure"]]
        figures = await measure(app, ask)
    head = {"version": version("procrastinate"), "settings": SETTINGS[ask["measure"]]}
    print(json.dumps(figures | head), flush=True)
    # A worker that is asked to stop finishes its polling first; the server is thrown away with all it holds.
    os._exit(0)


async def enqueue(app: procrastinate.App, ask: dict) -> dict:
    """One awaited call per job, from `producers` loops at once."""
    task = define(app, lambda n: None)
    return await call_until_deadline(ask, 1, lambda n: task.defer_async(**body(n, ask["payload"])))


async def bulk(app: procrastinate.App, ask: dict) -> dict:
    """1,000 jobs in each awaited call."""
    task = define(app, lambda n: None)
    return await call_until_deadline(ask, BATCH, lambda n: task.batch_defer_async(*bodies(n * BATCH, BATCH, ask["payload"])))


async def drain(app: procrastinate.App, ask: dict) -> dict:
    """`jobs` are queued before the worker starts. The first job handled starts the clock and is not counted."""
    handled: list[float] = []
    all_handled = asyncio.Event()

    def handle(_: int) -> None:
        handled.append(time.perf_counter())
        if len(handled) == ask["jobs"]:
            all_handled.set()

    task = define(app, handle)
    for queued in range(0, ask["jobs"], BATCH):
        await task.batch_defer_async(*bodies(queued, min(BATCH, ask["jobs"] - queued), ask["payload"]))
    worker = start_worker(app)
    await first_of(all_handled.wait(), worker)
    worker.cancel()
    return {"jobs": ask["jobs"], "per_second": rounded((ask["jobs"] - 1) / (handled[-1] - handled[0]))}


async def latency(app: procrastinate.App, ask: dict) -> dict:
    """Open loop: a call is made when it is due, whether or not the earlier ones have been answered."""
    warm = WARMUP_SECONDS * ask["rate"]
    total = warm + ask["seconds"] * ask["rate"]
    called = [0.0] * total
    times: list[float] = []
    arrived = 0
    last = 0.0
    all_arrived = asyncio.Event()

    def handle(n: int) -> None:
        nonlocal arrived, last
        last = time.perf_counter()
        if n >= warm:
            times.append(last - called[n])
        arrived += 1
        if arrived == total:
            all_arrived.set()

    task = define(app, handle)
    worker = start_worker(app)

    async def call(n: int) -> None:
        called[n] = time.perf_counter()
        await task.defer_async(**body(n, ask["payload"]))

    calls = []
    began = time.perf_counter()
    for n in range(total):
        await asyncio.sleep(max(0.0, began + n / ask["rate"] - time.perf_counter()))
        calls.append(asyncio.create_task(call(n)))
    await first_of(asyncio.gather(*calls), worker)
    await first_of(all_arrived.wait(), worker)
    worker.cancel()
    behind = {"behind_ms": rounded((last - called[-1]) * 1_000)}
    return {"jobs": len(times), "rate": ask["rate"]} | percentiles(times) | behind


async def call_until_deadline(ask: dict, jobs_per_call: int, call) -> dict:
    times: list[float] = []
    count_from = time.perf_counter() + WARMUP_SECONDS
    deadline = count_from + ask["seconds"]
    following = 0
    last = count_from

    async def producer() -> None:
        nonlocal following, last
        while (began := time.perf_counter()) < deadline:
            n, following = following, following + 1
            await call(n)
            # A call belongs to the window when it began in it; the window then lasts until the last was answered.
            if began >= count_from:
                last = max(last, time.perf_counter())
                times.append(time.perf_counter() - began)

    await asyncio.gather(*(producer() for _ in range(ask["producers"])))
    rate = rounded(len(times) * jobs_per_call / (last - count_from))
    return {"producers": ask["producers"], "per_second": rate} | percentiles(times)


def define(app: procrastinate.App, handle):
    @app.task(name="bench", queue=QUEUE)
    async def bench(n: int, pad: str) -> None:
        handle(n)

    return bench


def start_worker(app: procrastinate.App) -> asyncio.Task:
    return asyncio.create_task(
        app.run_worker_async(
            queues=[QUEUE], concurrency=CONCURRENCY, delete_jobs="always", listen_notify=True, install_signal_handlers=False
        )
    )


async def first_of(wanted, worker: asyncio.Task) -> None:
    """Waits for `wanted`, and fails when the worker ends before it."""
    wanted = asyncio.ensure_future(wanted)
    await asyncio.wait({wanted, worker}, return_when=asyncio.FIRST_COMPLETED)
    if not wanted.done():
        worker.result()
        raise RuntimeError("the worker ended early")
    wanted.result()


def bodies(start: int, count: int, payload: int) -> list[dict]:
    return [body(n, payload) for n in range(start, start + count)]


def body(n: int, payload: int) -> dict:
    """Arguments whose JSON is `payload` bytes long."""
    return {"n": n, "pad": "x" * (payload - len('{"n":,"pad":""}') - len(str(n)))}


def percentiles(times: list[float]) -> dict:
    ordered = sorted(times)
    at = {name: ordered[min(len(ordered) - 1, int(len(ordered) * share))] for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99))}
    return {name: round(seconds * 1_000, 3) for name, seconds in at.items()}


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    asyncio.run(main())
