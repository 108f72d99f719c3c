"""Pictures in Parquet files: the start at ImageNet's size, and the pace against single files.

    python -m benchmarks.parquet

* 1,281,167 rows in 294 files, in row groups of 100, as ImageNet lies on the Hugging Face hub, with a picture of 1 kB in
  each row: seconds to the first batch of the order, and the most memory.
* 1,200 JPEGs of 300 to 500 px in four files of small row groups to augmented batches of 224 px with two workers,
  against the same pictures as single files: pictures per second of the CPU.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.data import write_pictures
from benchmarks.measure import used, write_result
from datamodules import ImageFolder, ParquetImages

ROWS, FILES, CLASSES, GROUP, ROUNDS, EPOCHS = 1_281_167, 294, 1000, 100, 3, 2


def write_shards(folder: Path) -> None:
    """As many rows as ImageNet's, of few bytes."""
    rng = np.random.default_rng(0)
    picture = rng.bytes(1000)
    for number, labels in enumerate(np.array_split(rng.integers(0, CLASSES, ROWS), FILES)):
        cells = [{"bytes": picture, "path": f"{row}.jpg"} for row in range(len(labels))]
        table = pa.table({"image": cells, "label": labels})
        pq.write_table(table, folder / f"train-{number:05d}.parquet", row_group_size=GROUP)


def start(folder: str) -> None:
    """In a process of its own: from nothing to the first draw of the second epoch."""
    started = time.perf_counter()
    data = ParquetImages(f"{folder}/*.parquet", image_size=224, batch_size=256, num_workers=0)
    data.setup("fit")
    ready = time.perf_counter() - started
    sampler: Any = data.train_dataloader().sampler
    sampler.set_epoch(1)
    started = time.perf_counter()
    next(iter(sampler))
    print(ready, time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def pace(data: Any) -> float:
    """Pictures per CPU second, after an epoch that starts the workers."""
    data.setup("fit")
    loader, seen = data.train_dataloader(), 0
    for _ in loader:
        pass
    cpu = used()
    for _ in range(EPOCHS):
        seen += sum(len(batch["image"]) for batch in loader)
    return seen / (used() - cpu)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_shards(folder)
        command = [sys.executable, "-c", f"from benchmarks.parquet import start; start({temporary!r})"]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(ROUNDS)]
        ready, order, memory = (
            statistics.median(map(float, values)) for values in zip(*map(str.split, runs), strict=True)
        )
    with tempfile.TemporaryDirectory() as temporary:
        tree, shards = Path(temporary) / "tree", Path(temporary) / "shards"
        shards.mkdir()
        write_pictures(tree, 1200, 300, 500)
        files = sorted(tree.glob("*/*.jpg"), key=lambda file: int(file.stem))
        for number in range(4):
            some = files[number::4]
            cells = [{"bytes": file.read_bytes(), "path": file.name} for file in some]
            labels = [int(file.parent.name.split("_")[1]) for file in some]
            table = pa.table({"image": cells, "label": labels})
            pq.write_table(table, shards / f"{number}.parquet", row_group_size=10)  # 120, as many to a lane as it takes
        options: dict[str, Any] = {"image_size": 224, "batch_size": 32, "num_workers": 2, "val_share": 0.01}
        near: list[float] = []
        rows: list[float] = []
        for _ in range(ROUNDS):
            near.append(pace(ImageFolder(tree, test_share=0.01, **options)))
            rows.append(pace(ParquetImages(f"{shards}/*.parquet", **options)))
    write_result(
        "parquet",
        {
            "rows": ROWS,
            "files": FILES,
            "start_s": round(ready, 2),
            "order_s": round(order, 2),
            "memory_gb": round(memory, 2),
            "files_per_cpu_s": round(statistics.median(near), 1),
            "parquet_per_cpu_s": round(statistics.median(rows), 1),
        },
    )


if __name__ == "__main__":
    main()
