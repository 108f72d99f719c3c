"""The quickstart over five seeds, each as a stranger starts it: accuracy, seconds from the command, peak memory.

python -m benchmarks.quickstart
"""

from __future__ import annotations

import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.measure import write_result

COMMAND = [sys.executable, "-m", "recipes.vision", "fit", "--test", "--config", "vision/quickstart"]


def main() -> None:
    """Measure and write."""
    accuracies, seconds, screen = [], [], ""
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(5):
            started = time.time()
            options = [f"--seed_everything={seed}", f"--data.seed={seed}"] if seed else []
            environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
            done = subprocess.run(
                [*COMMAND, *options], cwd=folder, capture_output=True, text=True, check=True, env=environment
            )
            seconds.append(time.time() - started)
            accuracies.append(float(re.findall(r"accuracy (\d\.\d+), f1", done.stdout)[-1]))
            screen = screen or done.stdout[done.stdout.index("────") :]
    write_result(
        "quickstart",
        {
            "test_accuracy": accuracies,
            "mean": round(statistics.mean(accuracies), 4),
            "wall_s": [round(value, 1) for value in seconds],
            "peak_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
            "screen": [line.rstrip() for line in screen.strip().splitlines()],
        },
    )


if __name__ == "__main__":
    main()
