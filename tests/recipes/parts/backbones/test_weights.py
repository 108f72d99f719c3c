from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer

from recipes.parts.backbones import backbone_facts, build_backbone
from recipes.parts.backbones import weights as weights_module
from recipes.parts.backbones.backbone import Backbone
from recipes.parts.backbones.weights import WeightsReport, load_weights, shipped_weights

SMALL = "shufflenet_v2_x0_5"
State = dict[str, Tensor]


def whole_net(name: str = SMALL, **options: Any) -> State:
    """The state dict of torchvision's net, its running statistics as after training."""
    net = models.get_model(name, weights=None, **options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)  # type: ignore[arg-type]
            module.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    return dict(net.state_dict())


def saved(state: object, path: Path) -> Path:
    if path.suffix == ".safetensors":
        assert isinstance(state, dict)
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def assert_loaded(backbone: Backbone, state: State) -> None:
    for key, tensor in backbone.net.state_dict().items():
        torch.testing.assert_close(tensor, state[key], rtol=0, atol=0)


def snapshot(backbone: Backbone) -> State:
    return {key: tensor.clone() for key, tensor in backbone.net.state_dict().items()}


class TestLayouts:
    @pytest.mark.slow
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".ckpt"])
    @pytest.mark.parametrize("name", [SMALL, "mnasnet0_5", "squeezenet1_1"])
    def test_torchvisions_net(self, tmp_path: Path, name: str, suffix: str) -> None:
        state = whole_net(name)
        backbone = build_backbone(name)
        report = load_weights(backbone, saved(state, tmp_path / f"net{suffix}"))
        assert_loaded(backbone, state)
        assert report.loaded == len(backbone.net.state_dict())
        assert report.parameters == sum(parameter.numel() for parameter in backbone.parameters())
        assert set(report.head) == state.keys() - backbone.net.state_dict().keys()
        assert report.head_classes == 1000
        assert not report.missing
        assert not report.unexpected

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda backbone: backbone,
            nn.DataParallel,
            torch.compile,
            lambda backbone: nn.ModuleDict({"backbone": backbone}),
            lambda backbone: nn.ModuleDict({"backbone": torch.compile(backbone)}),  # type: ignore[dict-item]
            lambda backbone: nn.DataParallel(torch.compile(nn.ModuleDict({"backbone": backbone}))),  # type: ignore[type-var]
            lambda backbone: nn.ModuleDict({"model": backbone.net}),
            lambda backbone: nn.ModuleDict({"net": backbone.net}),
            lambda backbone: nn.ModuleDict({"backbone": backbone.net}),
        ],
    )
    def test_wrapped_backbones(self, tmp_path: Path, wrap: Callable[[Backbone], nn.Module]) -> None:
        trained = build_backbone("resnet8")
        backbone = build_backbone("resnet8")
        load_weights(backbone, saved(wrap(trained).state_dict(), tmp_path / "wrapped.pt"))
        assert_loaded(backbone, snapshot(trained))

    def test_checkpoint_of_lightning(self, tmp_path: Path) -> None:
        class Classifier(L.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.save_hyperparameters({"lr": 0.1, "classes": ["cat", "dog"]})
                self.backbone = build_backbone("resnet8")
                self.head = nn.Linear(64, 2)

        module = Classifier()
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        backbone = build_backbone("resnet8")
        report = load_weights(backbone, str(tmp_path / "last.ckpt"))
        assert_loaded(backbone, snapshot(module.backbone))
        assert report.head == ("head.weight", "head.bias")
        assert report.head_classes == 2

    def test_nested_state_dict_of_training_scripts(self, tmp_path: Path) -> None:
        state = whole_net()
        backbone = build_backbone(SMALL)
        load_weights(backbone, saved({"model": state, "epoch": 3}, tmp_path / "model.pth"))
        assert_loaded(backbone, state)

    def test_half_precision_and_another_device_layout(self, tmp_path: Path) -> None:
        state = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in whole_net().items()}
        backbone = build_backbone(SMALL).to(memory_format=torch.channels_last)
        load_weights(backbone, saved(state, tmp_path / "half.safetensors"))
        assert next(backbone.parameters()).dtype == torch.float32
        assert_loaded(
            backbone,
            {key: tensor.to(torch.float32) if tensor.is_floating_point() else tensor for key, tensor in state.items()},
        )

    def test_files_older_than_the_count_of_batches(self, tmp_path: Path) -> None:
        state = whole_net()
        old = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
        backbone = build_backbone(SMALL)
        report = load_weights(backbone, saved(old, tmp_path / "old.pth"))
        assert not report.missing
        assert report.loaded < len(backbone.net.state_dict())
        assert_loaded(backbone, {**backbone.net.state_dict(), **old})

    def test_old_names_of_densenet(self, tmp_path: Path) -> None:
        state = whole_net("densenet121")
        old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): value for key, value in state.items()}
        assert "features.denseblock1.denselayer1.norm.1.weight" in old
        backbone = build_backbone("densenet121")
        load_weights(backbone, saved(old, tmp_path / "old.pth"))
        assert_loaded(backbone, state)

    @pytest.mark.slow
    def test_auxiliary_branches(self, tmp_path: Path) -> None:
        state = whole_net("googlenet", init_weights=True)
        path = saved(state, tmp_path / "googlenet.pth")
        without, with_aux = build_backbone("googlenet"), build_backbone("googlenet", aux=True)
        report = load_weights(without, path)
        assert_loaded(without, state)
        assert "aux1.conv.conv.weight" in report.head
        report = load_weights(with_aux, path)
        assert_loaded(with_aux, state)
        assert sorted(report.head) == sorted(
            f"{name}.{kind}" for name in ("aux1.fc2", "aux2.fc2", "fc") for kind in ("weight", "bias")
        )


