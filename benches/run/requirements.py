"""What must be shown, as ratios within one run: each requirement with what was found, and whether it is met."""

from dataclasses import dataclass, field

from figures import Found, spread
from plan import NAMES, PEER_NAMES, POSTGRES_PEERS, REDIS_PEERS, STORES

AT_LEAST, AT_MOST = "at least", "at most"


@dataclass
class Against:
    """What a figure is compared with: series of the same group, added up; or the best of several peers."""

    keys: list[str] = field(default_factory=list)
    best_of: tuple[str, ...] | None = None
    label: str = ""
    figure: str | None = None


@dataclass
class Requirement:
    item: str
    text: str
    group: str
    key: str
    figure: str = "per_second"
    against: Against | None = None
    """None: the figure itself is held to `target`."""
    sense: str = AT_LEAST
    target: float | None = None
    """None: shown, and held to nothing."""
    or_figure: float | None = None
    """Met as well by so much of the figure itself."""
    of_times: bool = False
    """The ratio is of the times a message takes, so that of the rates upside down."""


def requirements() -> list[Requirement]:
    found = []
    for connections, store, target in (
        (1, "sqlite", 0.85),
        (16, "sqlite", None),
        (64, "sqlite", 0.80),
        (16, "postgres", 0.80),
        (64, "postgres", 0.80),
    ):
        group, bare = f"enqueue-{connections}", Against([f"bare-{store}"], label="bare group commit")
        text = f"POST, {NAMES[store]}, {connections} connection{'s' if connections > 1 else ''}"
        found.append(Requirement("1", text, group, store, against=bare, target=target))
        p99_target = 1.5 if (connections, store) == (64, "sqlite") else None
        found.append(Requirement("1", f"{text}, p99", group, store, "p99_ms", bare, AT_MOST, p99_target))
    peer = Against(best_of=(), label="fastest peer")
    found.append(Requirement("1", "POST, SQLite, 64 connections, and the fastest peer", "enqueue-64", "sqlite", against=peer, target=1.5))

    for store in STORES:
        bare = Against([f"bare-{store}"], label="bare insert")
        or_figure = 150_000 if store == "sqlite" else None
        found.append(Requirement("2", f"batches of 1,000, {NAMES[store]}", "bulk", store, against=bare, target=0.60, or_figure=or_figure))

    bare = Against(["bare-sqlite"], label="bare claim + delete")
    found.append(Requirement("3", "drain, SQLite", "drain", "sqlite", against=bare, target=0.65))
    found.append(Requirement("3", "drain, SQLite, itself", "drain", "sqlite", target=50_000))
    bare = Against(["bare-postgres"], label="bare claim + delete")
    found.append(Requirement("3", "drain, Postgres", "drain", "postgres", against=bare))
    peer = Against(best_of=POSTGRES_PEERS, label="fastest Postgres peer", figure="per_second")
    found.append(Requirement("3", "drain, Postgres, and the fastest Postgres peer", "drain", "postgres", "handled_per_second", peer, target=1.1))

    for store, least in (("sqlite", 12_000), ("postgres", 8_000)):
        bare = Against([f"bare-{store}"], label="bare chain")
        found.append(Requirement("4", f"end to end, {NAMES[store]}", "end-to-end", store, against=bare, target=0.55))
        found.append(Requirement("4", f"end to end, {NAMES[store]}, itself", "end-to-end", store, target=least))
    for store in STORES:
        raw, pool = Against(["bare-client-raw"], label="bare client"), Against(["bare-client-pool"], label="bare client, pool")
        text = f"drain over HTTP, {NAMES[store]}"
        found.append(Requirement("4", text, "drain-http", store, against=raw, target=0.75))
        found.append(Requirement("4", f"{text}, to the bare sink", "drain-http", f"{store}-to-bare-sink", against=raw, target=0.75))
        found.append(Requirement("4", f"{text}, to the bare sink", "drain-http", f"{store}-to-bare-sink", against=pool))

    for store in STORES:
        text = f"latency at 200/s, {NAMES[store]}"
        least = Against([f"bare-commit-{store}", "bare-request"], label="one commit + one request")
        found.append(Requirement("5", f"{text}, p50", "latency", store, "p50_ms", least, AT_MOST, 1.2))
        peer = Against(best_of=POSTGRES_PEERS + REDIS_PEERS, label="quickest peer on Postgres or Redis")
        found.append(Requirement("5", f"{text}, p50, and the quickest such peer", "latency", store, "p50_ms", peer, AT_MOST, 1.0))
        found.append(Requirement("5", f"{text}, p99", "latency", store, "p99_ms", None, AT_MOST, 5.0))

    for store in STORES:
        group = f"depth-{store}"
        small, large = Against([f"{store}-small"], label="at the small backlog"), f"{store}-large"
        for figure, what in (("enqueue_per_second", "POST"), ("drain_per_second", "drain")):
            text = f"{what} at the large backlog, {NAMES[store]}, time a message"
            found.append(Requirement("6", text, group, large, figure, small, AT_MOST, 1.3, of_times=True))
        for figure, what in (("enqueue_cpu_us", "POST"), ("drain_cpu_us", "drain")):
            text = f"{what} at the large backlog, {NAMES[store]}, the server's CPU a message"
            found.append(Requirement("6", text, group, large, figure, small, AT_MOST))
        text = f"resident memory at the large backlog, {NAMES[store]}"
        found.append(Requirement("6", text, group, large, "resident_mb", None, AT_MOST, 60.0))
    return found


