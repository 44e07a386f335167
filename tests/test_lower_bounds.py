"""Packages that only one part needs: nothing else imports them, and without one the part says so in one line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava.errors import PACKAGES, run_command
from llava.packages import name_package

ROOT = Path(__file__).parents[1]
# Imports all that loads, reduces, answers, scores by rules, or measures; transformers itself imports accelerate.
IMPORTS = """
import importlib, pkgutil, sys
import llava.chat, llava.efficiency, llava.eval.__main__, llava.model.builder
for package in (llava.efficiency, llava.eval.benchmarks):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
print(*sorted(set(sys.argv[1:]) & set(sys.modules)))
"""
# Hides packages from Python, then loads a checkpoint, reduces, answers, scores and measures.
WORK = """
import importlib.metadata, importlib.util, sys
hidden = set(sys.argv[1:])

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in hidden else find_spec(name, *rest)

import torch
from llava.efficiency.stages import Runner, make_batch
from llava.clock import StageClock
from llava.efficiency.random_model import build_random_model
from llava.eval.metrics.yes_no import count_yes_no
from llava.generation import GreedyDecoder
from llava.model.builder import load_pretrained_model
from scripts.bench.side_by_side import SIZES

tokenizer, model, processor, _ = load_pretrained_model("llava-v1.5-tiny84-TRIM", device="cpu", dtype="float32")
tokens = model.encode_images(torch.randn(1, 3, 84, 84), ["What color is it?"])
prompt = torch.tensor([5, 6, -200, 7])
GreedyDecoder(model).decode([prompt], [tuple(tokens)], 3)
count_yes_no([("yes", "no")])
config, tower = SIZES["tiny"]
model, processor = build_random_model(config, tower, device=torch.device("cpu"), dtype=torch.float32)
batch = make_batch(1, 8, 2, vocab_size=1000, image_size=(64, 48))
Runner(model, processor).run(batch, StageClock(torch.device("cpu")))
print("done", *sorted(hidden & set(sys.modules)))
"""


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *PACKAGES]
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_only_the_parts_that_need_a_package_import_it() -> None:
    done = run_python(IMPORTS, ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() in ([], ["accelerate"])


def test_loading_reducing_answering_and_measuring_need_none_of_them(golden: Path) -> None:
    done = run_python(WORK, golden / "checkpoints")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["done"]


@pytest.mark.parametrize("module", ["open_clip.factory", "openai"])
def test_a_command_names_the_package_that_it_lacks(module: str, capsys: pytest.CaptureFixture) -> None:
    def command() -> None:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    with pytest.raises(SystemExit) as end:
        run_command(command)
    package = name_package(module.partition(".")[0])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"error: this needs the package {package}, which is not installed: pip install {package}\n"
    )


def test_another_missing_module_keeps_its_traceback() -> None:
    def command() -> None:
        raise ModuleNotFoundError("No module named 'llava.nothing'", name="llava.nothing")

    with pytest.raises(ModuleNotFoundError):
        run_command(command)


def test_the_tested_lower_bounds_are_those_of_the_project() -> None:
    listed = (ROOT / "scripts" / "lower_bounds.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^(\w+)==(\S+)$", listed, re.M))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = dict(re.findall(r'"(\w+)>=([\d.]+)', project))
    assert {"torch", "torchvision", "transformers"} <= pinned.keys()
    for package, version in pinned.items():
        assert version.removesuffix(".0") == bounds[package], package


@pytest.mark.parametrize("script", ["test_lower_bounds.sh", "test_vllm.sh", "test_clients.sh", "test_page.sh"])
def test_the_scripts_with_an_environment_of_their_own_want_a_folder(script: str) -> None:
    done = subprocess.run(["bash", f"scripts/{script}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: name a folder for the environment")
