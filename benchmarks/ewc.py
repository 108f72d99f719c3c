"""What EWC costs: a training step with its penalty, and the Fisher information at the end of a task.

    python -m benchmarks.ewc             # prints
    python -m benchmarks.ewc --write     # and writes results/ewc.json

Random weights and inputs, one thread, fp32. ResNet-18 is torchvision's, at 32 px; `small_stem` is the variant with a
3 x 3 stem and no pooling. BERT has 6 layers, width 384, 64 tokens, BERT's vocabulary and 2 classes.

* Step: Trainer.fit with and without the callback, in turn; AdamW with its fused kernel, log_every_n_steps 50. Beside
  the callback's two modes stands the penalty that everybody writes, a sum of products added to the loss.
* Fisher: seconds per 1,000 samples by `fisher_diagonal`, trial included, and by a loop over single samples, of one
  forward pass each, one backward pass per class (exact) or one in all (one label drawn), and the squares added up.
  `loop_same_passes` is the loop of callbacks/ewc.py, which needs one pass fewer.

Ratios are medians of those of each round: CPU seconds, since the machine may be shared, and wall seconds beside.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.measure import write_result
from callbacks.ewc.callback import EWC
from callbacks.ewc.fisher import fisher_diagonal
from callbacks.ewc.memory import Memory
from callbacks.ewc.samples import FISHER_BATCH

ROUNDS, STEPS, WARM_UP = 7, 12, 2
SAMPLES, LOOP_SAMPLES, FISHER_ROUNDS = 192, 24, 5


class Classifier(LightningModule):
    """Either net; with `memory`, the loss has the penalty that everybody writes."""

    def __init__(self, net: nn.Module, memory: Memory | None = None) -> None:
        super().__init__()
        self.net, self.memory = net, memory

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return out if isinstance(out, Tensor) else out.logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.memory is not None:
            for name, p in self.named_parameters():
                loss = loss + 0.5 * (self.memory.fisher[name] * (p - self.memory.anchor[name]) ** 2).sum()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5, fused=True)


def resnet(small_stem: bool = False) -> tuple[nn.Module, Tensor, int, int]:
    """Net, inputs, classes and batch size."""
    net = resnet18(num_classes=10)
    if small_stem:
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return net, torch.randn(SAMPLES, 3, 32, 32), 10, 32


def bert() -> tuple[nn.Module, Tensor, int, int]:
    """Net, inputs, classes and batch size."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
    config = BertConfig(**sizes, num_labels=2)
    return BertForSequenceClassification(config), torch.randint(1000, 30000, (SAMPLES, 64)), 2, 16