def judge(result: dict) -> list[dict]:
    """All of them, in order, also those that were not measured: a requirement does not go away by not being looked at.
    A quick run holds to no target: its sizes are not those that the targets speak of."""
    found = Found(result)
    verdicts = [judge_one(found, one) for one in requirements()]
    return [one | {"met": None} for one in verdicts] if result["quick"] else verdicts


def judge_one(found: Found, one: Requirement) -> dict:
    figure = found.spread(one.group, one.key, one.figure)
    verdict = {
        "item": one.item,
        "text": one.text,
        "group": one.group,
        "series": one.key,
        "unit": one.figure,
        "figure": figure,
        "against": None,
        "ceiling": None,
        "ratio": None,
        "sense": one.sense,
        "target": one.target,
        "or_figure": one.or_figure,
        "met": None,
        "why_not": None,
    }
    if figure is None:
        return verdict | {"why_not": found.why_not(one.group, one.key)}
    if one.against is None:
        return verdict | {"met": holds(one, figure["median"])}
    return verdict | compare(found, one, figure)


def compare(found: Found, one: Requirement, figure: dict) -> dict:
    against, unit = one.against, one.against.figure or one.figure
    keys, label = against.keys, against.label
    if against.best_of is not None:
        names = [peer["key"] for peer in found.all(one.group, "peer") if not against.best_of or peer["key"] in against.best_of]
        medians = {name: found.spread(one.group, name, unit) for name in names}
        measured = {name: of["median"] for name, of in medians.items() if of}
        if not measured:
            return {"against": label, "why_not": "no such peer was measured in this run"}
        best = (max if one.sense == AT_LEAST else min)(measured, key=measured.get)
        keys, label = [best], f"{label}: {PEER_NAMES.get(best, best)}"
    below = found.sum(one.group, keys, unit)
    above = found.values(one.group, one.key, one.figure)
    ratio = found.ratio(below, above) if one.of_times else found.ratio(above, below)
    if ratio is None:
        missing = next((key for key in keys if found.spread(one.group, key, unit) is None), keys[0])
        return {"against": label, "why_not": found.why_not(one.group, missing)}
    ceilings = [value for value in below if value is not None]
    met = holds(one, ratio["median"])
    if one.or_figure is not None and figure["median"] >= one.or_figure:
        met = True
    return {"against": label, "ceiling": spread(ceilings), "ratio": ratio, "met": met}


def holds(one: Requirement, value: float) -> bool | None:
    if one.target is None:
        return None
    return value >= one.target if one.sense == AT_LEAST else value <= one.target
