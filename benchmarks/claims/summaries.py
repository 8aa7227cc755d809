"""Means of a few trainings, their intervals, and their leads over others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and half the width of its 95 % interval by Student's t (NaN for a single value)."""
    from scipy.stats import t

    if len(values) < 2:
        return values[0], math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(t.ppf(0.975, len(values) - 1)) * spread


def summary(values: Sequence[float], **leads: Sequence[float]) -> dict[str, Any]:
    """Return the values, their mean and interval, and those of each lead over other values, by its name."""
    mean, interval = mean_and_interval(values)
    found = {"values": list(values), "mean": mean, "interval": interval}
    for name, lead in leads.items():
        found[name], found[f"{name}_interval"] = mean_and_interval(lead)
    return found


def minus(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return the differences, seed by seed."""
    return [a - b for a, b in zip(values, others, strict=True)]


def plus_minus(found: dict[str, Any], lead: str = "", digits: int = 1) -> str:
    """Format the mean and interval of a summary, or of one of its leads."""
    mean, interval = (found[lead], found[f"{lead}_interval"]) if lead else (found["mean"], found["interval"])
    return f"{mean:{'+' if lead else ''}.{digits}f} ± {interval:.{digits}f}"


def with_leads(row: dict[str, Any], scores: Iterable[str], lead: str, reference: str, digits: int = 1) -> list[str]:
    """Format each score of a row, and its lead unless the row is the reference."""
    blank = row["name"] == reference
    pairs = [(plus_minus(row[s], "", digits), "" if blank else plus_minus(row[s], lead, digits)) for s in scores]
    return [cell for pair in pairs for cell in pair]
