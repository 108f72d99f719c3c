"""Every mistake on the command line or in a YAML gets a sentence of at most five lines, and no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.vision import main

QUICK = ["fit", "--config", "vision/quickstart", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]

MISTAKES = [
    # command line, words that must be in the answer
    ("fitt", "subcommand 'fitt' is not known | did you mean 'fit'?"),
    ("--config vision/quickstart fit", "the subcommand comes first"),
    ("fit --config vision/quickstar", "did you mean 'vision/quickstart'? | ls configs"),
    ("fit --config quickstart", "or 'vision/quickstart'?"),
    ("fit --config", "--config needs a name or a file"),
    ("fit --config nowhere.yaml", "'nowhere.yaml' is neither a file nor a shipped config"),
    ("QUICK bar", "unexpected word 'bar'"),
    ("QUICK --foo 1", "key --foo is not known | --help lists every key"),
    ("QUICK --model.hed mlp", "did you mean '--model.head'?"),
    ("QUICK --model.lr 0.1", "did you mean '--model.optimizer.lr'?"),
    ("QUICK --model.backbone", "--model.backbone needs a value"),
    ("QUICK --model.backbone resnet5", "backbone 'resnet5' is not known; did you mean 'resnet50'? | ls backbones"),
    ("QUICK --model.head liner", "model.head: expected one of 'linear', 'mlp', 'cosine'; got 'liner' | 'linear'?"),
    ("QUICK --model.head_init zero", "did you mean 'zeros'?"),
    ("QUICK --model.loss focl", "did you mean 'focal'?"),
    ("QUICK --model.image_size big", "model.image_size: expected a whole number or null; got 'big'"),
    ("QUICK --model.image_size 0", "needs images of at least | model.image_size is 0"),
    (
        "QUICK --trainer.callbacks+=Freeze --trainer.callbacks.train_last_blocks=9",
        "train_last_blocks must be 0 to 5, not 9",
    ),
    ("QUICK --model.reinit_blocks 9", "model.reinit_blocks must be 0 to 4"),
    ("QUICK --model.class_weights [1,2]", "needs 5 numbers, one per class, not 2"),
    ("QUICK --model.num_classes 3", "model.num_classes follows from data: leave it out"),
    ("QUICK --model.weights nowhere.pt", "nowhere.pt"),
    ("QUICK --model.aux_weight 0.3", "no auxiliary"),
    ("QUICK --model.peft.methd lora", "key 'model.peft.methd' is not known; did you mean 'method'?"),
    ("QUICK --model.peft.method lorra", "did you mean 'lora'?"),
    ("QUICK --model.peft lora", "--model.peft.method=lora"),
    ("QUICK --model.peft.rank 4", "required and not given: model.peft.method"),
    ("QUICK --model.optimizer AdamWW", "did you mean 'AdamW'?"),
    ("QUICK --model.optimizer.lrr 1", "key 'model.optimizer.lrr' is not known; did you mean 'lr'?"),
    ("QUICK --model.optimizer.lr=-1", "model.optimizer or model.schedule: Invalid learning rate: -1"),
    ("QUICK --model.optimizer.lr fast", "model.optimizer.lr: expected a number; got 'fast'"),
    ("QUICK --model.schedule Cosin", "did you mean 'Cosine'?"),
    ("QUICK --model.schedule.warm_up 1", "did you mean 'warmup'?"),
    ("QUICK --model.schedule.warmup_share 0.1 --model.schedule.warmup_steps 5", "give warmup alone"),
    ("QUICK --model.schedule.warmup 5000", "5000"),
    ("QUICK --model.lr_multipliers {heed:2}", "heed"),
    ("QUICK --data Digit", "did you mean 'Digits'?"),
    ("QUICK --data.batchsize 3", "did you mean 'batch_size'?"),
    ("QUICK --data.batch_size many", "data.batch_size: expected a whole number; got 'many'"),
    ("QUICK --data.batch_size 0", "data.batch_size must be at least 1, not 0"),
    ("QUICK --data.augment heavy", "expected one of 'none', 'light', 'standard', 'strong'; got 'heavy'"),
    ("QUICK --data.classes [5,15]", "different digits from 0 to 9, not [5, 15]"),
    ("QUICK --data.val_share 1.5", "between 0 and 1, not 1.5"),
    ("QUICK --data ImageFolder", "data.root is not set: give the folder"),
    ("QUICK --data ImageFolder --data.root nowhere", "no folder nowhere: expected one folder of images per class"),
    ("QUICK --data ImageFolder --data.rooot x", "did you mean 'root'?"),
    ("QUICK --feature_views 1", "add the callback Freeze with train_last_blocks=1"),
    (
        "QUICK --feature_views 1 --trainer.callbacks+=Freeze --trainer.callbacks.train_last_blocks=1 --data.mixup 0.2",
        "set data.mixup and data.cutmix to 0",
    ),
    ("QUICK --trainer.max_epoch 3", "did you mean '--trainer.max_epochs'?"),
    ("QUICK --trainer.max_epochs three", "expected a whole number or null; got 'three'"),
    ("QUICK --trainer.precision fp8", "'bf16-mixed'"),
    ("QUICK --trainer.accelerator tpuu", "tpuu"),
    ("QUICK --trainer.gradient_clip_algorithm nrm", "['value', 'norm']"),
    ("QUICK --trainer.callbacks EarlyStoping", "did you mean 'EarlyStopping'?"),
    ("QUICK --trainer.callbacks+=EarlyStopping", "required and not given: monitor"),
    ("QUICK --seed_everything x", "a whole number; got 'x'"),
    ("QUICK --ckpt_path nowhere.ckpt", "no checkpoint nowhere.ckpt"),
    ("test --ckpt_path nowhere.ckpt --config vision/quickstart", "no checkpoint nowhere.ckpt"),
    ("predict --config vision/quickstart", "predict needs --ckpt_path"),
    ("QUICK --ckpt_path last", "give the file's path"),
    ("QUICK --data.image_size 16", "set model.image_size alone"),
    ("QUICK --ckpt_path evil.ckpt", "evil.ckpt cannot be read safely"),
    ("fit --config syntax.yaml", "syntax.yaml is not valid YAML, line"),
    ("fit --config list.yaml", "must hold keys such as model, data and trainer; found list"),
    ("fit --config top.yaml", "key 'modle' is not known at the top | did you mean 'model'?"),
    ("fit --config key.yaml", "key 'model.backbon' is not known; did you mean 'model.backbone'?"),
    ("fit --config nested.yaml", "key 'lrr' is not known; did you mean 'lr'?"),
]

FILES = {
    "syntax.yaml": "model:\n  backbone: [resnet18\n",
    "list.yaml": "- 1\n- 2\n",
    "top.yaml": "modle:\n  backbone: resnet18\n",
    "key.yaml": "model:\n  backbon: resnet18\n",
    "nested.yaml": "model:\n  optimizer:\n    class_path: torch.optim.AdamW\n    init_args: {lrr: 1}\n",
}


@pytest.mark.parametrize(("command", "words"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_gets_a_sentence(
    command: str, words: str, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in FILES.items():
        (own_folder / name).write_text(text)
    (own_folder / "evil.ckpt").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    args = [part for word in command.split() for part in (QUICK if word == "QUICK" else [word])]
    with pytest.raises(SystemExit) as stopped:
        main(args)
    answer = capsys.readouterr().err
    answer = answer[answer.index("error:") :]
    assert stopped.value.code == 2
    for word in words.split(" | "):
        assert word in answer
    assert len(answer.strip().splitlines()) <= 5
    assert "Traceback" not in answer
    assert not (own_folder / "runs").exists(), "a mistake leaves no run behind"


@pytest.mark.slow
def test_an_error_that_is_not_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError("a bug in a library")

    monkeypatch.setattr("torch.nn.functional.log_softmax", broken)
    with pytest.raises(ValueError, match="a bug in a library"):
        main([*QUICK, "--model.weights=null"])
