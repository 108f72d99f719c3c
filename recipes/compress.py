"""Make a trained net small: zeros, channels cut out, 8 bits; measured, with intervals, and the best of them to ship.

    python -m recipes.compress runs/vision/x/.../checkpoints/best.ckpt
    python -m recipes.compress best.ckpt --cut 0.3,0.6 --sparsity 0.9 --epochs 5 --max_drop 0.02

Each variant is written as ONNX, as `recipes.export` does, and run by onnxruntime on the validation samples, on which it
is compared with the net as it is: the difference of accuracy, F1 or Spearman's correlation has a 95 % interval. The
smallest file is chosen whose interval stays above `-max_drop`.

| variant | how |
|---|---|
| sparse | the smallest weights become zero while the net trains on (callbacks.Prune); the checkpoint gets smaller |
| cut | channels, of encoders hidden units, are cut out until a share of the multiplications is gone; trains on |
| int8 | each of these in 8 bits: calibrated on images, dynamic for texts; another setting where one costs too much |

What was trained, written and measured is kept: a command that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from callbacks.report.figures import HUES, figure, number, svg
from callbacks.report.outputs import Predictions

from . import text, vision
from .cli import early
from .cli.screen import configure_logging, filter_warnings
from .deploy.data import data_for
from .deploy.mixing import End
from .deploy.quantising import SETTINGS, answer_of, calibration_of, has_vnni, inputs_of, quantise, session
from .deploy.restored import restore
from .deploy.shrinking import Recovery, cut, example
from .deploy.variants import Held, Variants, digest_of_files, figures, show, write_page
from .export import export
from .parts.pruning import macs, pack_zeros

MAIN = {"vision": vision.main, "text": text.main}
CALLS = {1: 100, 32: 10}  # batch -> how often its time is taken
COLUMNS = (
    *("variant", "file MB", "weights MB", "not zero", "MACs, M"),
    *("ms, batch 1", "p95", "ms, batch 32", "p95", "a second"),
)


@dataclass
class Options:
    """What the command line says.

    Args:
        cut: Shares of the multiplications to cut.
        sparsity: Shares of weights that become zero.
        epochs: How long a net trains on.
        max_drop: Of the figure that a variant to ship may lose at most.
        int8: Whether variants are written in 8 bits, too.
        lr_factor: On the run's learning rates, while a net trains on.
        data: Config of the data, where not the run's own.
        test: Whether the chosen variant is measured on the test split.
        plan: Whether to say what would be done, and no more.
        out: The folder; below runs/compress if not given.
    """

    cut: Sequence[float] = (0.5,)
    sparsity: Sequence[float] = (0.8,)
    epochs: int = 3
    max_drop: float = 0.01
    int8: bool = True
    lr_factor: float = 1.0
    data: str | None = None
    test: bool = False
    plan: bool = False
    out: Path | None = None


class Compression:
    """A net, its variants, and what they are worth.

    Args:
        path: A checkpoint, or the folder of a run.
        options: Of the command.
    """

    def __init__(self, path: Path, options: Options) -> None:
        self.options, self.end = options, End(path)
        self.net = self.end.restored()
        if options.data is None and self.net.run is None:
            raise ValueError("the checkpoint has been moved away from its run's config.yaml: it can't train on without")
        self.data = data_for(self.net, options.data)
        if options.test and "test" not in self.data.splits:
            raise ValueError("--test: the data have no test split")
        facts = (options.epochs, options.lr_factor, options.data, self.data.fingerprint("val"))
        assert self.net.run is not None
        name = f"{self.net.run.parent.name}-{digest_of_files([self.end.path], facts)}"
        self.folder = options.out or Path("runs") / "compress" / name
        held = [Held("val", self.data, "val"), *([Held("test", self.data, "test")] if options.test else [])]
        self.variants = Variants(self.folder, held)
        self.files: dict[str, Path] = {}  # variant -> folder of its export
        self.checkpoints: dict[str, Path] = {}
        self.found: dict[str, dict[str, Predictions]] = {}

    def nets(self) -> Iterator[tuple[str, Path]]:
        """Name and checkpoint of each net in float32; those that are not there yet are trained."""
        yield "as it is", self.end.path
        options = self.options
        head = "|".join(f"^{re.escape(path)}[.]" for path in self.net.model.layer_groups()["head"])
        for share in options.sparsity:
            how = {"sparsity": share, "end": 0.6, "exclude": head}
            prune = {"class_path": "callbacks.Prune", "init_args": how}
            recovery = Recovery(self.main, options.epochs, callbacks=[prune], lr_factor=options.lr_factor)
            folder = self.folder / "nets" / f"sparse_{share:g}"
            yield f"sparse {share:g}", recovery.run(self.end, self.end.weights, folder)
        for share in options.cut:
            net = self.end.restored()
            folder = self.folder / "nets" / f"cut_{share:g}"
            sizes = {} if (folder / "checkpoints" / "done").is_file() else cut(net, share)
            recovery = Recovery(self.main, options.epochs, sizes, net.model.facts(), lr_factor=options.lr_factor)
            yield f"cut {share:g}", recovery.run(self.end, net.model.state_dict, folder)

    @property
    def main(self) -> Callable[[list[str]], Any]:
        """Of the recipe."""
        return MAIN[self.net.recipe]

    def measure(self, name: str, checkpoint: Path, folder: Path) -> None:
        """Note a variant, and find its answers, if they are not there."""
        self.files[name], self.checkpoints[name] = folder, checkpoint
        self.found[name] = self.variants.answers(name, lambda: lambda held: answer_of(folder / "model.onnx"))

    def written(self, name: str, checkpoint: Path) -> Path:
        """The export of a net in float32."""
        folder = self.folder / "exports" / name.replace(" ", "_")
        return folder if folder.is_dir() else export(checkpoint, "onnx", folder)

    def in_8_bits(self, name: str, checkpoint: Path, source: Path) -> None:
        """The same, in 8 bits: the first setting that costs no more than is allowed, or else that which costs least."""
        tried = {}
        for setting in SETTINGS if self.net.recipe == "vision" else SETTINGS[:1]:
            title = setting.name if name == "as it is" else f"{name}, {setting.name}"
            folder = source.with_name(title.replace(" ", "_").replace(",", ""))
            if not folder.is_dir():
                part = folder.with_name(f".{folder.name}")
                shutil.rmtree(part, ignore_errors=True)
                shutil.copytree(source, part, ignore=shutil.ignore_patterns("model.onnx*"))
                quantise(source / "model.onnx", part / "model.onnx", calibration_of(self.net, self.data), setting)
                part.rename(folder)
            self.measure(title, checkpoint, folder)
            tried[title] = lowest(self.gain(title, name))
            if tried[title] > -self.options.max_drop:
                break
        best = max(tried, key=lambda title: tried[title])
        for title in tried:
            if title != best:
                del self.files[title], self.found[title]

    def gain(self, name: str, over: str = "as it is", split: str = "val") -> Mapping[str, Any]:
        """What a variant gains over another in the most important figure."""
        return figures({split: self.found[name][split]}, self.found[over])[split][0]

    def run(self) -> dict[str, Any]:
        """Make and measure all variants; returns the report."""
        for name, checkpoint in self.nets():
            source = self.written(name, checkpoint)
            self.measure(name, checkpoint, source)
            if self.options.int8:
                self.in_8_bits(name, checkpoint, source)
        times = self.times()
        rows = [self.row(name, times[name]) for name in self.files]
        fit = [row for row in rows if lowest(row["gain"]) > -self.options.max_drop or row["name"] == "as it is"]
        chosen = min(fit, key=lambda row: row["bytes"])
        return told(self, rows, chosen)

    def row(self, name: str, times: Mapping[str, Any]) -> dict[str, Any]:
        """What is known of a variant."""
        net = restore(self.checkpoints[name])
        net.merge()
        parameters = [p for p in net.model.parameters() if p.is_floating_point()]
        answers, whole = (self.found[one]["val"].logits for one in (name, "as it is"))
        same = (answers.argmax(1) == whole.argmax(1)).float().mean() if answers.shape[1] > 1 else None
        return {
            "name": name,
            "bytes": sum(file.stat().st_size for file in self.files[name].glob("model.onnx*")),
            "weight_bytes": None if "int8" in name else weight_bytes(net.model.state_dict()),
            "parameters": sum(p.numel() for p in parameters),
            "zeros": sum(int((p == 0).sum()) for p in parameters),
            "macs": macs(net.model, example(net, 1)),
            "times": times,
            "gain": self.gain(name),
            "agreement": None if same is None else float(same),
            "folder": str(self.files[name]),
            "checkpoint": None if "int8" in name else str(self.checkpoints[name]),
        }

    def times(self) -> dict[str, dict[str, Any]]:
        """Milliseconds of a call of each variant, taken in turns, on one thread; of the first time they were taken."""
        file = self.folder / "times.json"
        if file.is_file() and (kept := json.loads(file.read_text())).keys() == self.files.keys():
            return dict(kept)
        opened = {name: session(folder / "model.onnx", threads=1) for name, folder in self.files.items()}
        found: dict[str, dict[str, Any]] = {name: {} for name in opened}
        for batch, calls in CALLS.items():
            given = self.some(batch)
            taken: dict[str, list[float]] = {name: [] for name in opened}
            for turn in range(calls + 1):
                for name, one in opened.items():
                    inputs = inputs_of(given, [i.name for i in one.get_inputs()])
                    start = time.perf_counter()
                    one.run(["logits"], inputs)
                    if turn:  # the first warms up
                        taken[name].append(1000 * (time.perf_counter() - start))
            for name, many in taken.items():
                p50, p95 = np.quantile(many, [0.5, 0.95]).tolist()
                found[name][str(batch)] = {"p50": p50, "p95": p95, "per_s": 1000 * batch / statistics.median(many)}
        file.write_text(json.dumps(found, indent=1))
        return found

    def some(self, count: int) -> Mapping[str, Any]:
        """The first validation samples, repeated where they are too few, as one batch."""
        batch = next(Held("val", self.data, "val").batches(torch.device("cpu")))
        rows = torch.arange(count) % len(batch["label"])
        return {name: value[rows] for name, value in batch.items() if torch.is_tensor(value)}


def lowest(gain: Mapping[str, Any]) -> float:
    """The lower end of a gain's interval."""
    return float(gain["interval"][0])


