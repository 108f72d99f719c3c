"""Serve a checkpoint over HTTP: images or texts in, classes and probabilities out.

    python -m recipes.serve runs/vision/quickstart/.../best.ckpt --port 8000
    curl --data-binary @image.jpg http://127.0.0.1:8000/predict

`POST /predict` takes an image as the body, as a file of a form, or as JSON {"image": base64}; a text as JSON
{"text": ...}, for pairs with "pair". `GET /health` says ok. Requests that come together are answered as one batch.

What cannot be answered gets a status of 4xx and one sentence. A body above the limit is refused while it comes in, also
where its length is not told; an image of too many pixels, before it is decoded.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

from .cli import early

try:
    import litserve
    from fastapi import Depends
    from litserve.loops.base import collate_requests
    from litserve.loops.simple_loops import BatchedLoop
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
except ImportError:
    if __name__ == "__main__":
        early.stop('recipes.serve needs more packages: pip install "finetuning-recipes[serve]"')
    raise

import torch
from torch import Tensor

from callbacks.predictions.columns import grey_png

from . import multitask, text, vision  # noqa: F401  whose checkpoints are served
from .cli.screen import filter_warnings
from .deploy.graphs import PROBABILITIES
from .deploy.requests import MEGABYTE, Intake
from .deploy.restored import Restored, restore


class Patient(BatchedLoop):  # type: ignore[misc]
    """LitServe's loop, asleep until a request comes: its own asks a thousand times a second whether one has.

    `batch_timeout` counts from the first request.
    """

    def get_batch_requests(self, lit_api: Any, request_queue: Any, transport: Any) -> Any:
        """The first request, and those that come soon after."""
        first = [request_queue.get()]

        def get(timeout: float) -> Any:
            return first.pop() if first else request_queue.get(timeout=timeout)

        def get_nowait() -> Any:
            return first.pop() if first else request_queue.get_nowait()

        while first:  # else a process that is held up at the wrong moment would lose it
            found = collate_requests(self, lit_api, SimpleNamespace(get=get, get_nowait=get_nowait), transport)
        return found


class Answers(litserve.LitAPI):  # type: ignore[misc]
    """The process with the model.

    Args:
        checkpoint: Of `recipes.vision`, `recipes.text` or `recipes.multitask`.
        max_batch_size: Requests that are answered together.
        batch_timeout: Seconds that the first of them waits for others.
        base: Where the weights are that a checkpoint of adapters leaves out; where they were in training if not given.
    """

    def __init__(self, checkpoint: Path, max_batch_size: int, batch_timeout: float, base: str | None = None) -> None:
        super().__init__(max_batch_size=max_batch_size, batch_timeout=batch_timeout, loop=Patient())
        self.checkpoint, self.base = checkpoint, base

    def setup(self, device: str) -> None:
        """Load the model."""
        self.restored = restore(self.checkpoint, self.base)
        self.restored.merge()
        self.restored.model.to(device)

    def decode_request(self, request: Any) -> Any:
        """What `Intake.read` made of it."""
        return request

    def batch(self, inputs: Sequence[Any]) -> Any:
        """Images in [0, 1], `(batch, 3, size, size)`, or a list of texts."""
        if self.restored.reads == "text":
            return list(inputs)
        return torch.stack([torch.from_numpy(image) for image in inputs]).float() / 255

    def predict(self, samples: Any) -> list[dict[str, Any]]:
        """An answer for each."""
        told, tasks = self.restored.outputs(samples), self.restored.tasks
        if not tasks:
            return answers(told["logits"], self.restored.class_names, self.restored.problem_type)
        columns = {name: task_answers(told[name], **task) for name, task in tasks.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """They are one by one already."""
        return output


def answers(logits: Tensor, class_names: Sequence[str], problem_type: str) -> list[dict[str, Any]]:
    """Logits `(batch, classes)` in words: the class and its probability, all classes above a half, or the score."""
    if problem_type == "regression":
        return [{"score": score} for score in logits[:, 0].tolist()]
    rows = PROBABILITIES[problem_type](logits).tolist()
    named = [dict(zip(class_names, row, strict=True)) for row in rows]
    if problem_type == "multi_label_classification":
        return [{"labels": [name for name, p in row.items() if p > 0.5], "probabilities": row} for row in named]
    best = [max(row, key=row.__getitem__) for row in named]
    return [
        {"label": name, "probability": row[name], "probabilities": row} for name, row in zip(best, named, strict=True)
    ]


def task_answers(outputs: Tensor, kind: str, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """One of several tasks' outputs in words; a mask as a grey PNG, base64, whose values are the classes' numbers."""
    if kind == "segmentation":
        masks = outputs.argmax(1).to(torch.uint8)
        return [{"mask": base64.b64encode(grey_png(mask)).decode(), "classes": list(class_names)} for mask in masks]
    if kind == "regression":
        return [{"number": number} for number in outputs[:, 0].tolist()]
    problem = "multi_label_classification" if kind == "multi_label" else "single_label_classification"
    return answers(outputs, class_names, problem)


def usage(restored: Restored, address: str) -> str:
    """What a person reads who opens the server's first page."""
    if restored.reads == "vision":
        asked = f"curl --data-binary @image.jpg {address}/predict"
    else:
        body = json.dumps({"text": "...", "pair": "..."} if restored.pairs else {"text": "..."})
        asked = f"curl -H 'Content-Type: application/json' -d '{body}' {address}/predict"
    known = f"{len(restored.class_names)} classes: {', '.join(restored.class_names[:10])}"
    learnt = "a score" if restored.problem_type == "regression" else known
    if restored.tasks:
        learnt = f"{len(restored.tasks)} tasks: {', '.join(restored.tasks)}"
    return f"{restored.recipe}, {learnt}\n\n    {asked}\n\nGET /health says whether it is ready.\n"


