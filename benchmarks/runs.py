"""A shipped command as a measurement: run once on one thread, its figures kept, so that a killed benchmark goes on."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DATA = Path(os.environ.get("FINETUNING_DATA", "")).absolute()
WORK = Path("runs/benchmarks").absolute()


def finished(arguments: Sequence[str], *, keep: bool = False, more: Sequence[str] = ()) -> dict[str, Any]:
    """What a fit found and used.

    Args:
        arguments: `recipes.vision`, `fit` and so on.
        more: Arguments that no earlier run needed to give the same.
        keep: Whether its folder stays, with the best checkpoint, at `checkpoint`.
    """
    key = hashlib.sha256("\n".join(arguments).encode()).hexdigest()[:16]
    kept, folder = WORK / "done" / f"{key}.json", WORK / "fits" / key
    if not kept.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                *arguments,
                *more,
                "--trainer.accelerator=cpu",
                f"--trainer.default_root_dir={folder}",
            ],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}\n{done.stderr[-3000:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        (report,) = folder.rglob("report.json")
        told = json.loads(report.read_text())
        best = next(report.parent.rglob("best.ckpt"))
        found = {
            "arguments": [word.replace(str(DATA), "DATA") for word in arguments],
            "val": told["best"]["score"],
            "test": {k: v for k, v in told["metrics"].items() if k.startswith("test/")}
            if "--test" in arguments
            else {},
            "trained": told["cost"]["trained"],
            "parameters": told["cost"]["parameters"],
            "memory_gb": told["cost"]["memory_gb"],
            "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "fit_s": told["cost"]["seconds"],
            "checkpoint_mb": best.stat().st_size / 1e6,
            "checkpoint": str(best) if keep else None,
        }
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found, indent=1))
        if not keep:
            shutil.rmtree(folder)
    return dict(json.loads(kept.read_text()))
