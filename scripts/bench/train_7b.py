"""LoRA training of LLaVA-1.5-7B at its true size, with random weights: seconds a step without reduction and with TRIM.

Random weights in the published layout (13.5 GB, and CLIP's 1.7 GB) are written once to a folder; a run that was
interrupted there goes on. Then the repository's own training command takes a few steps of each kind (bfloat16, gradient
checkpointing, batch 1), the adapter is loaded on its base, and a question is answered. The first step warms up and does
not count.

    python -m scripts.bench.train_7b --weights DIR                 17 to 20 GiB of memory
    python -m scripts.bench.train_7b --weights DIR2 --layers 2     a part of it, to see that all works
"""
# ruff: noqa: T201

import argparse
from pathlib import Path

from llava.efficiency.shapes import PUBLISHED_MODELS
from scripts.bench import side_by_side

CONFIG = PUBLISHED_MODELS["llava-v1.5-7b"]


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = side_by_side.make_parser(__doc__, repeats=False)
    parser.add_argument("--weights", type=Path, required=True, metavar="DIR", help="folder of the random weights")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="decoder layers (default: 32)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each kind (default: %(default)s)")
    parser.add_argument("--lora-rank", type=int, default=64, help="rank of the adapters (default: %(default)s)")
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from llava.efficiency.cost import Precision, weight_bytes
from llava.efficiency.estimate import PUBLISHED_KEPT_RATIO
from llava.efficiency.memory import available_bytes
from llava.efficiency.random_model import WEIGHT_STD, build_random_model
from llava.efficiency.shapes import read_shape
from llava.errors import InputError, run_command
from llava.files import atomic_folder, atomic_write, make_folder, read_json, write_json
from llava.model.checkpoint_folder import tidy_checkpoint

INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 2 * 10**9
SIZE = 2  # bytes of a bfloat16
ADAM_BYTES = 16  # of a trained number: itself, its gradient and two states in float32
ROOM_BYTES = 1.5 * 2**30  # activations, images and libraries
NONE, TRIM = "none", f"TRIM:{PUBLISHED_KEPT_RATIO}"
STEP_ROW = re.compile(r"\s*\d+/\d+ ")  # of `llava.train.console`
TURNS = 6  # questions about each image: with their answers about 100 tokens of text


