"""A line from one net to another, and soups of several: measured on held-out samples, the best of them chosen."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from callbacks.report.comparison import gain_in_words
from callbacks.report.figures import HUES, add_legend, figure, number, svg
from callbacks.report.outputs import Predictions

from ..parts.soups import Weights, barrier, greedy, interpolate, mean_of, search_blocks
from ..parts.spelling import some
from .data import data_for
from .mixing import End, Mixture, in_any, mixable, norms_differ, write_run
from .restored import start_of
from .variants import Held, Variants, digest_of_files, figure_of, figures

HIGHEST_BARRIER = 0.02  # two nets with a higher one, beyond chance, are not in one basin (Frankle et al. 2020)
COARSE = (0.0, 0.25, 0.5, 0.75, 1.0)  # places that are tried for each block
Found = dict[str, Predictions]  # name of held samples -> what a mixture answers


@dataclass
class Options:
    """What the command line says.

    Args:
        at: Places on the line.
        also: Configs of other data to measure on.
        data: Config of the data, where not the run's own.
        per_block: Whether each block gets a place of its own.
        test: Whether the ends and the best mixture are measured on the test split, too.
        base: Where the weights are that checkpoints of adapters leave out.
        plan: Whether to say what would be done, and no more.
        out: The folder; below runs/interpolate if not given.
    """

    at: Sequence[float]
    also: Sequence[str] = ()
    data: str | None = None
    per_block: bool = False
    test: bool = False
    base: str | None = None
    plan: bool = False
    out: Path | None = None


class Mixing:
    """The nets of a command, the samples, and what mixtures are worth on them.

    Args:
        paths: Checkpoints, or folders of runs; of one, its start comes first.
        options: Of the command.

    Raises:
        FileNotFoundError: A checkpoint, its data or the weights that it began with are gone.
        ValueError: The nets are not alike.
    """

    def __init__(self, paths: Sequence[Path], options: Options) -> None:
        self.options, self.ends = options, [End(path, options.base) for path in paths]
        self.last = self.ends[-1]
        net = self.last.restored()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        net.model.to(device)
        self.names = [str(end.path) for end in self.ends]
        known, alike = {}, True  # what each of the other nets tells apart
        for name, end in zip(self.names, self.ends[:-1], strict=False):
            other = end.restored()
            if other.recipe != net.recipe:
                raise ValueError(f"{name} is of recipes.{other.recipe}, and {self.names[-1]} of recipes.{net.recipe}")
            known[name] = end, other.class_names
            alike &= other.learnt == net.learnt
        if not alike and len(paths) > 2:
            raise ValueError("the nets of a soup need the same classes in the same order, or scores on one scale")
        self.held, heads = [], {}
        try:
            data = data_for(net, options.data)
        except FileNotFoundError as error:
            if options.data is None and net.run is None:
                raise ValueError(f"{error}: say with --data which samples to measure on") from error
            raise
        self.held.append(Held("val", data, "val"))
        for config in options.also:
            held = Held(config, data_for(net, config), "val")
            asked = list(held.data.class_names)
            if asked != net.class_names:
                owner = next((end for end, names in known.values() if names == asked), None)
                if owner is None:
                    raise ValueError(f"no net of these has a head for {config}, whose classes are {some(asked)}")
                heads[config] = owner.restored()
                heads[config].model.to(device)
            self.held.append(held)
        self.tested = [Held("test", data, "test")] if options.test else []
        if options.test and "test" not in data.splits:
            raise ValueError("--test: the data have no test split")
        apart = [] if alike and len(paths) > 1 else net.model.layer_groups()["head"]
        self.start: Weights = start_of(self.last.path, options.base) if len(paths) == 1 else self.ends[0].weights()
        names = ("its start" if len(paths) == 1 else self.names[0], self.names[-1])
        self.shared = mixable(self.start, self.last.weights(), apart, names, whole=len(paths) > 1)
        for name, end in zip(self.names[1:-1], self.ends[1:-1], strict=True):
            mixable(end.weights(), self.last.weights(), (), (name, self.names[-1]))
        differ = norms_differ(chain([self.start], (end.weights() for end in self.ends)))
        self.mixture = Mixture(net, heads, data, remeasured=differ)
        self.blocks = {
            name: [tensor for tensor in self.shared if in_any(tensor, block)]
            for name, block in net.model.layer_groups().items()
        }
        self.blocks = {name: tensors for name, tensors in self.blocks.items() if tensors}
        facts = (sorted(options.also), options.data, options.at, options.per_block, options.test)
        self.digest = digest_of_files([end.path for end in self.ends], facts, data.fingerprint("val"))
        run = net.run.parent.name if net.run else self.last.path.stem
        self.folder = options.out or Path("runs") / "interpolate" / f"{run}-{self.digest}"
        self.variants = Variants(self.folder, self.held, device)
        self.finals = Variants(self.folder, [*self.held, *self.tested], device)

    def between(self, at: float | Mapping[str, float], variants: Variants | None = None) -> Found:
        """What the mixture at a place answers, or at a place of each block."""
        key = f"a = {at!r}" if isinstance(at, float) else json.dumps(at)

        def make() -> Any:
            return self.mixture.make(self.weights(at), remeasure=at not in (0.0, 1.0))

        return (variants or self.variants).answers(key, make)

    def weights(self, at: float | Mapping[str, float]) -> Iterator[tuple[str, Tensor]]:
        """Those of the net at a place, one after the other, without BatchNorm measured anew."""
        if isinstance(at, Mapping):
            at = {name: place for block, place in at.items() for name in self.blocks[block]}
        start = {name: self.start[name] for name in self.shared}
        return interpolate(start, self.last.weights(), at)

    def soup(self, members: Sequence[int], variants: Variants | None = None) -> Found:
        """What the mean of some of the nets answers."""

        def make() -> Any:
            return self.mixture.make(
                mean_of([self.ends[member].weights() for member in members]), remeasure=len(members) > 1
            )

        return (variants or self.variants).answers(f"mean of {list(members)}", make)


def score(found: Found) -> float:
    """The mean of the most important figure over all data."""
    return sum(map(figure_of, found.values())) / len(found)


def line(mixing: Mixing) -> dict[str, Any]:
    """Go along the line from the first net to the last; returns the report."""
    options = mixing.options
    places = sorted({0.0, 1.0, *options.at})
    found = {a: mixing.between(a) for a in places}
    scores = {a: score(one) for a, one in found.items()}
    best: Any = max(places, key=lambda a: (scores[a], -abs(a - 0.5)))
    rows = [(f"{a:g}", found[a]) for a in places]
    if options.per_block:
        best = search_blocks(dict.fromkeys(mixing.blocks, best), COARSE, lambda at: score(mixing.between(at)))
        rows.append(("per block", mixing.between(best)))
    wall = barrier(scores, rises=True)
    above = {a: scores[a] - (1 - a) * scores[0.0] - a * scores[1.0] for a in places}
    highest = max(places, key=lambda a: above[a])
    facts = {
        "nets": " → ".join(mixing.names if len(mixing.names) > 1 else ["its start", *mixing.names]),
        "mixed": f"{len(mixing.shared)} tensors of {', '.join(mixing.blocks)}",
        "barrier": f"{wall:.4f}",
        "above the straight line": f"by {above[highest]:.4f} at a = {highest:g}",
        "chosen": f"a = {best:g}" if isinstance(best, float) else ", ".join(f"{k} {v:g}" for k, v in best.items()),
    }
    chosen = mixing.between(best, mixing.finals)
    ends = {"start": mixing.between(0.0, mixing.finals), "end": mixing.between(1.0, mixing.finals)}
    mixing.mixture.make(mixing.weights(best), remeasure=best not in (0.0, 1.0))
    return told(mixing, rows, chosen, ends, facts) | {"places": places, "barrier": wall, "at": best}


def soups(mixing: Mixing) -> dict[str, Any]:
    """Join several nets; returns the report.

    Raises:
        ValueError: A barrier lies between the best of them and another.
    """
    single = [mixing.soup([member]) for member in range(len(mixing.ends))]
    order = sorted(range(len(single)), key=lambda member: -score(single[member]))
    walls = {}  # the barrier, and what it is at least, half way to the best
    for other in order[1:]:
        half = mixing.soup(sorted((order[0], other)))
        gains = [figures(half, single[one])[name][0] for one in (order[0], other) for name in half]
        walls[other] = [-sum(g) / len(gains) for g in zip(*((g["gain"], g["interval"][1]) for g in gains), strict=True)]
    apart = [other for other in order[1:] if walls[other][1] > HIGHEST_BARRIER]
    if apart:
        names = "; ".join(f"{mixing.names[other]}: {walls[other][0]:.3f}" for other in apart)
        raise ValueError(
            f"no soup: half way to {mixing.names[order[0]]}, the best, the figure falls by more than "
            f"{HIGHEST_BARRIER} below the mean of both ({names}); nets can be joined that began with the same weights"
        )
    everyone = sorted(order)
    taken = sorted(map(int, greedy([str(one) for one in order], lambda m: score(mixing.soup(sorted(map(int, m)))))))
    named = [(mixing.names[one], [one]) for one in everyone] + [("mean of all", everyone), ("greedy", taken)]
    rows = [(name, mixing.soup(members)) for name, members in named]
    best = max((members for _, members in named), key=lambda members: score(mixing.soup(members)))
    chosen, ends = mixing.soup(best, mixing.finals), {"best": mixing.soup(order[:1], mixing.finals)}
    mixing.mixture.make(mean_of([mixing.ends[one].weights() for one in best]), remeasure=len(best) > 1)
    facts = {
        "nets": ", ".join(mixing.names),
        "barrier": f"at most {max(wall for wall, _ in walls.values()):.4f}",
        "greedy": f"the mean of {', '.join(mixing.names[one] for one in taken)}",
        "chosen": f"the mean of {', '.join(mixing.names[one] for one in best)}",
    }
    return told(mixing, rows, chosen, ends, facts) | {
        "barriers": {mixing.names[k]: wall for k, (wall, _) in walls.items()},
        "members": best,
    }


def told(
    mixing: Mixing,
    rows: Sequence[tuple[str, Found]],
    chosen: Found,
    ends: Mapping[str, Found],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The report, once the chosen weights, which the net has by now, are written.

    Args:
        mixing: The command's.
        rows: Name and answers of each mixture.
        chosen: Answers of the best, on the test split, too, where asked for; so are those of the ends.
        ends: The last is what mixtures are compared with.
        facts: For the page.
    """
    checkpoint = write_run(mixing.last, mixing.mixture.net.model.state_dict(), mixing.folder)
    reference = list(ends.values())[-1]
    columns = ["a" if "start" in ends else "net"]
    columns += chain.from_iterable((held.name, "gain", "95 %") for held in mixing.held)
    own = {held.name: reference[held.name] for held in mixing.held}
    compared = [(name, figures(found, own)) for name, found in rows]
    gains, words = figures(chosen, reference), []
    for name, (first, *_) in gains.items():
        gain = gain_in_words("the mixture", first)
        words.append(f"On {name} {gain['run']} {gain['words']} {list(ends)[-1]}: {gain['by']}.")
    return {
        "version": 1,
        "title": "A line between two nets" if "start" in ends else f"A soup of {len(mixing.ends)} nets",
        "verdict": " ".join([f"Chosen: {facts['chosen']}.", *words]),
        "facts": {**facts, "checkpoint": str(checkpoint)},
        "columns": columns,
        "table": [[name, *chain.from_iterable(cells(first) for first, *_ in one.values())] for name, one in compared],
        "rows": [{"name": name, "figures": one} for name, one in compared],
        "chosen": gains,
        "ends": {name: figures(found, reference) for name, found in ends.items()},
    }


