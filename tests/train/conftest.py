"""Fixtures of the training tests: the recorded data, and training runs on the recorded tiny checkpoints."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from transformers import LlamaTokenizer

from tests.train.scenarios import LIMIT_SECONDS, LLM, ROOT, TRIM

if TYPE_CHECKING:
    from llava.train.llava_trainer import LLaVATrainer

collect_ignore_glob = [] if find_spec("datasets") else ["test_*.py"]  # records are read with it

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


@pytest.fixture(scope="module")
def run_ranks(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[dict]], Path]:
    """Run scenarios one after the other; in the golden checkpoints' folder, where tower names are relative.

    Each has a name, flags, and where it is not another scenario's run going on, an output folder of its name.
    """
    folder = tmp_path_factory.mktemp("ranks")

    def run(scenarios: list[dict]) -> Path:
        common = {
            "model_name_or_path": LLM, "vision_tower": TOWER,
            "pretrain_mm_mlp_adapter": "liuhaotian/llava-v1.5-mlp2x-tiny-pretrain/mm_projector.bin",
            "image_folder": golden / "data/images", "image_aspect_ratio": "pad", "logging_steps": 1,
            "per_device_train_batch_size": 1, "learning_rate": 1e-3, "save_strategy": "no", "disable_tqdm": True,
            **TRIM,
        }  # fmt: skip
        for scenario in scenarios:
            place = folder / scenario.get("folder", scenario["name"])
            flags = common | {"output_dir": place} | scenario["flags"]
            scenario["flags"] = {key: str(value) for key, value in flags.items() if value is not None}
        file = folder / "scenarios.json"
        file.write_text(json.dumps(scenarios))
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("ranks.py")), str(file)],
            cwd=golden / "checkpoints", capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
                              "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    return run


@pytest.fixture(scope="module")
def data(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Training files: the six records over and over; images and texts in turn; captions alone."""
    records = json.loads((golden / "data/questions/train6.json").read_text(encoding="utf-8"))
    images = [raw for raw in records if "image" in raw]
    text = next(raw for raw in records if "image" not in raw)
    more = [{"from": "human", "value": "Are you sure?"}, {"from": "gpt", "value": "Yes."}]
    contents = {
        "mixed": records * 5,  # two epochs are begun: the order of the second is made anew
        "in_turn": [raw for image in images[:3] for raw in (image, text)],
        "captions": [raw for raw in images if len(raw["conversations"]) == 2] * 2,
        "held_out": [raw | {"conversations": [*raw["conversations"], *more]} for raw in records],
    }
    folder = tmp_path_factory.mktemp("data")
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {name: folder / f"{name}.json" for name in contents}
