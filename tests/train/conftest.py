"""Fixtures of the training tests: the recorded data, and training runs on the recorded tiny checkpoints."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from transformers import LlamaTokenizer

if TYPE_CHECKING:
    from llava.train.llava_trainer import LLaVATrainer

collect_ignore_glob = [] if find_spec("datasets") else ["test_*.py"]  # records are read with it

LLM = "lmsys/vicuna-tiny-v1.5"
TOWER = "openai/clip-vit-tiny-patch14-84"


@pytest.fixture(scope="session")
def tokenizer(golden: Path) -> LlamaTokenizer:
    """The tokenizer that the published code was recorded with."""
    return LlamaTokenizer.from_pretrained(str(golden / "checkpoints" / LLM))


@pytest.fixture(scope="session")
def conversations(golden: Path) -> list[dict]:
    """Six records: five with an image, one without."""
    return json.loads((golden / "data/questions/train6.json").read_text(encoding="utf-8"))


@pytest.fixture
def write_records(tmp_path: Path) -> Callable[[list], Path]:
    """Write records as a training file."""

    def write(records: list, name: str = "data.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(records))
        return path

    return write


@pytest.fixture
def run_training(golden: Path, checkpoints: Path, tmp_path: Path) -> "Callable[..., LLaVATrainer]":
    """Train a tiny model; flags as keywords override these, None leaves one out."""

    def run(**flags: object) -> "LLaVATrainer":
        from llava.train.train import train

        chosen = {
            "model_name_or_path": LLM,
            "vision_tower": TOWER,
            "data_path": golden / "data/questions/train6.json",
            "image_folder": golden / "data/images",
            "image_aspect_ratio": "pad",
            "output_dir": tmp_path / "run",
            "max_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "disable_tqdm": True,
        } | flags
        arguments = [word for key, value in chosen.items() if value is not None for word in (f"--{key}", str(value))]
        return train(arguments)

    return run
