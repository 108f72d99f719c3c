"""Mix the weights of finished nets, (1 - a) * old + a * new, and keep the mixture that is best on held-out samples.

    python -m recipes.interpolate runs/vision/x/...                      from where a run started to where it ended
    python -m recipes.interpolate old.ckpt new.ckpt --also vision/old    from one net to another
    python -m recipes.interpolate a.ckpt b.ckpt c.ckpt                   their soup: the mean of those that go together

A net between the start of a fine-tuning and its end often knows the new task as well as the end, and has forgotten less
(Wortsman et al. 2022, https://arxiv.org/abs/2109.01903); `--also` names data of what it is not to forget, or on which
it is to hold. The mean of several runs from one start is often better than the best of them (Wortsman et al. 2022,
https://arxiv.org/abs/2203.05482), if no barrier lies between them, which is measured first.

Heads of other classes are left alone: each answers for its own data. Statistics of BatchNorm are measured anew, on
training images. The place is chosen on validation samples, by the mean over all data of accuracy, F1 of all labels or
Spearman's correlation. What was measured is kept, so that the same command goes on where it was killed. In the end the
folder holds `checkpoints/best.ckpt`, which predict, export and serve take, a `report.html` and a `report.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from . import text, vision  # noqa: F401  whose checkpoints are mixed
from .cli import early
from .cli.screen import configure_logging, counted, filter_warnings
from .deploy.lines import COARSE, Mixing, Options, draw, line, soups
from .deploy.variants import show, write_page


def show_plan(mixing: Mixing) -> None:
    """Say what would be done."""
    count, blocks = len(mixing.ends), len(mixing.blocks)
    print(f"nets: {', '.join(mixing.names)}")
    print(f"mixed: {counted(len(mixing.shared), 'tensor')} of {', '.join(mixing.blocks)}")
    print(f"BatchNorm: {'measured anew for each mixture' if mixing.mixture.remeasured else 'as it is'}")
    for held in mixing.held:
        print(f"measured on: {held.name}, {counted(len(held.data.splits['val'].labels), 'sample')}")
    if count > 2:
        print(f"mixtures: at most {count + (count - 1) * 2}, after {counted(count - 1, 'barrier')}")
    else:
        search = (
            f", then at most {blocks * (len(COARSE) - 1) + 1} of the search per block"
            if mixing.options.per_block
            else ""
        )
        print(f"mixtures: a = {', '.join(f'{a:g}' for a in sorted({0.0, 1.0, *mixing.options.at}))}{search}")
    print(f"folder: {mixing.folder}")


def run(paths: Sequence[Path], options: Options) -> Path:
    """Mix, choose and write; returns the folder."""
    mixing = Mixing(paths, options)
    if options.plan:
        show_plan(mixing)
        return mixing.folder
    done = mixing.folder / "report.json"
    if not done.is_file():
        report = line(mixing) if len(paths) < 3 else soups(mixing)
        write_page(mixing.folder, report, draw(report) if "places" in report else [])
    report = json.loads(done.read_text(encoding="utf-8"))
    show(report["columns"], report["table"])
    print(report["verdict"])
    print(f"report: {mixing.folder / 'report.html'}\ncheckpoint: {report['facts']['checkpoint']}")
    return mixing.folder


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        "python -m recipes.interpolate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nets", type=Path, nargs="+", metavar="NET", help="a checkpoint, or the folder of a run")
    parser.add_argument("--at", help="places on the line, as in 0.3,0.5; by default 0, 0.1 and so on to 1")
    parser.add_argument("--also", action="append", default=[], metavar="CONFIG", help="measure on its data, too")
    parser.add_argument("--data", metavar="CONFIG", help="measure on its data, not on those of the run")
    parser.add_argument("--per_block", action="store_true", help="search a place for each block")
    parser.add_argument("--extrapolate", action="store_true", help="allow places below 0 and above 1")
    parser.add_argument("--test", action="store_true", help="measure ends and choice on the test split, too")
    parser.add_argument("--base", help="the weights that checkpoints of adapters were trained beside, if they moved")
    parser.add_argument("--out", type=Path, help="the folder; by default runs/interpolate/<run>-<digits>")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and no more")
    given = parser.parse_args(argv)
    filter_warnings()
    configure_logging()
    try:
        places = places_of(given.at, extrapolate=given.extrapolate)
        options = Options(
            places, given.also, given.data, given.per_block, given.test, given.base, given.plan, given.out
        )
        run(given.nets, options)
    except (ValueError, OSError, ImportError) as error:
        early.stop(str(error))


def places_of(words: str | None, *, extrapolate: bool) -> list[float]:
    """Places on the line.

    Raises:
        ValueError: One is no number, or lies beyond the ends where that is not allowed.
    """
    if words is None:
        return [place / 10 for place in range(0, 16 if extrapolate else 11)]
    try:
        found = [float(word) for word in words.split(",")]
    except ValueError:
        raise ValueError(f"--at takes numbers with commas between them, as in 0.3,0.5; received {words!r}") from None
    beyond = [place for place in found if not 0 <= place <= 1]
    if beyond and not extrapolate:
        raise ValueError(f"--at {beyond[0]:g} lies beyond the ends, 0 and 1: add --extrapolate if that is meant")
    return found


if __name__ == "__main__":
    main()
