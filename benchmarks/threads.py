"""Two defaults that ship: threads that wait asleep, and bf16 only where the hardware multiplies it.

    python -m benchmarks.threads

Milliseconds per training step of the quickstart's net and of a ResNet-18 at 64 px, batch 32: with OpenMP's threads
spinning (its default) and asleep (`OMP_WAIT_POLICY=PASSIVE`), each alone and beside one other program that keeps a
core busy; and of the ResNet-18 in fp32 and bf16.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.measure import write_result


def step_ms(backbone: str, size: int, precision: str, steps: int) -> float:
    """Milliseconds of wall time per step in this process."""
    import torch

    from recipes.vision import VisionClassifier

    model = VisionClassifier(5, backbone, image_size=size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    images, labels = torch.rand(32, 3, size, size), torch.randint(0, 5, (32,))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model.loss(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - started) / steps * 1e3


CASES: dict[str, tuple[str, int, str, int]] = {
    "quickstart": ("resnet8", 8, "fp32", 20),
    "resnet18_fp32": ("resnet18", 64, "fp32", 6),
    "resnet18_bf16": ("resnet18", 64, "bf16", 4),
}


def measure() -> None:
    """Each case in a process of its own: OpenMP reads its environment once."""
    figures: dict[str, Any] = {}
    for busy in (False, True):
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        for policy in ("ACTIVE by default", "PASSIVE"):
            environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
            if policy == "PASSIVE":
                environment["OMP_WAIT_POLICY"] = policy
            for case in CASES if policy == "PASSIVE" and not busy else ("quickstart", "resnet18_fp32"):
                command = [sys.executable, "-m", "benchmarks.threads", case]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                name = f"{case}, {policy}, {'beside a busy program' if busy else 'alone'}"
                figures[name] = round(json.loads(done.stdout.split("MS")[1]), 1)
        if other:
            other.kill()
    write_result("threads", {"ms_per_step": figures})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print("MS", json.dumps(step_ms(*CASES[sys.argv[1]])))
    else:
        measure()
