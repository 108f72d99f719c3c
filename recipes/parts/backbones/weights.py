"""Trained weights for a backbone: from a file, from torchvision or timm, or shipped with this package.

    backbone = build_backbone("resnet50")
    print(load_weights(backbone, "IMAGENET1K_V2"))
    # weights: 318 tensors (23.5 M parameters) from IMAGENET1K_V2 of torchvision; its head (fc.weight, fc.bias:
    # 1000 classes) was left out, as expected

Either everything fits, but for the classifier, or nothing is loaded and an error says what does not.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..pruning import unpack_zeros
from ..spelling import nearest_name
from .backbone import Backbone
from .build import backbone_facts

SHIPPED = resources.files("recipes") / "weights"

_log = logging.getLogger(__name__)
_PICKLES = (".pt", ".pth", ".ckpt")
_NESTED = ("state_dict", "model")  # where Lightning, and torchvision's training scripts, keep the state dict
_WRAPPERS = {"module", "_orig_mod"}  # put into keys by DataParallel and DDP, by torch.compile
_PREFIXES = ("", "net.", "backbone.net.", "backbone.", "model.")  # torchvision, Backbone, recipes, other modules
_POSITIONS = re.compile("pos_embed|rel_pos|relative_position|attention_bias")
_RENAMED = (  # torchvision's files are older than its modules
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)


@dataclass(frozen=True)
class WeightsReport:
    """What `load_weights` did; `str()` of it is a line to log.

    Attributes:
        source: Where the weights came from.
        loaded: Number of tensors that were copied into the backbone.
        parameters: Number of parameters in them, running statistics not counted.
        missing: Names in the backbone's net of the tensors that no weights were found for, or of another shape.
        unexpected: Keys of the source that belong neither to the backbone nor to a classifier.
        head: Keys of the source that belong to the classifiers the backbone does without, or to other parts of
            the module the source was saved from.
        head_classes: Number of classes of that classifier, where it can be told.
        resized: Names of the position embeddings that were interpolated to the backbone's image size.
    """

    source: str
    loaded: int
    parameters: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    head_classes: int | None = None
    resized: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"weights: {self.loaded} tensors ({_count(self.parameters)} parameters) from {self.source}"
        if self.resized:
            text += f"; {_listed(self.resized)} resized to this image size"
        if self.head:
            classes = f": {self.head_classes} classes" if self.head_classes else ""
            text += f"; its head ({_listed(self.head, 3)}{classes}) was left out, as expected"
        if self.missing:
            text += f"; {len(self.missing)} tensors of the backbone keep their fresh weights: {_listed(self.missing)}"
        if self.unexpected:
            text += f"; {len(self.unexpected)} tensors have no place in the backbone: {_listed(self.unexpected)}"
        return text


def load_weights(backbone: Backbone, weights: str | Path, *, strict: bool = True) -> WeightsReport:
    """Copy trained weights into a backbone, in place; if they do not fit, leave it untouched.

    Keys are matched whether they were saved from torchvision's or timm's net, from a `Backbone`, or from a module
    that has one or other as `backbone`, `net` or `model`, as the checkpoints of the recipes; through DataParallel,
    DDP or torch.compile. A classifier among them is left out. Position embeddings of torchvision's vision
    transformers, and what timm itself would resize of its own, are interpolated where the image size is another.
    Batch normalisation's count of batches may be missing, as in files older than it: with a momentum it is never read.

    Args:
        backbone: Backbone to load into, on any device but `meta`.
        weights: One of

            - the path of a file: `.safetensors`, or a `.pt`, `.pth` or `.ckpt` that holds only tensors and plain
              types;
            - the name torchvision gives to weights of this net, such as `IMAGENET1K_V2`, or `DEFAULT` for the best
              of them or for timm's: downloaded once, then read from the cache;
            - the name of a file shipped with this package, of `shipped_weights()`.
        strict: Refuse weights that lack a tensor of the backbone, have one of another shape or one too many. Else
            load what fits, and log the rest as a warning.

    Raises:
        FileNotFoundError: `weights` is none of these.
        ValueError: The file can't be read or is not safe to; the name of published weights is not known; the
            weights were trained with another normalisation of pixels; or they do not fit: with `strict` any
            tensor, without it every one.
        ConnectionError: The download failed.
    """
    source, state = _find(backbone, weights)
    own: dict[str, Tensor] = backbone.net.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError(f"backbone {backbone.name!r} is on the meta device, where weights can't be loaded")
    fitting, head, unexpected = _match(own, state, backbone.head)
    resized = _resize_positions(backbone, own, fitting)
    reshaped = [key for key, tensor in fitting.items() if tensor.shape != own[key].shape]
    absent = [key for key in own if key not in fitting and not key.endswith("num_batches_tracked")]
    if reshaped or absent or unexpected:
        shapes = [f"{key}: {tuple(fitting[key].shape)}, here {tuple(own[key].shape)}" for key in reshaped]
        faults = {"missing": absent, "unexpected": unexpected, "of another shape": shapes}
        told = "; ".join(f"{len(keys)} {fault} ({_listed(keys)})" for fault, keys in faults.items() if keys)
        if strict or len(reshaped) == len(fitting):
            hint = " strict=False loads what fits." if strict else ""
            if any(_POSITIONS.search(key) for key in reshaped):  # which would leave them fresh
                hint = " Weights of positions fit the image size that they were trained at: build it with theirs."
            raise ValueError(
                f"weights from {source} do not fit backbone {backbone.name!r}: of its {len(own)} tensors {told}. "
                f"Is it the net they were saved from?{hint}"
            )
    with torch.no_grad():
        for key in fitting.keys() - reshaped:
            own[key].copy_(fitting[key])
    parameters = {key for key, _ in backbone.net.named_parameters()}
    report = WeightsReport(
        source=source,
        loaded=len(fitting) - len(reshaped),
        parameters=sum(own[key].numel() for key in parameters & (fitting.keys() - reshaped)),
        missing=(*absent, *reshaped),
        unexpected=tuple(unexpected),
        head=tuple(head),
        head_classes=next((len(tensor) for tensor in reversed(head.values()) if tensor.ndim > 1), None),
        resized=resized,
    )
    if report.missing or report.unexpected:
        _log.warning("%s", report)
    return report


def shipped_weights() -> list[str]:
    """Names of the weights shipped with this package."""
    files = SHIPPED.iterdir() if SHIPPED.is_dir() else ()
    return sorted(file.name.removesuffix(".safetensors") for file in files if file.name.endswith(".safetensors"))


def _find(backbone: Backbone, weights: str | Path) -> tuple[str, Mapping[str, Tensor]]:
    """A name of the source for people, and its state dict."""
    name = str(weights)
    path = Path(weights).expanduser()
    if path.is_file():
        return name, _read(path)
    if name in shipped_weights():
        with resources.as_file(SHIPPED / f"{name}.safetensors") as shipped:
            return shipped.name, _read(shipped)
    published = _published(backbone.name)
    if name.isupper() and not path.suffix:  # as all names of published weights are
        library = "timm" if backbone.name.startswith("timm/") else "torchvision"
        return f"{name} of {library}", _download(backbone, name, published)
    nearest = nearest_name(name, [*shipped_weights(), *published])
    raise FileNotFoundError(
        f"weights {name!r} were not found; {_guess(nearest)}expected the path of a {', '.join(_PICKLES)} or "
        f".safetensors file, the name of published weights of {backbone.name} ({_listed(published, 9) or 'none'}), "
        f"or the name of weights shipped with this package ({_listed(shipped_weights(), 9) or 'none'})"
    )


def _read(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a file."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"weights {path} can't be read as safetensors: {error}") from error
    if path.suffix not in _PICKLES:
        raise ValueError(f"weights {path} are in no known kind of file: {', '.join(_PICKLES)}, .safetensors")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever comes of unpickling what is no such file
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        if not culprit:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"weights {path} can't be read as torch's: {type(error).__name__} {reason}") from error
        convert = (
            "import sys, torch, safetensors.torch as s; c = torch.load(sys.argv[1], weights_only=False); "
            "s.save_file(c.get('state_dict', c), sys.argv[2])"
        )
        files = shlex.join([str(path), str(path.with_suffix(".safetensors"))])
        raise ValueError(
            f"weights {path} hold not only tensors but a {culprit[1]}, and reading it can run code; if you trust the "
            f'file, convert it once: python -c "{convert}" {files}'
        ) from error
    nested = next((name for name in _NESTED if isinstance(content, dict) and isinstance(content.get(name), dict)), "")
    state = {**content[nested], **unpack_zeros(content.get("packed", {}))} if nested else content
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        found = f"a dictionary with {_listed(map(str, state))}" if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"weights {path} hold no state dict, but {found}")
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _published(name: str) -> Mapping[str, Any]:
    """Names of the weights that a backbone's library publishes for it."""
    if name.startswith("timm/"):
        return {"DEFAULT": None}
    from torchvision import models

    known = models.list_models(models)
    return models.get_model_weights(name).__members__ if name in known else {}