def cells(compared: Mapping[str, Any]) -> list[str]:
    """A figure, its gain and the interval of that, for a table."""
    low, high = compared["interval"]
    return [number(compared["other"]), f"{compared['gain']:+.3f}", f"{low:+.3f} to {high:+.3f}"]


def draw(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figure over a, on each data set, and against each other where there are two."""
    lines = [(row, a) for row, a in zip(report["rows"], report["places"], strict=False)]
    names = list(lines[0][0]["figures"])
    values = {name: [row["figures"][name][0]["other"] for row, _ in lines] for name in names}
    what = lines[0][0]["figures"][names[0]][0]["name"]
    made, axes = figure()
    for name, hue in zip(names, HUES, strict=False):
        axes.plot(report["places"], values[name], "-o", color=hue, markersize=3, label=name)
    axes.set_xlabel("a")
    axes.set_ylabel(what)
    add_legend(axes)
    words = "; ".join(
        f"{name}: {number(many[0])} to {number(many[-1])}, at most {number(max(many))}" for name, many in values.items()
    )
    drawn = [(svg(made), f"{what} from the start (0) to the end (1): {words}")]
    for other, hue in zip(names[1:], HUES[1:], strict=False):
        made, axes = figure()
        axes.plot(values[names[0]], values[other], "-o", color=hue, markersize=3)
        axes.plot([values[names[0]][i] for i in (0, -1)], [values[other][i] for i in (0, -1)], "--", color=HUES[5])
        axes.set_xlabel(f"{what}, {names[0]}")
        axes.set_ylabel(f"{what}, {other}")
        drawn.append((svg(made), f"{other} against {names[0]}; dashed: the straight line between the ends"))
    return drawn