def tiny_transformer(image_size: int) -> Backbone:
    net = VisionTransformer(image_size, patch_size=16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)
    net.heads = nn.Identity()  # type: ignore[assignment]
    facts = backbone_facts("vit_b_16")._replace(input_size=image_size)
    return Backbone(net, name="vit_b_16", facts=facts, width=16, blocks={}, head=("heads",))


class TestVisionTransformer:
    def test_position_embeddings_of_another_image_size_are_interpolated(self, tmp_path: Path) -> None:
        trained, backbone = tiny_transformer(48), tiny_transformer(80)
        report = load_weights(backbone, saved(trained.state_dict(), tmp_path / "48.pt"))
        assert report.resized == ("encoder.pos_embedding",)
        assert "encoder.pos_embedding resized to this image size" in str(report)
        old = trained.net.state_dict()["encoder.pos_embedding"]
        new = backbone.net.state_dict()["encoder.pos_embedding"]
        assert new.shape == (1, 1 + 25, 16)
        torch.testing.assert_close(new[:, 0], old[:, 0])
        old_grid, new_grid = old[0, 1:].reshape(3, 3, 16), new[0, 1:].reshape(5, 5, 16)
        torch.testing.assert_close(new_grid[::2, ::2], old_grid)  # every other point of the finer grid is an old one
        assert backbone(torch.rand(1, 3, 80, 80)).shape == (1, 16)

    def test_same_size_is_copied(self, tmp_path: Path) -> None:
        trained, backbone = tiny_transformer(48), tiny_transformer(48)
        report = load_weights(backbone, saved(trained.state_dict(), tmp_path / "48.pt"))
        assert report.resized == ()
        assert_loaded(backbone, snapshot(trained))

    def test_old_names_of_the_perceptron(self, tmp_path: Path) -> None:
        trained, backbone = tiny_transformer(48), tiny_transformer(48)
        state = snapshot(trained)
        old = {key.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): state[key] for key in state}
        assert "encoder.layers.encoder_layer_1.mlp.linear_2.bias" in old
        load_weights(backbone, saved(old, tmp_path / "old.pth"))
        assert_loaded(backbone, state)

    def test_another_width_is_refused(self, tmp_path: Path) -> None:
        state = {**tiny_transformer(48).state_dict(), "net.encoder.pos_embedding": torch.zeros(1, 5, 8)}
        with pytest.raises(
            ValueError, match=r"1 of another shape \(encoder.pos_embedding: \(1, 5, 8\), here \(1, 10, 16\)"
        ):
            load_weights(tiny_transformer(48), saved(state, tmp_path / "other.pt"))


