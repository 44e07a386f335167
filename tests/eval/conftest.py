"""What the evaluation tests share: a small POPE on disk, a model that is easy to reason about, a judge's endpoint."""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw

REPOSITORY = Path(__file__).parents[2]
SUFFIX = "\nAnswer the question using a single word or phrase."
CATEGORIES = {"adversarial": 0, "popular": 20_000_000, "random": 10_000_000}


@pytest.fixture
def repository() -> Path:
    return REPOSITORY


@pytest.fixture
def oracle(golden: Path) -> Path:
    """Made-up POPE answers with the numbers of the official script."""
    return golden / "oracle" / "pope"


def draw_image(path: Path, number: int) -> None:
    image = Image.new("RGB", (60 + 7 * number, 90), (20 * number % 256, 90, 160))
    ImageDraw.Draw(image).ellipse((10, 10, 30 + 5 * number, 50), fill=(200, 30 * number % 256, 40))
    image.save(path)


def write_lines(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def make_pope(tmp_path: Path) -> Callable[..., Path]:
    """Write a POPE of `num_images` images with 2 questions each per category; returns the benchmark's folder."""

    def make(num_images: int = 3, folder: Path = tmp_path / "data" / "pope") -> Path:
        questions = []
        for category, base in CATEGORIES.items():
            labels = []
            for number in range(2 * num_images):
                image = f"COCO_val2014_{number // 2:012d}.jpg"
                text = f"Is there {'a red circle' if number % 3 else 'an umbrella'} in the image?"
                questions.append(
                    {"question_id": base + number + 1, "image": image, "text": text + SUFFIX, "category": category}
                )
                label = "yes" if number % 2 else "no"
                labels.append({"question_id": number + 1, "image": image, "text": text, "label": label})
            write_lines(folder / "coco" / f"coco_pope_{category}.json", labels)
        write_lines(folder / "llava_pope_test.jsonl", questions)
        (folder / "val2014").mkdir()
        for number in range(num_images):
            draw_image(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg", number)
        return folder

    return make


@pytest.fixture
def tiny_checkpoint(tmp_path: Path, golden: Path) -> Path:
    """The recorded TRIM checkpoint, usable from any working directory."""
    folder = tmp_path / "models" / "llava-tiny"
    shutil.copytree(golden / "checkpoints" / "llava-v1.5-tiny84-TRIM", folder)
    config = json.loads((folder / "config.json").read_text())
    config["mm_vision_tower"] = str(golden / "checkpoints" / config["mm_vision_tower"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


END = -1


class FakeTokenizer:
    """One token per character."""

    bos_token_id = 1

    def __call__(self, texts: list[str], **options: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[[1, *map(ord, text)] for text in texts])

    def batch_decode(self, rows: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [f" {'-'.join(str(number) for number in row.tolist() if number != END)}\n" for row in rows]


class FakeProcessor:
    image_mean = (0.5, 0.5, 0.5)

    def preprocess(self, image: Image.Image, **_: object) -> dict:
        if image.width == 1:
            raise ValueError("impossible shape")
        values = torch.tensor(image.resize((1, 1)).getpixel((0, 0)), dtype=torch.float32)
        return {"pixel_values": [values.reshape(3, 1, 1)]}


class FakeModel:
    """Its answer names the prompt's length, the colours of its images and the lengths of their queries."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self) -> None:
        self.config = SimpleNamespace(
            image_aspect_ratio="pad", mm_use_im_start_end=False, mm_hidden_size=3, hidden_size=4, intermediate_size=8,
            num_attention_heads=1, num_hidden_layers=1,
        )  # fmt: skip
        self.embedded: list[str] = []
        self.encoded: list[int] = []
        self.batches: list[list[int]] = []
        self.arguments: dict = {}
        self.refuses: Callable[[torch.Tensor], bool] = lambda row: False

    def encode_patches(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        self.encoded.append(len(images))
        return [image.reshape(1, 1, 3).expand(1, 4, 3) for image in images]

    def get_vision_tower(self) -> SimpleNamespace:
        return SimpleNamespace(num_patches=4)

    def embed_queries(self, texts: list[str]) -> torch.Tensor:
        self.embedded += texts
        return torch.tensor([[float(len(text))] for text in texts])

    def make_image_tokens(
        self,
        patches: list[torch.Tensor],
        texts: list[str],
        image_sizes: list[tuple[int, int]],
        text_embeds: torch.Tensor,
    ) -> list[SimpleNamespace]:
        assert len(patches) == len(texts) == len(image_sizes)
        assert text_embeds[:, 0].tolist() == list(map(len, texts))
        return [
            SimpleNamespace(num_tokens=1 + len(text) % 4, num_patches=4, seen=(int(crops.sum()), len(text), *size))
            for crops, text, size in zip(patches, texts, image_sizes, strict=True)
        ]

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_tokens: list, **arguments: object
    ) -> torch.Tensor:
        from llava.errors import InputError

        self.arguments = arguments
        rows, images = [], iter(image_tokens)
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = ids[mask]
            if self.refuses(prompt):
                raise InputError("the prompt is too long")
            seen = [number for _ in range((prompt == -200).sum()) for number in next(images).seen]
            rows.append([len(prompt), int(prompt.sum()) % 9973, *seen])
        assert next(images, None) is None
        self.batches.append([row[0] for row in rows])
        width = max(map(len, rows))
        return torch.tensor([row + [END] * (width - len(row)) for row in rows])


@pytest.fixture
def fake_parts() -> tuple[FakeModel, FakeTokenizer, FakeProcessor]:
    return FakeModel(), FakeTokenizer(), FakeProcessor()


@dataclass
class FakeEndpoint:
    """A real HTTP server on this machine that speaks the chat-completions protocol.

    Attributes:
        address: what `OPENAI_BASE_URL` is set to.
        requests: bodies of all requests, in order of arrival.
        headers: theirs, by name in lower case.
        path: where completions are; anything else is not found.
        respond: makes the answer to a body: a text (the reply), a `Fault`, or None to hang up without a word.
    """

    address: str = ""
    requests: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    path: str = "/v1/chat/completions"
    respond: Callable[[dict], "str | Fault | None"] = lambda body: "1.0"
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Fault:
    """An answer that is no completion, or a late one."""

    status: int = 200
    body: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str = "application/json"
    delay_seconds: float = 0.0
    seconds_per_byte: float = 0.0


def completion(reply: str | None) -> str:
    message = {"role": "assistant", "content": reply}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return json.dumps({"id": "c1", "object": "chat.completion", "created": 1, "model": "fake", "choices": [choice]})


def make_handler(endpoint: FakeEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint.lock:
                endpoint.requests.append(body)
                endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
                answer = endpoint.respond(body) if self.path == endpoint.path else Fault(404)
            if answer is None:
                self.close_connection = True
                return
            fault = answer if isinstance(answer, Fault) else Fault(body=completion(answer))
            time.sleep(fault.delay_seconds)
            content = fault.body.encode()
            with contextlib.suppress(ConnectionError):
                self.send_response(fault.status)
                self.send_header("Content-Type", fault.content_type)
                self.send_header("Content-Length", str(len(content)))
                for name, value in fault.headers:
                    self.send_header(name, value)
                self.end_headers()
                if not fault.seconds_per_byte:
                    self.wfile.write(content)
                    return
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    time.sleep(fault.seconds_per_byte)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # of 5, the default, some of 16 connections at once are lost for minutes


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    """A judge's endpoint, named by the environment as a user would."""
    pytest.importorskip("openai")
    fake = FakeEndpoint()
    server = Server(("127.0.0.1", 0), make_handler(fake))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    fake.address = f"http://127.0.0.1:{server.server_port}/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", fake.address)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-made-up")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield fake
    server.shutdown()
    server.server_close()


@pytest.fixture
def fault() -> type[Fault]:
    """The class of answers that are no completion."""
    return Fault
