"""Augmentation of whole batches: a decision of its own for every image, and the formulas of the papers."""

from __future__ import annotations

import pytest
import torch

from datamodules.images import augment as A
from datamodules.sampling.seeds import counter_uniform


def images(batch: int = 16, size: int = 12) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)


def test_shift_and_mirror_is_the_crop_of_the_reflected_image() -> None:
    x = images()
    u = torch.rand(3, len(x))
    mirrored = u[2] < 0.5
    moved = A.shift_and_mirror(x, u[0], u[1], mirrored, reach=3)
    padded = torch.nn.functional.pad(x.float(), (3, 3, 3, 3), mode="reflect")
    for n in range(len(x)):
        top, left = int(u[0, n] * 7), int(u[1, n] * 7)
        # Mirroring is applied to the coordinates of the shifted window, so the shift turns round with it.
        window = padded[n, :, top : top + 12, left : left + 12]
        if mirrored[n]:
            window = padded[n].flip(-1)[:, top : top + 12, 6 - left : 6 - left + 12]
        assert torch.equal(moved[n].float(), window), n


@pytest.mark.parametrize("strength", ["none", "light", "standard", "strong"])
def test_every_image_gets_a_decision_of_its_own(strength: str) -> None:
    x = images(1).expand(64, 3, 12, 12)
    out = A.augment(x, counter_uniform(0, 0, range(64), A.DRAWS), strength)
    assert out.shape == x.shape and out.dtype == torch.float32
    assert out.min() >= 0 and out.max() <= 1
    different = {tuple(image.flatten().tolist()) for image in out}
    assert len(different) == {"none": 1, "light": 2}.get(strength, len(different))
    if strength in ("standard", "strong"):
        assert len(different) > 8


def test_what_happens_to_an_image_does_not_depend_on_its_batch() -> None:
    x, u = images(8), torch.rand(8, A.DRAWS)
    whole = A.augment(x, u, "strong")
    assert torch.allclose(A.augment(x[5:6], u[5:6], "strong")[0], whole[5], atol=1e-6)


def test_signs_are_not_mirrored() -> None:
    x = images()
    u = torch.zeros(len(x), A.DRAWS)
    assert torch.equal(A.augment(x, u, "light", flip=False), A.to_float(x))
    assert torch.equal(A.augment(x, u, "light"), A.to_float(x.flip(-1)))


def test_erased_area_is_the_papers() -> None:
    x = torch.rand(2000, 1, 20, 20)
    u = counter_uniform(0, 0, range(2000), 6).unbind(1)
    erased = (A.erase_rectangle(x, u) != x).float().mean((1, 2, 3))
    touched = erased > 0
    assert 0.45 < touched.float().mean() < 0.55
    assert 0.12 < erased[touched].mean() < 0.2


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_mixed_targets_weigh_what_is_in_the_image(mixup: float, cutmix: float) -> None:
    # Each image is one-hot in its channel: its mean per channel must be its target.
    labels = torch.arange(48) % 3
    x = A.soft_targets(labels, 3)[:, :, None, None].expand(48, 3, 32, 32)
    for seed in range(6):
        mixed, target = A.mix(x, A.soft_targets(labels, 3), mixup=mixup, cutmix=cutmix, seed=seed)
        assert torch.allclose(mixed.mean((2, 3)), target, atol=1e-5)
        assert torch.allclose(target.sum(1), torch.ones(48))
        assert (target.max(1).values < 1).any()


def test_mixing_is_a_function_of_its_seed() -> None:
    x, t = torch.rand(8, 3, 8, 8), torch.eye(8)
    first = A.mix(x, t, mixup=0.2, cutmix=1.0, seed=1)
    assert torch.equal(first[0], A.mix(x, t, mixup=0.2, cutmix=1.0, seed=1)[0])
    assert not torch.equal(first[0], A.mix(x, t, mixup=0.2, cutmix=1.0, seed=2)[0])
