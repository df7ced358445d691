"""Goodput: the share of wall time that went into training steps that counted, and where the rest went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PHASES = {
    "step": "training steps",
    "start": "start",
    "compile": "compilation",
    "data": "waiting for data",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "lost": "lost to restarts",
    "waiting": "waiting to go on",
}
"""Phases of a trial, in words: those of llm_jax.training.watch.Watch; steps that were taken again, with attempts that took none;
and the time between attempts, with what a killed one did after its last beat (scaling/leases.py)."""


def of_attempts(attempts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Wall seconds of a trial by phase, from its attempts (leases.attempts); empty where none told of steps."""
    told = [one for one in attempts if "started" in one]
    if not any("from_step" in one for one in told):
        return {}
    found: defaultdict[str, float] = defaultdict(float)
    for one, after in zip(told, [*told[1:], None], strict=True):
        end = one.get("ended", one["beat"])
        if after:
            found["waiting"] += max(0.0, after["started"] - end)
        if "from_step" not in one:
            found["lost"] += end - one["started"]
            continue
        seconds = dict(one["seconds"])
        seconds["start"] = seconds.get("start", 0.0) + max(0.0, end - one["started"] - sum(seconds.values()))
        steps = one["step"] - one["from_step"]
        again = next(
            (later["from_step"] for later in told if later["started"] > one["started"] and "from_step" in later), None
        )
        if again is not None and steps:
            lost = seconds.get("step", 0.0) * min(steps, max(0, one["step"] - again)) / steps
            seconds["step"] = seconds.get("step", 0.0) - lost
            found["lost"] += lost
        for phase, value in seconds.items():
            found[phase] += value
    return {phase: found[phase] for phase in PHASES if found.get(phase)}


def total(times: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum over trials, by phase."""
    found: defaultdict[str, float] = defaultdict(float)
    for time in times:
        for phase, seconds in time.items():
            found[phase] += seconds
    return {phase: found[phase] for phase in PHASES if phase in found}


def share(time: Mapping[str, float]) -> float | None:
    """Goodput, a fraction; None where nothing is known."""
    wall = sum(time.values())
    return time.get("step", 0.0) / wall if wall else None


def describe(time: Mapping[str, float]) -> str:
    """One line; empty where nothing is known."""
    wall = sum(time.values())
    if not wall:
        return ""
    rest = ", ".join(f"{PHASES[phase]} {100 * s / wall:.0f} %" for phase, s in time.items() if phase != "step")
    return f"goodput {100 * time.get('step', 0.0) / wall:.0f} % of {wall:.0f} s{': ' if rest else ''}{rest}"
