"""The server over a real socket: each of many answers is right, and what is not a request to answer is told so."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from recipes.deploy.restored import restore
from recipes.deploy.samples import pixels
from recipes.text import TextClassifier
from recipes.vision import VisionClassifier
from tests.recipes.deploy.test_requests import encoded, form
from tests.tiny_encoders import sentence, tiny_encoder, tokenizer

pytest.importorskip("litserve")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside LitServe's dependencies

from recipes.serve import answers, check_free, main  # noqa: E402

CLASSES = ["a", "b", "c"]


class Server(NamedTuple):
    port: int
    process: subprocess.Popen[bytes]
    checkpoint: Path

    def post(self, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and JSON; an iterator goes in chunks, without a length."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request("POST", "/predict", body, named)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def health(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def family(self) -> list[int]:
        """This process, and those that it started."""
        pids = [self.process.pid]
        for pid in pids:
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                pids += [int(child) for child in task.read_text().split()]
        return pids

    def memory(self) -> int:
        """Megabytes at the most, of the one that had most."""
        status = [Path(f"/proc/{pid}/status").read_text() for pid in self.family()]
        return max(int(text.split("VmHWM:")[1].split()[0]) for text in status if "VmHWM" in text) // 1024

    def cpu(self) -> float:
        """Seconds of all of them so far."""
        fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in self.family()]
        return sum(int(user) + int(system) for *_, user, system in (row[:13] for row in fields)) / os.sysconf(
            "SC_CLK_TCK"
        )


def save(model: Any, path: Path, **data: Any) -> Path:
    """A checkpoint as a run would write it, without the run."""
    content: dict[str, Any] = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "Data": data}
    content["pytorch-lightning_version"] = "2.6.0"
    model.on_save_checkpoint(content)
    torch.save(content, path)
    return path


@torch.no_grad()
def spread(head: Any, logits: torch.Tensor) -> None:
    """Let the answers of a net that learnt nothing differ, so that two of them cannot be mistaken."""
    scale = 3 / logits.std(0)
    head.weight *= scale[:, None]
    head.bias.sub_(logits.mean(0)).mul_(scale)


def vision_checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    model = VisionClassifier(3, backbone="resnet8", image_size=32)
    images = torch.stack([pixels(io.BytesIO(encoded(number)), "it", 32) for number in range(50)]).float() / 255
    spread(model.head, model.eval()(images).detach())
    return save(model, folder / "pictures.ckpt", class_names=CLASSES)


def text_checkpoint(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    words = tokenizer()
    encoder = tiny_encoder(folder / "bert", initializer_range=0.5)  # texts differ, and need no large factor below
    model = TextClassifier(3, encoder=str(encoder))
    some = words(
        [sentence(number % 2, number // 2, number % 30) for number in range(50)], padding=True, truncation=True
    )
    tokens = {name: torch.tensor(some[name]) for name in ("input_ids", "attention_mask")}
    spread(model.net.classifier, model.eval()(**tokens).detach())
    words.save_pretrained(folder / "words")
    files = {path.name: path.read_text() for path in (folder / "words").iterdir()}
    facts = {"tokenizer_files": files, "max_length": 32}
    return save(model, folder / "texts.ckpt", class_names=CLASSES, **facts, **changes)


def started(checkpoint: Path) -> Server:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "recipes.serve", str(checkpoint), "--port", str(port), "--accelerator=cpu"]
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    server = Server(port, process, checkpoint)
    end = time.monotonic() + 120
    while server.health() != 200:
        assert process.poll() is None and time.monotonic() < end, "the server did not start"
        time.sleep(0.2)
    return server


def stopped(server: Server) -> None:
    family = server.family()
    server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(60)
        end = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in family) and time.monotonic() < end:
            time.sleep(0.1)
        assert not [pid for pid in family if Path(f"/proc/{pid}").exists()], "a process is left behind"
    finally:
        for pid in family:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = started(vision_checkpoint(tmp_path_factory.mktemp("pictures")))
    yield server
    stopped(server)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = started(text_checkpoint(tmp_path_factory.mktemp("texts")))
    yield server
    stopped(server)


@pytest.mark.slow
def test_two_hundred_at_once_get_each_its_own_answer(pictures: Server) -> None:
    bodies = [encoded(number) for number in range(200)]
    broken = b"no picture"  # between the others, and in their batches

    def ask(number: int) -> tuple[int, Any]:
        body = bodies[number]
        if number % 20 == 7:
            return pictures.post(broken)
        if number % 3 == 0:
            content, kind = form(body)
            return pictures.post(content, Content_Type=kind)
        if number % 3 == 1:
            content = json.dumps({"image": base64.b64encode(body).decode()}).encode()
            return pictures.post(content, Content_Type="application/json")
        return pictures.post(body)

    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(ask, range(200)))
    restored = restore(pictures.checkpoint)
    images = torch.stack([pixels(io.BytesIO(body), "it", 32) for body in bodies]).float() / 255
    with torch.no_grad():
        expected = restored.model.predict_step({"image": images, "index": torch.arange(200)}, 0)
    everything = restored.logits(images).softmax(1)
    assert len(set(expected["label"].tolist())) == 3 and torch.pdist(everything).median() > 0.02, "they are distinct"
    for number, (status, answer) in enumerate(found):
        if number % 20 == 7:
            assert status == 422 and "no image that can be read" in answer["detail"]
            continue
        assert status == 200, answer
        assert answer["label"] == CLASSES[int(expected["label"][number])]
        assert answer["probability"] == pytest.approx(float(expected["probability"][number]), abs=1e-4)
        assert list(answer["probabilities"].values()) == pytest.approx(everything[number].tolist(), abs=1e-4)


@pytest.mark.slow
def test_texts_at_once_and_what_is_none(texts: Server) -> None:
    asked = [sentence(number % 2, number // 2, number % 30) for number in range(100)]
    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(lambda text: texts.post(json.dumps({"text": text})), asked))
    expected = restore(texts.checkpoint).logits(asked).softmax(1)
    assert torch.pdist(expected).median() > 0.02, "they are distinct"
    for (status, answer), row in zip(found, expected, strict=True):
        assert status == 200
        assert list(answer["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-4)
    for body in ("", "{", "[1]", '{"text": 3}', '{"text": "  "}', r'{"text": "\ud800"}', b"\xff", "[" * 100_000):
        status, answer = texts.post(body)
        assert status in (400, 422) and '{"text": "..."}' in answer["detail"], body
    assert texts.post("x" * (11 * 2**20))[0] == 413
    assert texts.post('{"text": "again"}')[0] == 200


@pytest.mark.slow
def test_it_sleeps_while_nobody_asks(texts: Server) -> None:
    assert texts.post('{"text": "one"}')[0] == 200
    before = texts.cpu()
    time.sleep(5)
    assert texts.cpu() - before < 0.25
    assert texts.post('{"text": "another"}')[0] == 200


def bomb(side: int) -> bytes:
    """A PNG of some bytes that says it is `side` wide and high."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    rows = zlib.compress(bytes(3 * side + 1) * 10)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.slow
