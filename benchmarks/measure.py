"""What every benchmark shares: timing that survives a noisy machine, and the file that a claim points to."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
clock = {"wall": 0.0, "cpu": 0.0}


def interleaved(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Run several ways of doing the same work in turn, so that a slow minute hits all of them alike.

    Args:
        ways: Name to function; each call does the whole work once.
        rounds: How often each is called.

    Returns:
        For each way the median of wall and CPU seconds, and the range of the wall seconds.
    """
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            started, used = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - used)
    return {
        name: {
            "wall_s": statistics.median(wall[name]),
            "wall_s_min": min(wall[name]),
            "wall_s_max": max(wall[name]),
            "cpu_s": statistics.median(cpu[name]),
            "cpu_s_min": min(cpu[name]),
        }
        for name in ways
    }


def used() -> float:
    """CPU seconds of this process and of its living and finished workers."""
    import psutil  # README's tables are made without it

    own = psutil.Process()
    times = [own.cpu_times(), *(child.cpu_times() for child in own.children(recursive=True))]
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def report_start(epoch: int) -> None:
    """In a process that a benchmark started: the clock runs from here, the second epoch."""
    if epoch == 1:
        clock.update(wall=time.perf_counter(), cpu=used())


def report_end() -> None:
    """Tell the parent how long the second epoch took."""
    seconds = {"wall_s": time.perf_counter() - clock["wall"], "cpu_s": used() - clock["cpu"]}
    print("SECONDS", json.dumps(seconds), flush=True)


def hardware() -> dict[str, Any]:
    """The machine, in words that mean something elsewhere."""
    found: dict[str, Any] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def processor() -> str:
    """The processor's name, without its maker's decoration."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def write_result(name: str, figures: Mapping[str, Any]) -> Path:
    """Write `results/<name>.json` with the machine and the day, and print it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"date": date.today().isoformat(), "hardware": hardware(), **figures}
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(path.read_text())
    return path