class TestMisfits:
    @pytest.fixture
    def backbone(self) -> Backbone:
        return build_backbone("resnet14")

    def refused(self, backbone: Backbone, path: Path, **options: Any) -> str:
        """The error's sentence; the backbone must be as before."""
        before = snapshot(backbone)
        with pytest.raises(ValueError) as error:
            load_weights(backbone, path, **options)
        assert_loaded(backbone, before)
        return str(error.value)

    def test_missing_tensors(self, backbone: Backbone, tmp_path: Path) -> None:
        path = saved(build_backbone("resnet8").state_dict(), tmp_path / "resnet8.pt")
        assert self.refused(backbone, path) == (
            f"weights from {path} do not fit backbone 'resnet14': of its {len(snapshot(backbone))} tensors 30 missing "
            "(layer1.1.conv1.weight, layer1.1.bn1.weight, layer1.1.bn1.bias, layer1.1.bn1.running_mean, "
            "layer1.1.bn1.running_var and 25 more). Is it the net they were saved from? strict=False loads what fits."
        )

    def test_one_missing_tensor(self, backbone: Backbone, tmp_path: Path) -> None:
        for lost in ("net.layer2.0.bn1.running_var", "net.conv1.weight"):
            state = backbone.state_dict()
            del state[lost]
            sentence = self.refused(backbone, saved(state, tmp_path / "lost.pt"))
            assert f"tensors 1 missing ({lost.removeprefix('net.')})." in sentence

    def test_unexpected_tensors(self, backbone: Backbone, tmp_path: Path) -> None:
        path = saved(build_backbone("resnet20").state_dict(), tmp_path / "resnet20.pt")
        assert re.search(
            r"tensors 36 unexpected \(net.layer1.2.conv1.weight, .* and 31 more\)", self.refused(backbone, path)
        )
        adapter = {**backbone.state_dict(), "net.layer1.0.conv1.lora": torch.zeros(2)}
        sentence = self.refused(backbone, saved(adapter, tmp_path / "adapter.pt"))
        assert "1 unexpected (net.layer1.0.conv1.lora)" in sentence

    def test_tensors_of_another_shape(self, backbone: Backbone, tmp_path: Path) -> None:
        state = {**backbone.state_dict(), "net.conv1.weight": torch.zeros(16, 3, 7, 7)}
        sentence = self.refused(backbone, saved(state, tmp_path / "stem.pt"))
        assert "1 of another shape (conv1.weight: (16, 3, 7, 7), here (16, 3, 3, 3))" in sentence

    def test_not_strict_loads_what_fits_and_says_so(
        self, backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        trained = build_backbone("resnet14")
        state = {**snapshot(trained), "conv1.weight": torch.zeros(16, 3, 7, 7), "extra": torch.zeros(1)}
        del state["bn1.bias"]
        before = snapshot(backbone)
        report = load_weights(backbone, saved(state, tmp_path / "part.pt"), strict=False)
        kept = {key: before[key] for key in ("conv1.weight", "bn1.bias")}
        assert_loaded(backbone, {**snapshot(trained), **kept})
        assert report.missing == ("bn1.bias", "conv1.weight")
        assert report.unexpected == ("extra",)
        assert report.loaded == len(before) - 2
        assert "2 tensors of the backbone keep their fresh weights: bn1.bias, conv1.weight" in caplog.text
        assert "1 tensors have no place in the backbone: extra" in caplog.text

    def test_not_strict_still_wants_something_that_fits(self, backbone: Backbone, tmp_path: Path) -> None:
        for state in ({"a": torch.zeros(1)}, {"conv1.weight": torch.zeros(1)}):
            sentence = self.refused(backbone, saved(state, tmp_path / "none.pt"), strict=False)
            assert "do not fit backbone 'resnet14'" in sentence
            assert "strict=False" not in sentence

    def test_classifier_of_another_family_is_unexpected(self, tmp_path: Path) -> None:
        state = {key.replace("fc.", "classifier."): tensor for key, tensor in whole_net().items()}
        sentence = self.refused(build_backbone(SMALL), saved(state, tmp_path / "odd.pt"))
        assert "2 unexpected (classifier.weight, classifier.bias)" in sentence

    def test_meta_device(self, tmp_path: Path) -> None:
        with torch.device("meta"):
            backbone = build_backbone(SMALL)
        with pytest.raises(ValueError, match="is on the meta device, where weights can't be loaded"):
            load_weights(backbone, saved(whole_net(), tmp_path / "net.pt"))


class TestFiles:
    @pytest.fixture
    def backbone(self) -> Backbone:
        return build_backbone(SMALL)

    def test_nothing_found(self, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(weights_module, "SHIPPED", tmp_path)
        with pytest.raises(FileNotFoundError) as error:
            load_weights(backbone, "runs/best.ckpt")
        assert str(error.value) == (
            "weights 'runs/best.ckpt' were not found; expected the path of a .pt, .pth, .ckpt or .safetensors file, "
            f"the name of published weights of {SMALL} (IMAGENET1K_V1, DEFAULT), or the name of weights shipped with "
            "this package (none)"
        )

    @pytest.mark.slow
    def test_pickles_that_run_code_are_refused_and_can_be_converted(self, backbone: Backbone, tmp_path: Path) -> None:
        folder = tmp_path / "with a blank"
        folder.mkdir()
        state = whole_net()
        path = saved({"state_dict": state, "where": Path("anywhere")}, folder / "old.ckpt")
        with pytest.raises(ValueError, match="hold not only tensors but a pathlib") as error:
            load_weights(backbone, path)
        assert str(path) in str(error.value)
        program, *arguments = shlex.split(str(error.value).partition("convert it once: ")[2])
        assert program == "python"
        subprocess.run([sys.executable, *arguments], check=True)
        load_weights(backbone, path.with_suffix(".safetensors"))
        assert_loaded(backbone, state)

    def test_no_code_runs(self, backbone: Backbone, tmp_path: Path) -> None:
        class Malicious:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "mark"),)

        path = saved({"fc.weight": Malicious()}, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match="hold not only tensors but a posix.mkdir"):
            load_weights(backbone, path)
        assert not (tmp_path / "mark").exists()

    @pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut short"])
    def test_broken_files(self, backbone: Backbone, tmp_path: Path, content: bytes) -> None:
        for name, words in (
            ("x.pt", "can't be read as torch's"),
            ("x.safetensors", "can't be read as safetensors"),
        ):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{name} {words}"):
                load_weights(backbone, tmp_path / name)

    def test_other_files(self, backbone: Backbone, tmp_path: Path) -> None:
        (tmp_path / "net.onnx").write_bytes(b"")
        with pytest.raises(ValueError, match=r"net.onnx are in no known kind of file: .pt, .pth, .ckpt, .safetensors"):
            load_weights(backbone, tmp_path / "net.onnx")
        (tmp_path / "net").mkdir()
        with pytest.raises(FileNotFoundError):
            load_weights(backbone, tmp_path / "net")
        for content, found in (([1, 2], "list"), ({"epoch": 3, "loss": 0.1}, "a dictionary with epoch, loss")):
            with pytest.raises(ValueError, match=f"hold no state dict, but {found}"):
                load_weights(backbone, saved(content, tmp_path / "other.pt"))

    def test_shipped(self, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(weights_module, "SHIPPED", tmp_path / "nowhere")
        assert shipped_weights() == []
        monkeypatch.setattr(weights_module, "SHIPPED", tmp_path)
        state = whole_net()
        saved(state, tmp_path / "digits.safetensors")
        (tmp_path / "README.md").write_text("not weights")
        assert shipped_weights() == ["digits"]
        report = load_weights(backbone, "digits")
        assert_loaded(backbone, state)
        assert report.source == "digits.safetensors"
        with pytest.raises(FileNotFoundError, match=r"'digit' were not found; did you mean 'digits'\? .*\(digits\)$"):
            load_weights(backbone, "digit")


class TestPublished:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An empty cache of torch.hub, and no network."""

        def no_network(*args: Any, **kwargs: Any) -> None:
            raise URLError("no network in tests")

        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(torch.hub, "urlopen", no_network)
        cache = tmp_path / "hub" / "checkpoints"
        cache.mkdir(parents=True)
        return cache

    @pytest.mark.parametrize("name", ["IMAGENET1K_V1", "DEFAULT"])
    def test_from_the_cache(self, cache: Path, name: str) -> None:
        state = whole_net()
        url = models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.url
        saved(state, cache / url.rpartition("/")[2])
        backbone = build_backbone(SMALL)
        report = load_weights(backbone, name)
        assert_loaded(backbone, state)
        assert str(report) == (
            f"weights: {len(backbone.net.state_dict())} tensors (341.8 k parameters) from {name} of torchvision; "
            "its head (fc.weight, fc.bias: 1000 classes) was left out, as expected"
        )

    def test_default_is_the_best(self, cache: Path) -> None:
        state = whole_net("mobilenet_v2")
        saved(state, cache / models.MobileNet_V2_Weights.IMAGENET1K_V2.url.rpartition("/")[2])
        backbone = build_backbone("mobilenet_v2")
        load_weights(backbone, "DEFAULT")
        assert_loaded(backbone, state)

    def test_download_of_other_bytes_is_refused(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        forged = saved(whole_net(), tmp_path / "forged.pth")
        monkeypatch.setattr(torch.hub, "urlopen", lambda request: urlopen(forged.as_uri()))
        with pytest.raises(RuntimeError, match=r'invalid hash value \(expected "f707e7126e"'):
            load_weights(build_backbone(SMALL), "DEFAULT")
        assert "100%" in capsys.readouterr().err  # progress is shown
        assert not list(cache.iterdir())

    def test_no_network(self) -> None:
        sentence = (
            "could not be downloaded .*no network in tests.*fetch https://download.pytorch.org/.*pth by other means"
        )
        with pytest.raises(ConnectionError, match=sentence):
            load_weights(build_backbone(SMALL), "DEFAULT")

    def test_unknown_names(self) -> None:
        backbone = build_backbone(SMALL)
        with pytest.raises(ValueError) as error:
            load_weights(backbone, "IMAGENET1K_V9")
        assert str(error.value) == (
            f"weights 'IMAGENET1K_V9' of backbone '{SMALL}' are not known; did you mean 'IMAGENET1K_V1'? "
            "available: IMAGENET1K_V1, DEFAULT"
        )
        with pytest.raises(FileNotFoundError, match="did you mean 'IMAGENET1K_V1'?"):
            load_weights(backbone, "imagenet1k_v1")
        with pytest.raises(ValueError, match="'resnet8' has no published weights; received 'DEFAULT'"):
            load_weights(build_backbone("resnet8"), "DEFAULT")

    def test_weights_for_other_pixels_are_refused(self) -> None:
        with torch.device("meta"):
            backbone = build_backbone("vgg16")
        with pytest.raises(ValueError, match=r"'IMAGENET1K_FEATURES' .* trained on pixels with mean \(0.48235, "):
            load_weights(backbone, "IMAGENET1K_FEATURES")


class TestTimm:
    @pytest.fixture(autouse=True)
    def timm(self) -> Any:
        return pytest.importorskip("timm")

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
    def test_saved_net_with_its_head(self, tmp_path: Path, timm: Any, name: str) -> None:
        state = timm.create_model(name, num_classes=7).state_dict()
        backbone = build_backbone(f"timm/{name}")
        report = load_weights(backbone, saved(state, tmp_path / "net.safetensors"))
        assert_loaded(backbone, state)
        assert len(report.head) == 2
        assert report.head_classes == 7

    @pytest.mark.parametrize("size", [96, 224])
    def test_position_embeddings_of_another_image_size_are_interpolated(
        self, tmp_path: Path, timm: Any, size: int
    ) -> None:
        state = timm.create_model("test_vit", num_classes=7).state_dict()  # 160 px in patches of 16
        backbone = build_backbone("timm/test_vit", image_size=size)
        report = load_weights(backbone, saved(state, tmp_path / "net.safetensors"))
        assert report.resized == ("pos_embed",) and not report.missing
        new, side = backbone.net.state_dict()["pos_embed"], size // 16
        first = new.shape[1] - side**2  # the class token's
        torch.testing.assert_close(new[:, :first], state["pos_embed"][:, :first])
        grid = state["pos_embed"][:, first:].reshape(1, 10, 10, -1).permute(0, 3, 1, 2)
        expected = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic", antialias=True)
        torch.testing.assert_close(new[:, first:].reshape(1, side, side, -1).permute(0, 3, 1, 2), expected)
        others = backbone.net.state_dict().keys() - {"pos_embed"}
        assert all(torch.equal(backbone.net.state_dict()[key], state[key]) for key in others)

    def test_biases_of_another_image_size_are_interpolated(self, tmp_path: Path, timm: Any) -> None:
        options = {"num_classes": 0, "depth": 2, "embed_dim": 32, "num_heads": 2}
        trained = timm.create_model("beit_base_patch16_224", **options)
        nn.init.normal_(trained.blocks[0].attn.relative_position_bias_table)
        net = timm.create_model("beit_base_patch16_224", img_size=96, **options)
        name = "timm/beit_base_patch16_224"
        facts = backbone_facts(name)._replace(input_size=96)
        backbone = Backbone(net, name=name, facts=facts, width=32, blocks={}, head=("head",))
        report = load_weights(backbone, saved(trained.state_dict(), tmp_path / "net.safetensors"))
        assert report.resized == tuple(f"blocks.{n}.attn.relative_position_bias_table" for n in (0, 1))
        new, old = (n.blocks[0].attn.relative_position_bias_table for n in (net, trained))
        torch.testing.assert_close(new[-3:], old[-3:])  # of the class token
        torch.testing.assert_close(new[(11 * 11) // 2], old[(27 * 27) // 2])  # of a patch to itself

    def test_another_width_is_refused(self, tmp_path: Path, timm: Any) -> None:
        state = timm.create_model("test_vit", num_classes=0).state_dict()
        state["pos_embed"] = torch.zeros(1, 50, 8)
        with pytest.raises(ValueError, match=r"1 of another shape \(pos_embed.*build it with theirs"):
            load_weights(build_backbone("timm/test_vit", image_size=96), saved(state, tmp_path / "net.safetensors"))

    def test_published(self, tmp_path: Path, timm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        path = saved(timm.create_model("test_vit").state_dict(), tmp_path / "published.safetensors")
        create_model = timm.create_model

        def from_disk(name: str, **options: Any) -> Any:
            return create_model(name, pretrained_cfg_overlay={"file": str(path)}, **options)

        monkeypatch.setattr(timm, "create_model", from_disk)
        backbone = build_backbone("timm/test_vit", image_size=96)
        report = load_weights(backbone, "DEFAULT")
        assert report.source == "DEFAULT of timm"
        assert_loaded(
            backbone,
            create_model(
                "test_vit", num_classes=0, img_size=96, pretrained=True, pretrained_cfg_overlay={"file": str(path)}
            ).state_dict(),
        )

    def test_errors(self, timm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        backbone = build_backbone("timm/test_resnet")
        with pytest.raises(ValueError, match="of backbone 'timm/test_resnet' are not known; available: DEFAULT"):
            load_weights(backbone, "IMAGENET1K_V1")

        def unreachable(name: str, **options: Any) -> None:
            raise FileNotFoundError("offline")

        monkeypatch.setattr(timm, "create_model", unreachable)
        with pytest.raises(
            ConnectionError, match=r"\(offline\); fetch them from https://huggingface.co/timm/test_resnet"
        ):
            load_weights(backbone, "DEFAULT")


def test_report_reads_well() -> None:
    report = WeightsReport("digits.safetensors", 120, 11_176_512, head=("fc.weight", "fc.bias"), head_classes=1000)
    assert str(report) == (
        "weights: 120 tensors (11.2 M parameters) from digits.safetensors; "
        "its head (fc.weight, fc.bias: 1000 classes) was left out, as expected"
    )
    report = WeightsReport("x.pt", 2, 640, head=("a", "b", "c", "d"))
    assert (
        str(report)
        == "weights: 2 tensors (640 parameters) from x.pt; its head (a, b, c and 1 more) was left out, as expected"
    )
