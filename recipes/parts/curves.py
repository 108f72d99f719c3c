"""The curves of learning-rate schedules: plain functions of step and progress, and what a run's length must be."""

from __future__ import annotations

import math


def ramp(step: int, steps: int) -> float:
    """Linear warm-up over `steps` steps: above 0 from step 0 on, 1.0 from step `steps` on."""
    return min(1.0, (step + 1) / (steps + 1))


def progress(step: int, first: int, last: int) -> float:
    """Share of the way from step `first`, 0.0, to step `last`, 1.0; 0.0 where there is no way to go."""
    return min(max((step - first) / (last - first), 0.0), 1.0) if last > first else 0.0


def cosine(progress: float) -> float:
    """Half a cosine, from 1.0 at progress 0.0 to 0.0 at progress 1.0."""
    return (1.0 + math.cos(math.pi * progress)) / 2.0


def one_cycle(step: int, total_steps: int, up_share: float, start: float, peak: float, end: float) -> float:
    """Cosine from `start` to `peak` over the first `up_share` of the run, then to `end` in its last step."""
    top = up_share * total_steps - 1.0  # between two steps, as a rule; before the first in a very short run
    if step <= top and top > 0.0:
        return peak + (start - peak) * cosine(step / top)
    return end + (peak - end) * cosine((step - top) / (total_steps - 1.0 - top))


def first_step(at: float, total_steps: int) -> int:
    """The optimiser step meant by `at`: below 1 a share of the run, rounded up, from 1 on a step.

    Raises:
        ValueError: `at` is negative, or a step beyond the run.
    """
    if not 0 <= at < max(total_steps, 1):
        raise ValueError(
            f"expected a share of the run (0 <= share < 1) or one of its {total_steps} steps, received {at:g}: "
            "the learning rate would never change there; give an earlier step, or a share, or train longer"
        )
    return math.ceil(at * total_steps - 1e-9) if at < 1 else int(at)


def whole_length(total_steps: float) -> int:
    """The length of a run in optimiser steps.

    Raises:
        ValueError: It is not a whole number of them, 1 or more.
    """
    if not (total_steps >= 1 and math.isfinite(total_steps) and total_steps == int(total_steps)):
        raise ValueError(
            f"total_steps must be a whole number of optimiser steps, 1 or more; received {total_steps}; "
            "set max_epochs or max_steps, and max_steps where the data has no length"
        )
    return int(total_steps)


def warmup_length(total_steps: int, warmup: float) -> int:
    """Optimiser steps of a warm-up: below 1 a share of the run, from 1 on steps.

    Raises:
        ValueError: It is negative, or does not fit into the run.
    """
    check("warmup", warmup, warmup >= 0, "0 or more: below 1 a share of the run, from 1 on steps")
    if warmup < 1:
        return min(round(warmup * total_steps), total_steps - 1)
    check("warmup", warmup, warmup == int(warmup), "a share of the run below 1, or a whole number of steps")
    if warmup >= total_steps:
        raise ValueError(
            f"a warm-up of {warmup:g} steps does not fit in a run of {total_steps} steps; "
            "shorten it, give a share below 1 instead, or train longer"
        )
    return int(warmup)


def check(name: str, value: object, right: bool, expected: str) -> None:
    """Raise a ValueError that says what was expected of an argument, unless it is right."""
    if not right:
        raise ValueError(f"{name} must be {expected}; received {value!r}")
