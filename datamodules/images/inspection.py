"""Inspects images before anyone trains on them: what cannot be read, what occurs twice, what is odd."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..sampling.leaks import Place, conflicts, counts_of, groups_of, leaks, quantiles
from .sources import ImageSource

SIDE = 16  # of the thumbnails by which rescaled copies are found
NEAREST = 16  # images that each is held against cell by cell
THIRD = 3  # among its nearest that are no certain copies: how near images come to each other by chance
CERTAIN = 0.2  # largest difference in any cell, in standard deviations of the image, that only a copy has
LIKELY = 0.1  # the same times the nearness, for images that JPEG or their size has harmed
FAR = 0.5  # distance at which nothing is a copy: a cosine of 0.875
CONTRAST = 0.7  # of an image to its copy's at least: the same sign in grey and in black are two
FLAT = 2.0  # standard deviation of a thumbnail below which it shows nothing that could be told from others
LARGE = 200_000  # images above which all pairs take too long: only exact copies are found
SAME = {"MPO": "JPEG", "DIB": "BMP"}  # formats whose files may have the ending of another


class ImageStats(NamedTuple):
    """What is noted of one image."""

    row: int
    error: str
    misnamed: str
    mode: str
    size: tuple[int, int]
    pixels: bytes  # a hash of the decoded pixels
    thumbnail: npt.NDArray[np.uint8]  # (SIDE * SIDE * 3,)
    mean: npt.NDArray[np.float32]  # of each channel, in [0, 1]
    square: npt.NDArray[np.float32]  # mean of squares of each channel


def image_stats(images: ImageSource, index: int) -> ImageStats:
    """Decode one image as training would, and note what it is."""
    name = images.name(index)
    mode, misnamed, nothing = "RGB", "", np.zeros(3, np.float32)
    try:
        if (path := Path(name)).is_file():
            with Image.open(path) as file:
                mode, form = file.mode, str(file.format)
            ending = path.suffix.lower()
            if Image.registered_extensions().get(ending) not in {form, SAME.get(form)}:
                misnamed = f"is {form}, not {ending}"
        image = images.read(index)
    except Exception as error:  # as in `decode`, whichever the decoder raises
        sentence = " ".join(str(error).split())
        return ImageStats(index, sentence, "", "", (0, 0), b"", np.zeros(SIDE * SIDE * 3, np.uint8), nothing, nothing)
    pixels = np.asarray(image)
    values = pixels.reshape(-1, 3).astype(np.float32) / 255
    small = image.resize((SIDE, SIDE), Image.Resampling.HAMMING)  # BOX rounds: it differs where 16 divides one side
    thumbnail = np.asarray(small).reshape(-1)
    digest = hashlib.blake2b(pixels.tobytes() + repr(image.size).encode(), digest_size=16).digest()
    return ImageStats(index, "", misnamed, mode, image.size, digest, thumbnail, values.mean(0), (values**2).mean(0))


def batch_stats(images: ImageSource, indices: Sequence[int]) -> list[ImageStats]:
    """Of some images."""
    return [image_stats(images, index) for index in indices]


def stats_of_all(images: ImageSource, split: str, workers: int) -> list[ImageStats]:
    """Of every image of a split, with a progress bar."""
    indices: Any = range(len(images.labels))  # decoded where batches are collated: in the workers
    loader = DataLoader(indices, batch_size=64, num_workers=workers, collate_fn=partial(batch_stats, images))
    found: list[ImageStats] = []
    with tqdm(desc=f"inspecting {split}", total=len(images.labels), unit=" images") as bar:
        for batch in loader:
            found += batch
            bar.update(len(batch))
    return found


def inspect_images(splits: dict[str, ImageSource], class_names: Sequence[str], workers: int) -> dict[str, Any]:
    """All that `recipes doctor` reports of images, decoded by so many worker processes, as plain values.

    Returns:
        `splits`, each with counts; `unreadable` and `misnamed`, lists of split, name and reason; `exact` and
        `rescaled`, lists of groups of (split, name); `similarity` of each of the latter; `sizes`, `modes`, `mean` and
        `std` of the training split.
    """
    stats = {split: stats_of_all(images, split, workers) for split, images in splits.items()}
    places = [(split, one) for split, some in stats.items() for one in some]
    readable = [(split, one) for split, one in places if not one.error]

    def name(place: Place) -> list[str]:
        return [place[0], splits[place[0]].name(place[1])]

    exact = groups_of((one.pixels, (split, one.row)) for split, one in readable)
    again = {place for group in exact for place in group[1:]}  # of exact copies one is compared
    single = [(split, one) for split, one in readable if (split, one.row) not in again]
    thumbnails = np.array([one.thumbnail for _, one in single], np.uint8).reshape(len(single), -1)
    pairs = alike(thumbnails) if len(single) <= LARGE else []
    rescaled = [[(single[place][0], single[place][1].row) for place in pair] for *pair, _ in pairs]
    train = [one for one in stats["train"] if not one.error]
    mean = np.mean([one.mean for one in train], 0) if train else np.zeros(3)
    square = np.mean([one.square for one in train], 0) if train else np.zeros(3)
    sides = np.array([one.size for one in train]).reshape(-1, 2)
    return {
        "kind": "pictures",
        "splits": {split: counts_of(images.labels, class_names) for split, images in splits.items()},
        "unreadable": [[*name((split, one.row)), one.error] for split, one in places if one.error],
        "misnamed": [[*name((split, one.row)), one.misnamed] for split, one in readable if one.misnamed],
        "exact": [[name(place) for place in group] for group in exact],
        "rescaled": [[name(place) for place in pair] for pair in rescaled],
        "similarity": [round(similarity, 4) for *_, similarity in pairs],
        "compared": len(single) <= LARGE,
        "leaks": leaks([*exact, *rescaled]),
        "conflicts": conflicts([*exact, *rescaled], splits),
        "sizes": quantiles(sides.min(1)) if len(sides) else {},
        "modes": dict(Counter(one.mode for _, one in readable).most_common()),
        "mean": [round(float(value), 4) for value in mean],
        "std": [round(float(value), 4) for value in np.sqrt(np.maximum(square - mean**2, 0))],
    }


def alike(thumbnails: npt.NDArray[np.uint8], block: int = 512) -> list[tuple[int, int, float]]:
    """Pairs of images that are the same but for size, compression and a little brightness: two rows, and the cosine.

    Copies differ a little everywhere, two drawings much in one place: what counts is the largest difference in any
    cell. Where it leaves a doubt, the pair's distance is held against the distance at which either's third neighbour
    lies, much as Lowe (2004, https://doi.org/10.1023/B:VISI.0000029664.99615.94) does with the second: a copy is far
    nearer than images of this kind come to each other by chance, however plain they are.

    Each of the thumbnails `(n, SIDE * SIDE * 3)` is compared with its `NEAREST` alone, found in blocks, so that memory
    grows with their number and not with its square; where more are copies of one another, all of them are in some
    pair, but not every pair is named.
    """
    values, deviation = centred(torch.from_numpy(thumbnails))
    rows = (deviation > FLAT).nonzero().flatten()
    values, deviation, nearest = values[rows], deviation[rows], min(NEAREST, len(rows) - 1)
    if nearest < 1:
        return []
    light = values.view(-1, SIDE * SIDE, 3).mean(2)  # JPEG spoils colours before light
    fine, coarse = (torch.nn.functional.normalize(some, dim=1) for some in (values, halved(values)))
    found = []
    for start in tqdm(range(0, len(rows), block), desc="comparing", unit=" blocks", disable=len(rows) < 2048):
        some = slice(start, start + block)
        near = coarse[some] @ coarse.T
        near[torch.arange(len(near)), torch.arange(start, start + len(near))] = -2
        index = near.topk(nearest).indices
        cosine = (fine[index] @ fine[some, :, None]).squeeze(2)
        found.append((index, cosine, (light[index] - light[some, None]).abs().amax(2)))
    index, cosine, worst = (torch.cat(some) for some in zip(*found, strict=True))
    distance = (2 - 2 * cosine).clamp(min=0).sqrt()
    others = distance.masked_fill(worst < CERTAIN, 2**0.5).sort(1).values  # unrelated ones lie at the root of two
    usual = others[:, THIRD - 1] if nearest >= THIRD else torch.full((len(rows),), 2**0.5)
    nearness = distance / torch.minimum(usual[:, None], usual[index])
    contrast = deviation[index] / deviation[:, None]
    is_copy = ((worst < CERTAIN) | (worst * nearness < LIKELY)) & (distance < FAR)
    is_copy &= (contrast > CONTRAST) & (contrast < 1 / CONTRAST)
    place, column = is_copy.nonzero(as_tuple=True)
    partner = index[place, column]
    firsts, seconds = rows[torch.minimum(place, partner)], rows[torch.maximum(place, partner)]
    pairs = dict(zip(zip(firsts.tolist(), seconds.tolist(), strict=True), cosine[place, column].tolist(), strict=True))
    return [(*pair, pairs[pair]) for pair in sorted(pairs)]


def centred(thumbnails: Tensor) -> tuple[Tensor, Tensor]:
    """Thumbnails, uint8 `(n, SIDE * SIDE * 3)`, without each channel's mean, in units of their standard deviation;
    and this deviation.

    A coloured ground would make all drawings on it alike if the mean were one number.
    """
    values = thumbnails.float()
    for channel in range(3):
        values[:, channel::3] -= values[:, channel::3].mean(1, keepdim=True)
    deviation = values.norm(dim=1) / values.shape[1] ** 0.5
    return values.div_(deviation.clamp(min=1e-6)[:, None]), deviation


def halved(values: Tensor) -> Tensor:
    """Thumbnails of half the side, `(n, width / 4)`: enough to find the nearest by, at a quarter of the cost."""
    return values.view(-1, SIDE // 2, 2, SIDE // 2, 2, 3).mean((2, 4)).flatten(1)