class Clock(Callback):
    """Seconds of each step, wall and CPU, from the start of its batch to the start of the next."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def on_train_end(self, *args: Any) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def median(self, kind: int) -> float:
        steps = [after[kind] - before[kind] for before, after in zip(self.marks, self.marks[1:], strict=False)]
        return statistics.median(steps[WARM_UP:])


def step(make: Callable[[], tuple[nn.Module, Tensor, int, int]]) -> dict[str, Any]:
    """Seconds of a step in four ways, and their ratios to the plain one."""
    net, x, classes, batch_size = make()
    y = torch.randint(classes, (len(x),))
    rows = torch.arange(STEPS * batch_size) % len(x)
    data = DataLoader(TensorDataset(x[rows], y[rows]), batch_size)
    plain = Classifier(net)
    fisher = {name: 1e-3 * torch.rand_like(p) for name, p in plain.named_parameters()}
    anchor = {name: p.detach().clone() for name, p in plain.named_parameters()}
    memory = Memory(fisher, anchor, [{"name": "a"}])

    def fit(way: str) -> Clock:
        clock = Clock()
        callbacks: list[Callback] = [clock]
        if way in ("gradient", "proximal"):
            ewc = EWC(1.0, way, consolidate=False)  # type: ignore[arg-type]
            ewc.memory = memory
            callbacks.append(ewc)
        Trainer(
            **{"max_epochs": 1, "accelerator": "cpu", "devices": 1, "callbacks": callbacks, "log_every_n_steps": 50},
            **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
            **{"enable_model_summary": False},  # type: ignore[arg-type]
        ).fit(Classifier(net, memory) if way == "autograd" else plain, data)
        return clock

    clocks = {way: [] for way in ("plain", "gradient", "proximal", "autograd")}  # type: dict[str, list[Clock]]
    for _ in range(ROUNDS):
        for way, found in clocks.items():
            found.append(fit(way))
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in plain.parameters()), "batch_size": batch_size}
    for kind, unit in ((1, "cpu"), (0, "wall")):
        seconds = {way: [clock.median(kind) for clock in found] for way, found in clocks.items()}
        figures[f"plain_{unit}_ms"] = round(1e3 * statistics.median(seconds["plain"]), 1)
        for way in ("gradient", "proximal", "autograd"):
            figures[f"{way}_ratio_{unit}"] = ratio(seconds[way], seconds["plain"])
    return figures


def ratio(ours: Iterable[float], theirs: Iterable[float]) -> float:
    """Median over rounds."""
    return round(statistics.median(one / other for one, other in zip(ours, theirs, strict=True)), 3)


def loop(net: Classifier, x: Tensor, exact: bool) -> dict[str, Tensor]:
    """The Fisher as it is defined, a sample at a time."""
    net.eval()
    parameters = list(net.parameters())
    totals = [torch.zeros_like(p) for p in parameters]
    for sample in x.split(1):
        log_p = net(sample).log_softmax(1)[0]
        p = log_p.detach().exp()
        chosen = list(range(len(p))) if exact else [int(torch.multinomial(p, 1))]
        for y in chosen:
            gradients = torch.autograd.grad(log_p[y], parameters, retain_graph=y != chosen[-1], allow_unused=True)
            used = [(total, g) for total, g in zip(totals, gradients, strict=True) if g is not None]
            sums, squared = zip(*used, strict=True)
            torch._foreach_addcmul_(sums, squared, squared, value=float(p[y]) if exact else 1.0)
    return {name: total / len(x) for (name, _), total in zip(net.named_parameters(), totals, strict=True)}


def fisher(make: Callable[[], tuple[nn.Module, Tensor, int, int]], exact: bool) -> dict[str, Any]:
    """Seconds per 1,000 samples, and ratios."""
    net, x, _, _ = make()
    model = Classifier(net)
    few = x[:LOOP_SAMPLES]
    parameters = dict(model.named_parameters())
    estimator: Any = "exact" if exact else "signs"
    batches = {"ours": x.split(FISHER_BATCH), "loop_same_passes": few.split(FISHER_BATCH)}
    ways: dict[str, tuple[int, Callable[[], Any]]] = {
        "ours": (
            len(x),
            lambda: fisher_diagonal(model, batches["ours"], parameters, module=model, estimator=estimator),
        ),
        "loop": (len(few), lambda: loop(model, few, exact)),
        "loop_same_passes": (
            len(few),
            lambda: fisher_diagonal(
                model, batches["loop_same_passes"], parameters, module=model, estimator=estimator, way="loop"
            ),
        ),
    }
    for _, run in list(ways.values())[:2]:
        run()
    seconds: dict[str, dict[str, list[float]]] = {way: {"cpu": [], "wall": []} for way in ways}
    for _ in range(FISHER_ROUNDS):
        for way, (samples, run) in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            seconds[way]["wall"].append((time.perf_counter() - wall) / samples * 1000)
            seconds[way]["cpu"].append((time.process_time() - cpu) / samples * 1000)
    figures: dict[str, Any] = {}
    for unit in ("cpu", "wall"):
        for way in ways:
            figures[f"{way}_{unit}_s_per_1000"] = round(statistics.median(seconds[way][unit]), 1)
        for way in ("loop", "loop_same_passes"):
            figures[f"times_faster_than_{way}_{unit}"] = ratio(seconds[way][unit], seconds["ours"][unit])
    return figures


def run(only: str = "") -> None:
    """Measure, print and, if asked to, write."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    nets = {"resnet18_32px": resnet, "resnet18_32px_small_stem": lambda: resnet(small_stem=True), "bert_6_layers": bert}
    figures: dict[str, Any] = {"rounds": ROUNDS, "fisher_rounds": FISHER_ROUNDS}
    for name, make in nets.items():
        if only not in name:
            continue
        if "small_stem" not in name:
            figures[f"step_{name}"] = step(make)
            print(f"step_{name}", figures[f"step_{name}"], flush=True)
        for kind in ("exact", "one_draw"):
            key = f"fisher_{kind}_{name}"
            figures[key] = fisher(make, kind == "exact")
            print(key, figures[key], flush=True)
    if "--write" in sys.argv:
        write_result("ewc", figures)


if __name__ == "__main__":
    run(next((argument for argument in sys.argv[1:] if not argument.startswith("-")), ""))