def test_what_is_no_picture_is_told(pictures: Server) -> None:
    gif = io.BytesIO()
    Image.new("F", (4, 4)).save(gif, "TIFF")
    asked: list[tuple[int, bytes, str]] = [
        (422, b"", ""),
        (422, b"just some words, in a file", "image/jpeg"),
        (422, encoded(1)[:300], ""),
        (422, gif.getvalue(), ""),
        (400, b"{'image'", "application/json"),
        (422, b'{"image": "%%%"}', "application/json"),
        (422, b'{"picture": ""}', "application/json"),
        (422, b"--xyz--", "multipart/form-data; boundary=xyz"),
        (422, b"no boundary", "multipart/form-data"),
        (413, bomb(8_000), ""),
        (413, bomb(60_000), ""),
    ]
    for status, body, kind in asked:
        found, answer = pictures.post(body, **({"Content_Type": kind} if kind else {}))
        assert found == status, (body[:40], answer)
        assert list(answer) == ["detail"] and "\n" not in answer["detail"]
    assert pictures.post(encoded(2))[0] == 200
    assert pictures.health() == 200


@pytest.mark.slow
def test_a_gigabyte_is_refused_unread(pictures: Server) -> None:
    assert pictures.post(encoded(3))[0] == 200
    before = pictures.memory()
    with socket.create_connection(("127.0.0.1", pictures.port), timeout=30) as line:  # says so, and sends nothing
        line.sendall(b"POST /predict HTTP/1.1\r\nHost: it\r\nContent-Length: 1073741824\r\n\r\n")
        assert line.recv(1000).startswith(b"HTTP/1.1 413")
    piece = bytes(2**20)
    status, answer = pictures.post(piece for _ in range(1024))  # no Content-Length
    assert status == 413 and answer["detail"].startswith("the body is longer than 10 MB")
    assert pictures.memory() - before < 100
    with socket.create_connection(("127.0.0.1", pictures.port), timeout=30) as line:  # and one that hangs up
        line.sendall(b"POST /predict HTTP/1.1\r\nHost: it\r\nContent-Length: 1000\r\n\r\nabc")
    assert pictures.post(encoded(3))[0] == 200
    assert pictures.health() == 200


def test_answers_of_every_problem() -> None:
    logits = torch.tensor([[2.0, -1.0, 1.0]])
    (several,) = answers(logits, CLASSES, "multi_label_classification")
    assert several["labels"] == ["a", "c"] and several["probabilities"]["b"] == pytest.approx(0.2689, abs=1e-4)
    assert answers(logits[:, :1], ["stars"], "regression") == [{"score": 2.0}]


def test_a_mistake_on_the_command_line_gets_a_sentence(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["none.ckpt"])
    assert ended.value.code == 2 and "no checkpoint none.ckpt" in capsys.readouterr().err


def test_a_port_that_is_taken_is_a_sentence_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit):
            main(["not/there.ckpt", "--port", str(port)])
    said = capsys.readouterr()
    assert f"port {port} of 127.0.0.1 cannot be had (Address already in use): give another --port" in said.err
    assert "answers with" not in said.out
    check_free("127.0.0.1", port)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        pytest.param("pictures", "vision, 3 classes: a, b, c\n\n    curl --data-binary @image.jpg {}/predict"),
        pytest.param(
            "texts",
            "text, 3 classes: a, b, c\n\n    curl -H 'Content-Type: application/json' -d '{{\"text\": \"...\"}}' {}/",
        ),
    ],
)
def test_the_first_page_says_how_to_ask(recipe: str, words: str, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(recipe)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", "/")
    answer = connection.getresponse()
    page = answer.read().decode()
    connection.close()
    assert answer.status == 200 and words.format(f"http://127.0.0.1:{server.port}") in page