def weight_bytes(state: Mapping[str, torch.Tensor]) -> int:
    """Of weights as a checkpoint holds them: zeros take no room."""
    dense, packed = pack_zeros(state)
    parts = [*dense.values(), *(one[key] for one in packed.values() for key in ("bits", "values"))]
    return sum(part.nbytes for part in parts)


def told(done: Compression, rows: Sequence[dict[str, Any]], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The report."""
    gain = chosen["gain"]
    columns = [*COLUMNS, gain["name"], "difference", "95 %", "same answers"]
    table = []
    for row in rows:
        one, many, (low, high) = row["times"]["1"], row["times"]["32"], row["gain"]["interval"]
        weights = "" if row["weight_bytes"] is None else f"{row['weight_bytes'] / 1e6:.2f}"
        alive = row["parameters"] - row["zeros"]
        table.append([
            row["name"], f"{row['bytes'] / 1e6:.2f}", weights, f"{alive:,}", f"{row['macs'] / 1e6:,.1f}",
            f"{one['p50']:.2f}", f"{one['p95']:.2f}",
            f"{many['p50']:.1f}", f"{many['p95']:.1f}", f"{many['per_s']:,.0f}",
            number(row["gain"]["other"]), f"{row['gain']['gain']:+.3f}", f"{low:+.3f} to {high:+.3f}",
            "" if row["agreement"] is None else f"{row['agreement']:.3f}",
        ])  # fmt: skip
    whole = rows[0]
    words = (
        f"To ship: {chosen['name']}, {whole['bytes'] / chosen['bytes']:.1f} times smaller and "
        f"{whole['times']['1']['p50'] / chosen['times']['1']['p50']:.2f} times as fast at batch 1; its "
        f"{gain['name']} is {number(gain['other'])}, {gain['gain']:+.3f} (95 % interval {gain['interval'][0]:+.3f} to "
        f"{gain['interval'][1]:+.3f}) to the net as it is."
    )
    facts = {
        "net": str(done.end.path),
        "folder to ship": chosen["folder"],
        "most that may be lost": done.options.max_drop,
    }
    if done.options.test:
        tested = done.gain(chosen["name"], split="test")
        low, high = tested["interval"]
        facts["on the test split"] = f"{number(tested['other'])}, {tested['gain']:+.3f} ({low:+.3f} to {high:+.3f})"
    if done.options.int8 and not has_vnni():
        words += (
            " This processor has no instructions for products of 8-bit numbers: int8 is smaller, and may be slower."
        )
    return {
        "version": 1,
        "title": f"{done.net.run.parent.name if done.net.run else done.end.path.stem}, made small",
        "verdict": words,
        "facts": facts,
        "columns": columns,
        "table": table,
        "rows": list(rows),
        "chosen": chosen["name"],
    }


def draw(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figure of each variant over the size of its file, with the interval of the difference."""
    made, axes = figure()
    for row, hue in zip(report["rows"], HUES * len(report["rows"]), strict=False):
        gain, size = row["gain"], row["bytes"] / 1e6
        low, high = (gain["other"] - gain["gain"] + end for end in gain["interval"])
        axes.plot([size, size], [low, high], color=hue, linewidth=1)
        axes.plot([size], [gain["other"]], "o", color=hue, markersize=4, label=row["name"])
    axes.set_xscale("log")
    axes.set_xlabel("MB of the file")
    axes.set_ylabel(report["rows"][0]["gain"]["name"])
    axes.legend(fontsize=7)
    words = "; ".join(
        f"{row['name']} {row['bytes'] / 1e6:.2f} MB, {number(row['gain']['other'])}" for row in report["rows"]
    )
    return [(svg(made), f"{words}. Lines: 95 % intervals of the difference to the net as it is.")]


def show_plan(done: Compression) -> None:
    """Say what would be done."""
    options = done.options
    trained = [f"sparse {x:g}" for x in options.sparsity] + [f"cut {x:g}" for x in options.cut]
    count = len(trained) + 1
    print(f"net: {done.end.path}, {sum(p.numel() for p in done.net.model.parameters()):,} parameters")
    print(f"trained on for {options.epochs} epochs each: {', '.join(trained) or 'none'}")
    settings = len(SETTINGS) if done.net.recipe == "vision" else 1
    print(
        f"measured: {count} in float32"
        + (f", and in 8 bits by at most {settings} settings each" if options.int8 else "")
    )
    print(f"measured on: val, {len(done.data.splits['val'].labels):,} samples\nfolder: {done.folder}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        "python -m recipes.compress", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("net", type=Path, help="a checkpoint, or the folder of a run")
    parser.add_argument("--cut", default="0.5", help="shares of the multiplications to cut (default 0.5); '' for none")
    parser.add_argument("--sparsity", default="0.8", help="shares of weights to set to zero (default 0.8); '' for none")
    parser.add_argument("--epochs", type=int, default=3, help="a net trains on for so many (default 3)")
    parser.add_argument("--max_drop", type=float, default=0.01, help="what may be lost at most (default 0.01)")
    parser.add_argument("--lr_factor", type=float, default=1.0, help="on the run's learning rates (default 1)")
    parser.add_argument("--no_int8", action="store_true", help="float32 only")
    parser.add_argument("--data", metavar="CONFIG", help="measure on its data, not on those of the run")
    parser.add_argument("--test", action="store_true", help="measure on the test split, too")
    parser.add_argument("--out", type=Path, help="the folder; by default runs/compress/<run>-<digits>")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and no more")
    given = parser.parse_args(argv)
    filter_warnings()
    configure_logging()
    try:
        options = Options(
            shares(given.cut, "--cut"), shares(given.sparsity, "--sparsity"), given.epochs, given.max_drop,
            not given.no_int8, given.lr_factor, given.data, given.test, given.plan, given.out,
        )  # fmt: skip
        run(given.net, options)
    except (ValueError, OSError, ImportError) as error:
        early.stop(str(error))


def run(path: Path, options: Options) -> Path:
    """Compress; returns the folder."""
    done = Compression(path, options)
    if options.plan:
        show_plan(done)
        return done.folder
    report = done.run()
    write_page(done.folder, report, draw(report))
    show(report["columns"], report["table"])
    print(report["verdict"])
    print(f"report: {done.folder / 'report.html'}")
    return done.folder


def shares(words: str, option: str) -> list[float]:
    """Numbers between commas.

    Raises:
        ValueError: One is no share.
    """
    try:
        found = [float(word) for word in words.split(",") if word.strip()]
    except ValueError:
        found = [-1.0]
    if not all(0 < share < 1 for share in found):
        raise ValueError(f"{option} takes shares above 0 and below 1 with commas between them; received {words!r}")
    return found


if __name__ == "__main__":
    main()
