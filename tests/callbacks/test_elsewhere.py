"""The callbacks in projects that know nothing of them: two from the registry, an empty one, and any LightningCLI."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import callbacks as package
from callbacks import EWC, GradualUnfreezing, LRWarmup
from tests.nets import Net, quiet
from tests.test_contracts import CASES

HOME = Path(package.__file__ or "").parent


class Images(Dataset[Any]):
    """Twelve images in three classes, as a dictionary or a pair."""

    def __init__(self, as_dict: bool) -> None:
        self.as_dict = as_dict
        self.targets = [n % 3 for n in range(12)]
        self.images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        label = torch.tensor(self.targets[index])
        return {"image": self.images[index], "label": label} if self.as_dict else (self.images[index], label)


def torchgeo() -> tuple[LightningModule, DataLoader[Any]]:
    trainers = pytest.importorskip("torchgeo.trainers")
    task = trainers.ClassificationTask(model="resnet18", num_classes=3, lr=1e-3)
    return task, DataLoader(Images(as_dict=True), batch_size=3)


def torch_uncertainty() -> tuple[LightningModule, DataLoader[Any]]:
    routines = pytest.importorskip("torch_uncertainty.routines")
    import torchvision

    net = torchvision.models.resnet18(num_classes=3)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    routine = routines.ClassificationRoutine(net, 3, nn.CrossEntropyLoss(), optim_recipe=optimizer)
    return routine, DataLoader(Images(as_dict=False), batch_size=3)


@pytest.mark.filterwarnings("ignore")  # of theirs
@pytest.mark.parametrize("project", [torchgeo, torch_uncertainty])
class TestOtherProjects:
    """Their modules, unchanged."""

    def test_gradual_unfreezing(self, project: Any) -> None:
        module, train = project()
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        unfreezing = GradualUnfreezing(every_steps=1, blocks_per_phase=2)
        seen = []

        class Watch(Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *args: Any) -> None:
                moved = {name for name, p in pl_module.named_parameters() if not torch.equal(p, before[name])}
                seen.append({name.split(".")[1] for name in moved})

        quiet(callbacks=[unfreezing, Watch()], max_steps=4, limit_val_batches=1).fit(module, train, train)
        assert unfreezing.opening_steps == [0, 1, 2, 3]
        assert seen[:2] == [{"fc"}, {"fc", "layer4", "layer3"}]
        assert {"conv1", "bn1", "layer1"} <= seen[3]

    def test_warmup(self, project: Any) -> None:
        module, train = project()
        lrs = []

        class Watching(LRWarmup):
            def on_after_backward(self, trainer: Any, pl_module: LightningModule) -> None:
                lrs.append(trainer.optimizers[0].param_groups[0]["lr"])
                super().on_after_backward(trainer, pl_module)

        quiet(callbacks=[Watching(steps=4)], max_epochs=2, limit_val_batches=1).fit(module, train, train)
        assert lrs == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3, 1e-3, 1e-3])

    def test_ewc(self, project: Any, tmp_path: Path) -> None:
        module, train = project()
        options: dict[str, Any] = {"limit_val_batches": 1, "max_epochs": 1}
        quiet(callbacks=[EWC(save=tmp_path / "a.safetensors")], **options).fit(module, train, train)
        start = {name: p.detach().clone() for name, p in module.named_parameters()}
        distance = {}
        for strength in (0.0, 1e14):  # AdamW takes much to be held
            with torch.no_grad():
                for name, p in module.named_parameters():
                    p.copy_(start[name])
            ewc = EWC(strength=strength, load=tmp_path / "a.safetensors")
            quiet(callbacks=[ewc], **options).fit(module, train, train)
            distance[strength] = sum(float((p - start[n]).norm()) for n, p in module.named_parameters())
        assert distance[1e14] < 0.7 * distance[0.0]  # what has no Fisher yet, behind norms that start at 0, is free


SCRIPT = """
import sys
for name in ("callbacks", "recipes", "datamodules"):
    sys.modules[name] = None  # importing it fails
import torch
from lightning.pytorch import LightningModule, Trainer

class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))), torch.nn.Linear(4, 2)
    def forward(self, x):
        return self.head(self.body(x))
    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(12, 4), torch.arange(12) % 2), 3)