def _download(backbone: Backbone, weights: str, published: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state dict of published weights, from the library's cache or else its server."""
    if not published:
        raise ValueError(f"backbone {backbone.name!r} has no published weights; received {weights!r}")
    if weights not in published:
        raise ValueError(
            f"weights {weights!r} of backbone {backbone.name!r} are not known; "
            f"{_guess(nearest_name(weights, published))}available: {', '.join(published)}"
        )
    if backbone.name.startswith("timm/"):
        return _download_from_timm(backbone)
    entry = published[weights]
    preset = entry.transforms()
    mean, std = tuple(preset.mean), tuple(preset.std)
    if (mean, std) != (backbone.mean, backbone.std):
        raise ValueError(
            f"weights {weights!r} of backbone {backbone.name!r} were trained on pixels with mean {mean} and std {std}, "
            f"where the backbone promises {backbone.mean} and {backbone.std}"
        )
    try:
        state: dict[str, Tensor] = entry.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except (URLError, TimeoutError, ConnectionError) as error:
        raise ConnectionError(
            f"weights {weights!r} of backbone {backbone.name!r} could not be downloaded ({error}); "
            f"fetch {entry.url} by other means and give its path"
        ) from error
    return state


def _download_from_timm(backbone: Backbone) -> dict[str, Tensor]:
    import timm

    resized = backbone.input_size != backbone_facts(backbone.name).input_size
    size: dict[str, Any] = {"img_size": backbone.input_size} if backbone.facts.fixed_size and resized else {}
    try:
        net = timm.create_model(backbone.name.removeprefix("timm/"), pretrained=True, num_classes=0, **size)
    except OSError as error:  # what the hub's client raises when it reaches nothing
        raise ConnectionError(
            f"weights of backbone {backbone.name!r} could not be downloaded ({error}); "
            f"fetch them from {backbone.facts.source} by other means and give their path"
        ) from error
    state: dict[str, Tensor] = net.state_dict()
    return state


def _match(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], head_names: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Sort a state dict into tensors of the net by the net's own keys, tensors of heads, and unexpected keys."""
    plain = {_plain(key): tensor for key, tensor in state.items()}
    prefix = max(_PREFIXES, key=lambda prefix: sum(prefix + key in plain for key in own))
    heads = tuple(f"{name}." for name in head_names)
    fitting: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for key, tensor in plain.items():
        inner = key.removeprefix(prefix)
        if not key.startswith(prefix):  # another part of the module that the net was saved with
            head[key] = tensor
        elif inner in own:
            fitting[inner] = tensor
        elif inner.startswith(heads):
            head[key] = tensor
        else:
            unexpected.append(key)
    return fitting, head, unexpected


def _plain(key: str) -> str:
    """A key as today's bare net has it."""
    key = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    for pattern, replacement in _RENAMED:
        key = pattern.sub(replacement, key)
    return key


def _resize_positions(backbone: Backbone, own: Mapping[str, Tensor], fitting: dict[str, Tensor]) -> tuple[str, ...]:
    """Interpolate embeddings and biases of positions, of another number of patches, in `fitting`."""
    odd = [key for key in fitting if _POSITIONS.search(key) and fitting[key].shape != own[key].shape]
    if not odd:
        return ()
    plain = OrderedDict((key, tensor.float()) for key, tensor in fitting.items())
    key = "encoder.pos_embedding"
    if odd == [key]:
        from torchvision.models.vision_transformer import interpolate_embeddings

        if fitting[key].shape[-1] == own[key].shape[-1]:
            patch_size = backbone.facts.multiple_of
            plain = interpolate_embeddings(backbone.input_size, patch_size, OrderedDict({key: plain[key]}))
    elif backbone.name.startswith("timm/"):
        # what each family of timm does to the state dicts that it downloads
        adapt = getattr(sys.modules[type(backbone.net).__module__], "checkpoint_filter_fn", lambda state, net: state)
        # of another width: told with the others; torch warns of timm's way to interpolate
        with contextlib.suppress(RuntimeError, ValueError, AssertionError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = adapt(plain, backbone.net)
    resized = tuple(key for key in odd if key in plain and plain[key].shape == own[key].shape)
    fitting.update({key: plain[key] for key in resized})
    return resized


def _listed(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _count(number: int) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _guess(nearest: str | None) -> str:
    return f"did you mean {nearest!r}? " if nearest else ""
