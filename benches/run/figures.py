"""Runs, and what is said of them: medians with their spread, and ratios within a round."""

import statistics


def spread(values: list[float]) -> dict | None:
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


class Found:
    """The runs of all groups, by name. What was not measured is `None`, with a reason."""

    def __init__(self, result: dict) -> None:
        self.groups = {group["key"]: group for group in result["groups"]}

    def series(self, group: str, key: str) -> dict | None:
        return next((one for one in self.all(group) if one["key"] == key), None)

    def all(self, group: str, kind: str | None = None) -> list[dict]:
        series = self.groups.get(group, {"series": []})["series"]
        return [one for one in series if kind in (None, one["kind"])]

    def values(self, group: str, key: str, figure: str) -> list[float | None]:
        """One a round; `None` where a round has none."""
        series = self.series(group, key)
        return [run.get(figure) for run in series["runs"]] if series else []

    def spread(self, group: str, key: str, figure: str) -> dict | None:
        return spread([value for value in self.values(group, key, figure) if value is not None])

    def ratio(self, above: list[float | None], below: list[float | None]) -> dict | None:
        """Of two that were measured in the same rounds: the ratio of each round, and the median of those."""
        pairs = [(a, b) for a, b in zip(above, below) if a is not None and b]
        return spread([a / b for a, b in pairs])

    def sum(self, group: str, keys: list[str], figure: str) -> list[float | None]:
        rounds = zip(*(self.values(group, key, figure) for key in keys))
        return [None if None in values else sum(values) for values in rounds]

    def why_not(self, group: str, key: str) -> str:
        """Why a figure is missing."""
        if group not in self.groups:
            return "not chosen in this run"
        series = self.series(group, key)
        if series is None:
            return "not chosen in this run"
        return next((run.get("skipped") or run.get("failed") for run in series["runs"] if "skipped" in run or "failed" in run), "no runs")