# --------------------------------------------------------------------------------------------------- the weights
def list_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """List the weights of a LLaVA without its tower, and their shapes, in the order of the model."""
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    with torch.device("meta"):
        model = LlavaLlamaForCausalLM._from_config(LlavaConfig.from_dict(dict(config)), dtype=torch.bfloat16)
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def split_shards(shapes: Mapping[str, tuple[int, ...]], limit: int) -> Iterator[list[str]]:
    """Divide weights into files of at most `limit` bytes, or of one weight."""
    names: list[str] = []
    held = 0
    for name, shape in shapes.items():
        size = SIZE * torch.Size(shape).numel()
        if names and held + size > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw a weight, the same for the same name: matrices of small normal numbers, norms of ones, biases of zeros."""
    weight = torch.empty(shape, dtype=torch.bfloat16)
    if len(shape) == 1:
        return weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return weight.normal_(std=WEIGHT_STD, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def write_weights(folder: Path, config: Mapping[str, Any], shard_bytes: int = SHARD_BYTES) -> None:
    """Write a LLaVA of random bfloat16 weights, without its tower; memory holds a shard at a time.

    Args:
        folder: made if it is not there; shards that are there stay.
        config: config.json.
        shard_bytes: largest size of a file.

    Raises:
        InputError: the folder holds a model of another config, or the disk is too small.
    """
    config_file = folder / "config.json"
    if config_file.exists() and read_json(config_file) != dict(config):
        raise InputError(f"{folder} holds a model of another size: name another folder, or the --layers of that one")
    if (folder / INDEX_FILE).exists():
        return
    shapes = list_shapes(config)
    shards = list(split_shards(shapes, shard_bytes))
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    missing = [(file, names) for file, names in zip(files, shards, strict=True) if not (folder / file).exists()]
    needed = SIZE * sum(torch.Size(shapes[name]).numel() for _, names in missing for name in names)
    make_folder(folder)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{folder}: the weights take {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there")
    write_json(config_file, dict(config))
    side_by_side.copy_tokenizer(folder)
    with tqdm(total=needed, unit="B", unit_scale=True, desc=f"weights in {folder}") as bar:
        for file, names in missing:
            weights = {name: draw(name, shapes[name]) for name in names}
            with atomic_write(folder / file) as partial:
                save_file(weights, partial, metadata={"format": "pt"})
            bar.update(sum(SIZE * weight.numel() for weight in weights.values()))
    tidy_checkpoint(folder)
    places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    size = SIZE * sum(torch.Size(shape).numel() for shape in shapes.values())
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": places})  # last: all are there


def write_tower(folder: Path, tower_config: Mapping[str, Any]) -> None:
    """Write a CLIP of random float32 weights, if it is not there."""
    if folder.exists():
        return
    small = side_by_side.TINY_MODEL | {"mm_hidden_size": tower_config["vision_config"]["hidden_size"]}
    model, image_processor = build_random_model(small, tower_config, device=torch.device("cpu"), dtype=torch.float32)
    with atomic_folder(folder) as partial:
        side_by_side.write_clip(model, image_processor, tower_config, partial)


# ------------------------------------------------------------------------------------------------------ the training
def check_memory(config: Mapping[str, Any], tower_config: Mapping[str, Any], rank: int) -> None:
    """Refuse what does not fit: weights, the tower, and adapters with their gradients and Adam's states.

    Raises:
        InputError: with the numbers.
    """
    shape = read_shape(config, tower_config, origin="the published configs")
    adapters = rank * sum(sum(one) for name, one in list_shapes(config).items() if ".layers." in name and len(one) == 2)
    needed = sum(weight_bytes(shape, Precision()).values()) + ADAM_BYTES * adapters + ROOM_BYTES
    free = available_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise InputError(
            f"training takes about {needed / 2**30:.1f} GiB of memory, but {free / 2**30:.1f} GiB are free: take fewer "
            "--layers (with another folder), or a smaller --lora-rank"
        )


def write_records(folder: Path, num_records: int) -> Path:
    """Draw images of shapes with some turns of questions about each; returns the file of training records."""
    questions = side_by_side.draw_questions(folder / "images", num_records, TURNS)
    records = []
    for first in range(0, len(questions), TURNS):
        turns = []
        for question in questions[first : first + TURNS]:
            mark = "" if turns else "<image>\n"
            turns += [{"from": "human", "value": mark + question.prompt}, {"from": "gpt", "value": "yes"}]
        image = questions[first].images[0].name
        records.append({"id": image, "image": image, "conversations": turns})
    return write_json(folder / "records.json", records)


def train(weights: Path, folder: Path, reduction: str, steps: int, rank: int) -> tuple[list[float], int]:
    """Train a LoRA by the repository's command.

    Args:
        weights: the base model.
        folder: with the records and images; gets the adapter, in a folder named after the reduction.
        reduction: spec of the token reduction, or none.
        steps: measured steps; one more comes before.
        rank: of the adapters.

    Returns:
        (seconds of each step, the process's largest resident size in bytes).

    Raises:
        InputError: the training failed; names its last line.
    """
    flags = {
        "model_name_or_path": weights, "data_path": folder / "records.json", "image_folder": folder / "images",
        "output_dir": folder / reduction, "mm_vision_token_reduce_func": reduction, "image_aspect_ratio": "pad",
        "lora_enable": True, "lora_r": rank, "lora_alpha": 2 * rank, "learning_rate": 2e-4, "mm_projector_lr": 2e-5,
        "bf16": True, "gradient_checkpointing": True, "per_device_train_batch_size": 1, "max_steps": steps + 1,
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "dataloader_num_workers": 0,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "llava.train.train", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    moments, last = [], ""
    with process, tqdm(total=steps + 1, unit="step", desc=reduction) as bar:
        for line in process.stdout:
            last = line.strip() or last
            if STEP_ROW.match(line):  # the trainer writes one when a step has ended
                moments.append(time.perf_counter())
                bar.update()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise InputError(f"the training with {reduction} ended with code {process.returncode}: {last}")
    return [after - before for before, after in itertools.pairwise(moments)], usage.ru_maxrss * 1024


def ask(weights: Path, folder: Path, adapter: Path) -> str:
    """Answer a question by the adapter on its base model, in a process of its own.

    Returns:
        The answer, mostly empty, as few of the ids have a text; and how many visual tokens were read for it.

    Raises:
        InputError: there is no answer; names the last line.
    """
    image = next((folder / "images").iterdir())
    done = subprocess.run(
        [
            sys.executable, "-m", "llava.eval.run_llava", "--model-path", str(adapter), "--model-base", str(weights),
            "--image-file", str(image), "--query", "What is red?", "--dtype", "bfloat16", "--max_new_tokens", "8",
        ],
        capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode != 0:
        raise InputError(f"the adapter does not answer: {last}")
    return f"{json.dumps(done.stdout.strip())}; {last}"


def main() -> None:
    args = make_parser().parse_args()
    for name in ("layers", "steps", "lora_rank"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a number from 1 on")
    config = CONFIG | {"num_hidden_layers": args.layers, "model_type": "llava_llama"}
    config |= {"architectures": ["LlavaLlamaForCausalLM"], "dtype": "bfloat16"}
    check_memory(config, side_by_side.LARGE_TOWER, args.lora_rank)
    write_weights(args.weights, config)
    write_tower(args.weights / config["mm_vision_tower"], side_by_side.LARGE_TOWER)
    figures: dict[str, Any] = {"layers": args.layers, "lora_rank": args.lora_rank, "seconds": {}, "peak_bytes": {}}
    with tempfile.TemporaryDirectory(dir=args.weights, prefix=".run.") as name:
        folder = Path(name)
        write_records(folder, args.steps + 1)
        for reduction in (NONE, TRIM):
            seconds, peak = train(args.weights, folder, reduction, args.steps, args.lora_rank)
            figures["seconds"][reduction], figures["peak_bytes"][reduction] = seconds, peak
            average = sum(seconds) / len(seconds)
            print(f"{reduction}: {average:.1f} s a step ({len(seconds)} steps), peak {peak / 2**30:.1f} GiB")
        side_by_side.tell_ratio("a step, without reduction over with", *figures["seconds"].values())
        print(f"saved, loaded on its base, answered: {ask(args.weights, folder, folder / TRIM)}")
    side_by_side.write_figures(figures, args.json)


if __name__ == "__main__":
    run_command(main)
