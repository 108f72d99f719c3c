"""What a training step costs with adapters, against one of full fine-tuning: MiniLM, 32 texts of 64 tokens, one thread.

    python -m benchmarks.adapter_steps path/to/encoder

Forward, backward and AdamW, fp32, interleaved; the ratio is of medians of CPU seconds. Memory is the peak of three
steps in a process of its own, less what it held with the net loaded.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.measure import interleaved, write_result
from callbacks import Freeze
from recipes.parts.optim import build_optimizer
from recipes.parts.peft import Peft
from recipes.text import TextClassifier

WAYS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "LoRA, rank 8": {"method": "lora"},
    "LoRA, rank 8, attention": {"method": "lora", "targets": "attention"},
    "LoRA, rank 8, as the library computes it": {"method": "lora", "dropout": 1e-9},
    "DoRA, rank 8": {"method": "dora"},
    "IA3": {"method": "ia3"},
    "adapter, 32 wide": {"method": "adapter", "rank": 32},
    "prompt, 20 tokens": {"method": "prompt"},
    "prefix, 20 tokens": {"method": "prefix"},
    "BitFit": None,
}


def stepper(encoder: str, way: str) -> Callable[[], None]:
    """A function that makes a step."""
    how = WAYS[way]
    torch.manual_seed(0)
    model = TextClassifier(2, encoder=encoder, pooling="mean", peft=how and Peft(**how)).train()
    if way == "BitFit":
        Freeze(train_last_blocks=1, train_biases=True).freeze(model)
    optimizer = build_optimizer(torch.optim.AdamW, model.param_groups())
    ids = torch.randint(1000, 20000, (32, 64))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    label = torch.arange(32) % 2

    def step() -> None:
        F.cross_entropy(model.logits(batch), label).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_mb(encoder: str, way: str) -> float:
    """Of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.adapter_steps", encoder, way]
    return float(
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    )


def kilobytes(field: str) -> int:
    """A figure of this process's memory, of Linux."""
    return int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    encoder, *only = sys.argv[1:]
    if only:
        step = stepper(encoder, only[0])
        before = kilobytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        for _ in range(3):
            step()
        print(json.dumps((kilobytes("VmHWM") - before) / 1024))
    else:
        steps = {way: stepper(encoder, way) for way in WAYS}
        for step in steps.values():
            step()
        seconds = interleaved(steps, rounds=7)
        full = seconds["full"]["cpu_s"]
        write_result(
            "adapter_steps",
            {
                way: {
                    "ms": round(1000 * found["cpu_s"], 1),
                    "of_full": round(found["cpu_s"] / full, 3),
                    "memory_mb": round(peak_mb(encoder, way)),
                }
                for way, found in seconds.items()
            },
        )
