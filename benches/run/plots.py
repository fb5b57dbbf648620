"""The plots, as SVG that stands on a light page as well as on a dark one: no background, and colours between the two."""

import math
from dataclasses import dataclass
from html import escape

from figures import Found
from plan import CONNECTIONS, NAMES, STORES

OWN, PEER, BARE, TEXT, LINE = "#2f81f7", "#8b949e", "#8b949e", "#747c85", "#8b949e"
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 840, 225, 90, 62, 34
PLOT = WIDTH - LEFT - RIGHT
FONT = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"


@dataclass
class Row:
    label: str
    kind: str
    values: list[dict | None]
    """A spread for each bar or dot."""


def all_of(result: dict) -> dict[str, str]:
    """Those for which something was measured."""
    found = Found(result)
    drawn = {
        "enqueue": bars(
            "Messages taken a second, each synced before the answer",
            [f"{CONNECTIONS} connections", "1 connection"],
            rows(found, [(f"enqueue-{CONNECTIONS}", "per_second"), ("enqueue-1", "per_second")]),
        ),
        "drain": bars(
            "Messages drained a second into a handler that does nothing",
            [],
            rows(found, [("drain", "handled_per_second")]),
        ),
        "latency": dots(
            "From the call to the handler at 200 messages a second, in ms",
            ["p50", "p99"],
            rows(found, [("latency", "p50_ms"), ("latency", "p99_ms")], bare=False),
        ),
    }
    return {name: drawing for name, drawing in drawn.items() if drawing}


def rows(found: Found, figures: list[tuple[str, str]], bare: bool = True) -> list[Row]:
    """Ours and their ceilings first, then the peers, the best first."""
    group, lower_is_better = figures[0][0], figures[0][1].endswith("_ms")
    made = []
    for one in found.all(group):
        values = [found.spread(where, one["key"], figure) or found.spread(where, one["key"], figure.removeprefix("handled_")) for where, figure in figures]
        if values[0] and (bare or one["kind"] != "bare"):
            made.append(Row(one["label"], one["kind"], values))
    place = {"own": 0, "bare": 1, "peer": 2}
    sign = 1 if lower_is_better else -1
    own = [row for row in made if row.kind == "own"]
    return sorted(own, key=lambda row: STORES.index(store_of(row))) + sorted(
        (row for row in made if row.kind != "own"), key=lambda row: (place[row.kind], sign * row.values[0]["median"])
    )


def store_of(row: Row) -> str:
    return next(store for store in STORES if NAMES[store] in row.label)


# --- bars ------------------------------------------------------------------------------------------------------------

BAR, GAP, ROW_GAP = 13, 3, 11


def bars(title: str, legend: list[str], of: list[Row]) -> str | None:
    if not of:
        return None
    count = max(len(row.values) for row in of)
    step = count * (BAR + GAP) + ROW_GAP
    most = max(value["max"] for row in of for value in row.values if value)
    top, scale = nice(most)
    parts = axis([n * scale for n in range(int(top / scale) + 1)], lambda value: LEFT + PLOT * value / top, len(of) * step)
    for n, row in enumerate(of):
        y = TOP + n * step + ROW_GAP / 2
        parts.append(label(row, y + (step - ROW_GAP) / 2))
        for m, value in enumerate(row.values):
            at = y + m * (BAR + GAP)
            if value is None:
                continue
            parts.append(bar(row.kind, at, PLOT * value["median"] / top, faint=m > 0))
            parts.append(whisker(LEFT + PLOT * value["min"] / top, LEFT + PLOT * value["max"] / top, at + BAR / 2))
            end = LEFT + PLOT * value["max"] / top + 6
            parts.append(words(end, at + BAR / 2 + 4, f"{value['median']:,.0f}", size=12, bold=row.kind == "own"))
    names = [(name, n > 0) for n, name in enumerate(legend)]
    parts += key_of(names) if legend else []
    return drawing(title, parts, TOP + len(of) * step + BOTTOM)


def bar(kind: str, y: float, width: float, faint: bool) -> str:
    width = max(width, 1.5)
    opacity = 0.5 if faint else 1
    if kind == "bare":
        shape = f'fill="{BARE}" fill-opacity="0.15" stroke="{BARE}" stroke-dasharray="4 3"'
        return f'<rect x="{LEFT}" y="{y:.1f}" width="{width:.1f}" height="{BAR}" rx="2" {shape} stroke-opacity="{opacity}"/>'
    colour = OWN if kind == "own" else PEER
    return f'<rect x="{LEFT}" y="{y:.1f}" width="{width:.1f}" height="{BAR}" rx="2" fill="{colour}" fill-opacity="{opacity}"/>'


