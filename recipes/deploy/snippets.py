"""The lines that load an export and use it: its README shows them, and its check runs them.

Each text of Python below reads `folder`, where the export lies, and `images`, an array `(batch, 3, size, size)` in
[0, 1], or `texts`, a list; it leaves `logits`. `PIXELS` is a file that reads images, and `IMAGES` uses it on
`files`. None of it needs this package.
"""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from ..parts.backbones import backbone_facts
from ..parts.backbones.families import FAMILY_OF
from ..parts.backbones.small_resnet import SmallResNet
from ..parts.encoders import encoder_path
from ..parts.peft import adapters
from .restored import READING

PIXELS = f'''{READING.replace("{", "{{").replace("}", "}}")}

def pixels(file, size={{size}}):
    """The middle of an image as in evaluation, (3, size, size), in [0, 1]."""
    return np.asarray(evaluation_crop(read_rgb(file), size), np.float32).transpose(2, 0, 1) / 255
'''
IMAGES = """\
import runpy
import numpy as np

pixels = runpy.run_path(f"{folder}/pixels.py")["pixels"]
images = np.stack([pixels(file) for file in files])
"""

TORCH = """\
import json
import torch
{imports}
facts = {{"facts.json": ""}}
program = torch.export.load(f"{{folder}}/model.pt2", extra_files=facts).module()
{inputs}
{outputs} = program({arguments})
class_names = json.loads(facts["facts.json"])["class_names"]
"""

ONNX = """\
import json
import onnxruntime
{imports}
session = onnxruntime.InferenceSession(f"{{folder}}/model.onnx")
{inputs}
{outputs} = session.run(None, {arguments})
class_names = json.loads(session.get_modelmeta().custom_metadata_map["facts"])["class_names"]
"""

TORCH_TASKS = """\
import json
import numpy as np
import torch
{imports}
facts = {{"facts.json": ""}}
program = torch.export.load(f"{{folder}}/model.pt2", extra_files=facts).module()
{inputs}
tasks = json.loads(facts["facts.json"])["tasks"]
outputs = dict(zip(tasks, (values.detach() for values in program({arguments}))))
"""

ONNX_TASKS = """\
import json
import numpy as np
import onnxruntime
{imports}
session = onnxruntime.InferenceSession(f"{{folder}}/model.onnx")
{inputs}
tasks = json.loads(session.get_modelmeta().custom_metadata_map["facts"])["tasks"]
outputs = dict(zip(tasks, session.run(None, {arguments})))
"""

ANSWERS = """\
answers = {}
for name, task in tasks.items():
    values, names = np.asarray(outputs[name]), task["class_names"]
    if task["kind"] == "classification":
        answers[name] = [names[number] for number in values.argmax(1)]
    elif task["kind"] == "multi_label":
        answers[name] = [[label for label, value in zip(names, row) if value > 0] for row in values]
    else:
        answers[name] = values[:, 0] if task["kind"] == "regression" else values.argmax(1)
"""

TOKENS = """\
encoded = Tokenizer.from_file(f"{{folder}}/tokenizer.json").encode_batch(texts)
columns = {columns}
inputs = {{name: {array}([getattr(text, kind) for text in encoded]) for name, kind in columns.items()}}"""

PLAIN_IMAGES = """\
import json
from pathlib import Path
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import Normalize
{imports}
{net}
model = nn.Sequential(Normalize({mean}, {std}), net, {head}).eval()
model.load_state_dict(load_file(f"{{folder}}/model.safetensors"))
{logits}
probabilities = logits.softmax(1)
class_names = json.loads(Path(f"{{folder}}/facts.json").read_text("utf-8"))["class_names"]
"""

PLAIN_LOGITS = "logits = model(torch.from_numpy(images))"
PLAIN_MIRRORED = """\
views = [torch.from_numpy(images), torch.from_numpy(images).flip(3)]
logits = torch.stack([model(view).softmax(1) for view in views]).mean(0).log()"""