def check_free(host: str, port: int) -> None:
    """Refuse a port that somebody listens on, before a model is loaded.

    Raises:
        ValueError: It is taken, or not ours to take.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            raise ValueError(f"port {port} of {host} cannot be had ({error.strerror}): give another --port") from error


def end_all_on_sigterm() -> None:
    """End as after Ctrl+C: LitServe would leave its processes behind, one of them listening."""
    first = os.getpid()

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt if os.getpid() == first else SystemExit  # a fork has this handler, too

    signal.signal(signal.SIGTERM, end)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        "python -m recipes.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="runs/.../checkpoints/best.ckpt")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be reached from other machines")
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda or mps; auto takes what there is")
    parser.add_argument("--batch", type=int, default=32, help="requests that are answered together at most")
    parser.add_argument("--wait_ms", type=float, default=5, help="how long the first of them waits for others")
    parser.add_argument("--limit_mb", type=float, default=10, help="longest body")
    parser.add_argument(
        "--base", help="the weights that a checkpoint of adapters was trained beside, if they were moved"
    )
    arguments = parser.parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `early.start` does, for the process with the model
    end_all_on_sigterm()
    filter_warnings()
    try:
        check_free(arguments.host, arguments.port)
        restored = restore(arguments.checkpoint, arguments.base)
        intake = Intake(restored, int(arguments.limit_mb * MEGABYTE))
        # LitServe passes the annotation on to FastAPI, which calls what it says and hands the result over
        Answers.decode_request.__annotations__["request"] = Annotated[Any, Depends(intake.read)]
        api = Answers(arguments.checkpoint, arguments.batch, arguments.wait_ms / 1000, arguments.base)
        server = litserve.LitServer(api, accelerator=arguments.accelerator, disable_openapi_url=True)
        address = f"http://{arguments.host}:{arguments.port}"
        first = PlainTextResponse(usage(restored, address))
        server.app.router.routes.insert(0, Route("/", lambda request: first))  # before LitServe's own
        print(f"{address}/predict answers with {', '.join(list(restored.tasks) or restored.class_names[:10])}")
        server.run(host=arguments.host, port=arguments.port, log_level="warning", generate_client_file=False)
    except (ValueError, OSError) as error:
        early.stop(str(error))


if __name__ == "__main__":
    main()