def fit(*callbacks):
    trainer = Trainer(accelerator="cpu", max_epochs=3, callbacks=list(callbacks), logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Plain(), data)
"""

USES = {
    "averaging": "from averaging import EMA\nfit(EMA(decay=0.9))",
    "clipping": "from clipping import AGC, AutoClip\nfit(AGC())\nfit(AutoClip())",
    "constraints": "from constraints import Constrain, RateBounds\n"
    "fit(Constrain('weight', maximum=0.1), RateBounds(1e-3))",
    "early_stopping": "from early_stopping import PhaseAwareEarlyStopping\n"
    "fit(PhaseAwareEarlyStopping('loss', strict=False))",
    "ewc": "from ewc import EWC\nfit(EWC(save='a.safetensors'))\nfit(EWC(load='a.safetensors'))",
    "nonfinite": "from nonfinite import StopOnNonFinite\nfit(StopOnNonFinite())",
    "penalties": "from penalties import L1, L2, L2SP\nfit(L1(0.1), L2(0.1), L2SP(0.1))",
    "predictions": """from predictions import PredictionWriter
Plain.predict_step = lambda self, batch, batch_idx: {"index": torch.arange(3) + 3 * batch_idx, "score": batch[0][:, 0]}
quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
Trainer(callbacks=[PredictionWriter("p.csv")], **quiet).predict(Plain(), data)
assert len(open("p.csv").readlines()) == 13""",
    "pruning": "from pruning import Prune\nfit(Prune(0.5, end=2, every_n_steps=1))",
    "report": "from report import Report\nfit(Report('page'))\nassert '<!doctype' in open('page/report.html').read()",
    "resume": "from resume import ExactResume\nfit(ExactResume(seed=0))",
    "unfreezing": "from unfreezing import Freeze, GradualUnfreezing\n"
    "fit(GradualUnfreezing(every_steps=2), Freeze(patterns={'body.0': False}))",
    "warmup": "from warmup import LRWarmup\nfit(LRWarmup(steps=2))",
}
TECHNIQUES = sorted(
    p for p in HOME.iterdir() if (p.suffix == ".py" and p.stem != "__init__") or (p / "__init__.py").exists()
)


@pytest.mark.slow
def test_each_technique_alone_in_an_empty_project(own_folder: Path) -> None:
    """Its file or its folder copied, one by one, to where nothing else of this collection can be imported."""
    assert {path.stem for path in TECHNIQUES} == set(USES)
    lines = [SCRIPT]
    for path in TECHNIQUES:
        own = own_folder / f"only_{path.stem}"
        own.mkdir()
        if path.is_dir():
            shutil.copytree(path, own / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, own)
        lines.append(
            f"sys.path.insert(0, {own.name!r})\n{USES[path.stem]}\nsys.path.pop(0)\nprint({path.stem!r}, 'works')"
        )
    (own_folder / "script.py").write_text("\n".join(lines))
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{path.stem} works" for path in TECHNIQUES], done.stderr[-2000:]


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter", "ignore:No seed found")
def test_from_the_yaml_of_any_lightning_cli(own_folder: Path) -> None:
    class Project(Net):
        def __init__(self) -> None:
            super().__init__()

        def train_dataloader(self) -> Any:
            labels = torch.arange(48) % 4
            return DataLoader(TensorDataset(torch.randn(48, 3, 6, 6), labels), batch_size=4)

        val_dataloader = train_dataloader

    Path("config.yaml").write_text(
        """
trainer:
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  accelerator: cpu
  callbacks:
    - class_path: callbacks.GradualUnfreezing
      init_args: {every_steps: 4, blocks_per_phase: 2}
    - class_path: callbacks.LRWarmup
      init_args: {steps: 3}
    - class_path: callbacks.EWC
      init_args: {save: fisher.safetensors}