PLAIN_TEXTS = """\
import json
from pathlib import Path
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, {auto}

facts = json.loads(Path(f"{{folder}}/facts.json").read_text("utf-8"))
model = nn.ModuleDict({{"net": {auto}.from_config(AutoConfig.for_model(**facts["encoder"]))}})
{head}
model.eval().load_state_dict(load_file(f"{{folder}}/model.safetensors"))
{inputs}
{logits}
{probabilities}
class_names = facts["class_names"]
"""

TRANSFORMERS = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
inputs = tokenizer(texts, truncation=True, max_length={max_length}, padding=True, return_tensors="pt")
logits = model(**inputs).logits
{probabilities}
class_names = list(model.config.id2label.values())
"""

ADAPTERS = """\
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

base = {base!r}
config = AutoConfig.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(base, config=config)
model = PeftModel.from_pretrained(model, folder).eval()
inputs = tokenizer(texts, truncation=True, max_length={max_length}, padding=True, return_tensors="pt")
logits = model(**inputs).logits
{probabilities}
class_names = list(config.id2label.values())
"""

WEIGHTS_ONLY = "safetensors holds weights only, and no other library builds a"
PROBABILITIES = {
    "single_label_classification": "probabilities = logits.softmax(1)",
    "multi_label_classification": "probabilities = logits.sigmoid()",
    "regression": "scores = logits[:, 0]",
}
LABELS = {
    "single_label_classification": "labels = [class_names[number] for number in probabilities.argmax(1)]",
    "multi_label_classification": (
        "labels = [[name for name, yes in zip(class_names, row) if yes] for row in probabilities > 0.5]"
    ),
    "regression": "",
}
POOLED = {
    "cls": "hidden[:, 0]",
    "mean": "(hidden * mask).sum(1) / mask.sum(1)",
}


def lines_for(restored: Any, form: str) -> str:
    """The lines for a model in a form.

    Args:
        restored: A `loading.Restored`.
        form: `torch`, `onnx`, `safetensors` or `hf`.

    Raises:
        ValueError: Other libraries have no such model.
    """
    if restored.tasks and form not in ("torch", "onnx"):
        raise ValueError(f"{WEIGHTS_ONLY} net of several tasks: take --format torch or onnx, which hold the net, too")
    if restored.tasks:
        return graph_lines(restored, form) + ANSWERS
    if form == "hf":
        base = encoder_path(restored.model.hparams["encoder"])
        lines = (ADAPTERS if adapters(restored.net) else TRANSFORMERS).format(
            base=base, max_length=restored.max_length, probabilities=PROBABILITIES[restored.problem_type]
        )
    elif form == "safetensors":
        lines = plain_images(restored.model) if restored.reads == "vision" else plain_texts(restored)
    else:
        lines = graph_lines(restored, form)
    return "\n".join(line for line in (*lines.rstrip().split("\n"), LABELS[restored.problem_type]) if line) + "\n"


def graph_lines(restored: Any, form: str) -> str:
    """For a graph of torch or ONNX."""
    array = "torch.tensor" if form == "torch" else "np.array"
    outputs = "(logits,)" if restored.problem_type == "regression" else "logits, probabilities"
    template = (
        (TORCH if form == "torch" else ONNX) if not restored.tasks else TORCH_TASKS if form == "torch" else ONNX_TASKS
    )
    if restored.reads == "vision":
        arguments = "images=torch.from_numpy(images)" if form == "torch" else '{"images": images}'
        return template.format(imports="", inputs="", outputs=outputs, arguments=arguments)
    return template.format(
        imports=("" if form == "torch" or restored.tasks else "import numpy as np\n")
        + "from tokenizers import Tokenizer",
        inputs=TOKENS.format(array=array, columns=columns_of(restored)),
        outputs=outputs,
        arguments="**inputs" if form == "torch" else "inputs",
    )


def columns_of(restored: Any) -> str:
    """Input of the model -> attribute of an `Encoding` of tokenizers."""
    types = {"token_type_ids": "type_ids"} if restored.typed else {}
    return json.dumps({"input_ids": "ids", "attention_mask": "attention_mask", **types})


def plain_images(model: Any) -> str:
    """For the weights alone, in a net that torchvision, timm or a small file builds."""
    if model.backbone.fusion is not None:
        raise ValueError(f"{WEIGHTS_ONLY} net that joins blocks: take --format torch or onnx, which hold the net, too")
    imports, net = net_lines(model)
    mean, std = ([round(float(value), 6) for value in values.flatten()] for values in (model.mean, model.std))
    return PLAIN_IMAGES.format(
        imports=imports,
        net="\n".join(net),
        mean=mean,
        std=std,
        head=as_source(model.head),
        logits=PLAIN_MIRRORED if model.mirror_at_test else PLAIN_LOGITS,
    )


def net_lines(model: Any) -> tuple[str, list[str]]:
    """An import and the lines that build a backbone without weights, as `net`."""
    backbone = model.backbone
    name, size, net = backbone.name, backbone.input_size, backbone.net
    if name.startswith("timm/"):
        facts = backbone_facts(name)
        sized = f", img_size={size}" if facts.fixed_size and size != facts.input_size else ""
        return "import timm", [f'net = timm.create_model("{name.removeprefix("timm/")}", num_classes=0{sized})']
    if isinstance(net, SmallResNet):
        depth = int(name.removeprefix("resnet"))
        return "import runpy", [f'net = runpy.run_path(f"{{folder}}/small_resnet.py")["SmallResNet"]({depth})']
    family = FAMILY_OF[name]
    options = family.options(size, False)
    if "init_weights" in options:
        options["init_weights"] = False  # slow, and the weights are about to be loaded
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    lines = [f'net = get_model("{name}", weights=None{given})']
    for path in family.strip:
        kept = net.get_submodule(path)
        lines.append(
            f"net.{path} = " + (f"net.{path}[:{len(kept)}]" if isinstance(kept, nn.Sequential) else as_source(kept))
        )
    if family.small_stem and isinstance(net.maxpool, nn.Identity):
        lines += [f"net.conv1 = {as_source(net.conv1)}", "net.maxpool = nn.Identity()"]
    return "from torchvision.models import get_model", lines


def as_source(module: nn.Module) -> str:
    """A module of torch as Python.

    Raises:
        ValueError: It is none of torch's own.
    """
    if isinstance(module, nn.Sequential):
        return f"nn.Sequential({', '.join(map(as_source, module))})"
    if type(module).__name__ not in vars(nn):
        raise ValueError(
            f"{WEIGHTS_ONLY} {type(module).__name__}: take --format torch or onnx, which hold the net, too"
        )
    return f"nn.{module!r}"


def plain_texts(restored: Any) -> str:
    """For the weights alone, in a net that transformers builds."""
    model = restored.model
    if model.fusion is not None:
        raise ValueError(f"{WEIGHTS_ONLY} net that joins blocks: take --format torch or onnx, which hold the net, too")
    inputs = TOKENS.format(array="torch.tensor", columns=columns_of(restored))
    shared = {"inputs": inputs, "probabilities": PROBABILITIES[restored.problem_type]}
    if model.pooling == "model":
        auto, logits = "AutoModelForSequenceClassification", 'logits = model["net"](**inputs).logits'
        return PLAIN_TEXTS.format(auto=auto, head="", logits=logits, **shared)
    head = f'model["net"].pooler = None\nmodel["head"] = {as_source(model.head)}'
    mask = 'mask = inputs["attention_mask"].unsqueeze(2)\n' if model.pooling == "mean" else ""
    hidden = 'hidden = model["net"](**inputs).last_hidden_state\n'
    logits = f'{hidden}{mask}logits = model["head"]({POOLED[model.pooling]})'
    return PLAIN_TEXTS.format(auto="AutoModel", head=head, logits=logits, **shared)