def whisker(low: float, high: float, y: float) -> str:
    if high - low < 2:
        return ""
    return f'<path d="M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 3:.1f}v6M{high:.1f} {y - 3:.1f}v6" stroke="{TEXT}" fill="none"/>'


def key_of(names: list[tuple[str, bool]]) -> list[str]:
    parts, x = [], LEFT
    for name, faint in names:
        parts.append(f'<rect x="{x}" y="36" width="12" height="12" rx="2" fill="{OWN}" fill-opacity="{0.5 if faint else 1}"/>')
        parts.append(words(x + 17, 46, name, size=12))
        x += 40 + 7 * len(name)
    return parts


# --- dots, on a logarithmic scale ------------------------------------------------------------------------------------


def dots(title: str, legend: list[str], of: list[Row]) -> str | None:
    if not of:
        return None
    step = 28
    every = [value["median"] for row in of for value in row.values if value and value["median"] > 0]
    low, high = math.floor(math.log10(min(every)) * 2) / 2, math.ceil(math.log10(max(every)) * 2) / 2
    high = max(high, low + 0.5)

    def x_of(value: float) -> float:
        return LEFT + PLOT * (math.log10(value) - low) / (high - low)

    ticks = [value * 10**power for power in range(-3, 5) for value in (1, 3)]
    parts = axis([tick for tick in ticks if low - 1e-9 <= math.log10(tick) <= high + 1e-9], x_of, len(of) * step)
    for n, row in enumerate(of):
        y = TOP + n * step + step / 2
        colour = OWN if row.kind == "own" else PEER
        parts.append(label(row, y))
        shown = [value["median"] for value in row.values if value]
        places = [x_of(max(value, 10**low)) for value in shown]
        parts.append(f'<path d="M{places[0]:.1f} {y}H{places[-1]:.1f}" stroke="{colour}" stroke-width="3" stroke-opacity="0.5"/>')
        for m, place in enumerate(places):
            parts.append(dot(place, y, colour, hollow=m > 0))
        text = " / ".join(f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in shown)
        parts.append(words(places[-1] + 11, y + 4, text, size=12, bold=row.kind == "own"))
    x = LEFT
    for n, name in enumerate(legend):
        parts += [dot(x + 6, 42, OWN, hollow=n > 0), words(x + 17, 46, name, size=12)]
        x += 60
    return drawing(title, parts, TOP + len(of) * step + BOTTOM)


def dot(x: float, y: float, colour: str, hollow: bool) -> str:
    if hollow:
        return f'<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="none" stroke="{colour}" stroke-width="2.5"/>'
    return f'<circle cx="{x:.1f}" cy="{y}" r="5.5" fill="{colour}"/>'


# --- what both have --------------------------------------------------------------------------------------------------


def nice(most: float) -> tuple[float, float]:
    """The end of the axis, and the distance of its lines."""
    power = 10 ** math.floor(math.log10(max(most, 1)))
    step = next(step for step in (power / 5, power / 2, power, 2 * power) if most / step <= 6)
    return math.ceil(most / step) * step, step


def axis(ticks: list[float], x_of, height: float) -> list[str]:
    parts = []
    for tick in ticks:
        x = x_of(tick)
        parts.append(f'<path d="M{x:.1f} {TOP}v{height:.0f}" stroke="{LINE}" stroke-opacity="0.3"/>')
        parts.append(words(x, TOP + height + 18, f"{tick:,.10g}", size=11, anchor="middle"))
    return parts


def label(row: Row, y: float) -> str:
    return words(LEFT - 12, y + 4, row.label, size=13, anchor="end", bold=row.kind == "own", colour=OWN if row.kind == "own" else TEXT)


def words(x: float, y: float, text: str, size: int, anchor: str = "start", bold: bool = False, colour: str = TEXT) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(text)}</text>'


def drawing(title: str, parts: list[str], height: float) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}" role="img" font-family="{FONT}">'
    top = words(16, 24, title, size=15, bold=True)
    return "\n".join([head, f"<title>{escape(title)}</title>", top, *[part for part in parts if part], "</svg>"]) + "\n"