"""
    )
    cli = LightningCLI(Project, save_config_callback=None, args=["fit", "--config", "config.yaml"])
    found = {type(callback).__name__: callback for callback in cli.trainer.callbacks}  # type: ignore[attr-defined]
    assert found["GradualUnfreezing"].opening_steps == [0, 4, 8]
    assert found["LRWarmup"].length == 3
    assert Path("fisher.safetensors").is_file()


# The other package of the same Trainer

OTHER = """
import pathlib, sys, torch, warnings
warnings.simplefilter("ignore")
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))), torch.nn.Linear(4, 2)
        self.dropout = torch.nn.Dropout(0.2)
    def forward(self, x):
        return self.head(self.dropout(self.body(x)))
    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)
    def predict_step(self, batch, batch_idx):
        return {"logits": self(batch[0])}
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

def fit(callback, path=None, **options):
    whole = TensorDataset(torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 2)
    keep = [ModelCheckpoint(dirpath=type(callback).__name__, filename="{step}", every_n_train_steps=3)]
    settings = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False, "enable_progress_bar": False,
                "enable_model_summary": False, **options}
    net = Plain()
    more = [ExactResume(seed=0)] if type(callback).__name__ != "ExactResume" else []
    trainer = Trainer(callbacks=[callback, *more, *keep], **settings)
    trainer.fit(net, DataLoader(whole, 3, shuffle=True), DataLoader(whole, 6), ckpt_path=path)
    return trainer, net

class Two(ModelCheckpoint):
    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), f"rank{trainer.global_rank}.pt")

fit(EWC(save="fisher.safetensors"), max_epochs=1)
for name, make in CASES.items():
    torch.manual_seed(0)
    (_, whole), (trainer, again) = fit(make()), fit(make(), f"{make().__class__.__name__}/step=6.ckpt")
    assert trainer.global_step == 8, name
    for one, other in zip(whole.parameters(), again.parameters()):
        assert torch.equal(one, other), name
    print(name, "works")
opener = GradualUnfreezing(every_steps=2)
quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = Trainer(callbacks=[opener, Two()], devices=2, strategy="ddp_fork", max_epochs=4, **quiet)
whole = TensorDataset(torch.randn(24, 4, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 2)
trainer.fit(Plain(), DataLoader(whole, 3))
one, other = torch.load("rank0.pt"), torch.load("rank1.pt")
assert all(torch.equal(one[name], other[name]) for name in one)
print("two ranks agree")
from pytorch_lightning.callbacks import EarlyStopping, StochasticWeightAveraging
for both, words in (([EMA(), StochasticWeightAveraging(0.1)], "would both replace the weights"),
                    ([GradualUnfreezing(every_steps=5), EarlyStopping("val/loss", patience=0)], "could end the run")):
    try:
        trainer = Trainer(callbacks=both, max_epochs=6, enable_checkpointing=False, **quiet)
        trainer.fit(Plain(), DataLoader(whole, 3), DataLoader(whole, 3))
    except ValueError as error:
        assert words in str(error), error
        print("refused")
"""


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["lightning", "pytorch_lightning"])
def test_a_trainer_of_pytorch_lightning(own_folder: Path, imports: str) -> None:
    """Every callback as it is, or copied with its imports changed: fits, and resumes to the very weights."""
    pytest.importorskip("pytorch_lightning")
    shutil.copytree(HOME, own_folder / "callbacks", ignore=shutil.ignore_patterns("__pycache__"))
    block = ""
    if imports == "pytorch_lightning":
        block = "import sys\nsys.modules['lightning'] = None\n"
        for path in (own_folder / "callbacks").rglob("*.py"):
            text = path.read_text().replace("lightning.fabric", "lightning_fabric")
            path.write_text(text.replace("lightning.pytorch", "pytorch_lightning"))
    cases = {name: options for name, options in CASES.items() if name not in ("Constrain", "L2SP")}
    cases |= {"Constrain": {"pattern": "weight", "maximum": 0.1}, "L2SP": {"strength": 1.0}}
    built = ", ".join(f"{name!r}: lambda: callbacks.{name}(**{options!r})" for name, options in cases.items())
    lines = ["import callbacks", "from callbacks import EMA, EWC, ExactResume, GradualUnfreezing"]
    script = "\n".join([block, "import sys", "sys.path.insert(0, '.')", *lines, f"CASES = {{{built}}}", OTHER])
    (own_folder / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-2:] == ["refused", "refused"], done.stdout + done.stderr[-3000:]
    assert done.stdout.count(" works") == len(cases) and "two ranks agree" in done.stdout
