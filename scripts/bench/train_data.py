"""Training data at their real size: start-up, memory of each rank and worker, and whether a new start keeps the order.

Made-up conversations in LLaVA's layout, with as many small image files as half of the records, are written to a
temporary folder (about 1.3 KB a record). Every start and every rank is a process of its own. What the records cost is
the memory of a process that trains on all of them, less that of one that trains on a thousand.

    python -m scripts.bench.train_data --records 665000
"""
# ruff: noqa: T201

import argparse
from pathlib import Path

from scripts.bench import side_by_side


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = side_by_side.make_parser(__doc__, repeats=False)
    parser.add_argument("--records", type=int, default=665_000)
    parser.add_argument("--ranks", type=int, default=2, help="processes that train together (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="loader workers of each (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the data are written (default: the system's temporary one)")
    for name, kind in (("part", str), ("data", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoTokenizer

from llava.errors import InputError, run_command
from llava.train.collator import Collator
from llava.train.dataset import ConversationDataset, ImageFormat, TextFormat
from llava.train.flags import DataArguments, ModelArguments
from llava.train.preflight import inspect_records
from llava.train.sampler import ModalityLengthSampler
from llava.train.store import Records
from llava.train.targets import choose_template
from llava.train.train import load_records
from playground.shapes import sentence

TOWER = Path("playground/shapes/checkpoints/shapes-clip")
FEW = 1000
IMAGE_SHARE = 0.94  # of LLaVA's 665k records
NUM_TEXTS = 2000
LINKS_PER_FILE = 10_000
IMAGES_PER_FOLDER = 1000
BATCH_SIZE, GROUP_SIZE = 16, 128
NUM_BATCHES = 40
MAX_LENGTH = 2048
MEMORY = ("Pss", "Private_Clean", "Private_Dirty")
MEBIBYTE = 1024  # in the kibibytes of /proc


# ------------------------------------------------------------------------------------------------------- made-up data
def write_data(folder: Path, number: int) -> Path:
    """Write records as one JSON list, and their images, and return the list's path."""
    rng = random.Random(0)
    words = " ".join(sentence.ALL_NAMES).split()
    questions = [" ".join(rng.choices(words, k=rng.randint(5, 25))) for _ in range(NUM_TEXTS)]
    answers = [" ".join(rng.choices(words, k=rng.randint(1, 120))) for _ in range(NUM_TEXTS)]
    num_images = max(1, number // 2)
    path = folder / f"{number}.json"
    with path.open("w", encoding="utf-8") as file:
        for index in range(number):
            file.write("," if index else "[")
            file.write(json.dumps(make_record(index, rng, questions, answers, num_images)))
        file.write("]")
    write_images(folder / "images", num_images)
    return path


def make_record(index: int, rng: random.Random, questions: list[str], answers: list[str], num_images: int) -> dict:
    """Make a record of one to eight turns; ids are texts or numbers, as LLaVA's are, and some have no image."""
    turns = []
    for _ in range(rng.choice((1, 1, 2, 4))):
        turns.append({"from": "human", "value": f"{rng.choice(questions)} {rng.random()}"})
        turns.append({"from": "gpt", "value": rng.choice(answers)})
    record = {"id": index if index % 3 else f"made-up-{index}", "conversations": turns}
    if rng.random() < IMAGE_SHARE:
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        record["image"] = name_image(rng.randrange(num_images))
    return record


def name_image(number: int) -> str:
    return f"{number // IMAGES_PER_FOLDER:04d}/{number:09d}.png"


def write_images(folder: Path, number: int) -> None:
    """Write small images; most are further names of the same files."""
    for index in range(number):
        path = folder / name_image(index)
        if index % LINKS_PER_FILE == 0:
            first = path
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (index % 256, 80, 120)).save(path)
            continue
        if index % IMAGES_PER_FOLDER == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.hardlink_to(first)


# ---------------------------------------------------------------------------------------------------------- processes
def open_records(args: argparse.Namespace) -> Records:
    """Do what training does with its data before weights are loaded, except counting tokens."""
    model_args = ModelArguments(model_name_or_path=str(side_by_side.CHECKPOINT), vision_tower=str(TOWER))
    data_args = DataArguments(
        data_path=str(args.data), image_folder=str(args.data.parent / "images"), image_aspect_ratio="pad"
    )  # fmt: skip
    return load_records(model_args, data_args, choose_template("v1"))


def make_sampler(records: Records) -> ModalityLengthSampler:
    return ModalityLengthSampler(records.num_words, records.num_images > 0, GROUP_SIZE, seed=42)


def run_start(args: argparse.Namespace) -> None:
    """Start once, and print seconds of clock and processor, and a digest of half of the second epoch's order."""
    tokenizer = AutoTokenizer.from_pretrained(str(side_by_side.CHECKPOINT))
    clocks = [(time.perf_counter(), time.process_time())]
    records = open_records(args)
    clocks.append((time.perf_counter(), time.process_time()))
    inspect_records(records, tokenizer, TextFormat(choose_template("v1")), MAX_LENGTH, None, None)
    clocks.append((time.perf_counter(), time.process_time()))
    records_seconds, preflight_seconds = (np.subtract(*pair[::-1]).tolist() for pair in pairwise(clocks))
    sampler = make_sampler(records)
    sampler.set_epoch(1)
    rest = np.fromiter(islice(sampler, len(records) // 2, None), np.int64)
    print(json.dumps({
        "records_seconds": records_seconds, "preflight_seconds": preflight_seconds,
        "order": hashlib.sha256(rest.tobytes()).hexdigest(),
        "fingerprint": records.fingerprint(),
    }))  # fmt: skip


def run_rank(args: argparse.Namespace) -> None:
    """Load batches with workers, print the ids of the processes, and wait."""
    tokenizer = AutoTokenizer.from_pretrained(str(side_by_side.CHECKPOINT))
    images = ImageFormat(args.data.parent / "images", AutoImageProcessor.from_pretrained(str(TOWER)), "pad")
    records = open_records(args)
    dataset = ConversationDataset(records, tokenizer, TextFormat(choose_template("v1")), images)
    loader = DataLoader(
        dataset, BATCH_SIZE, sampler=make_sampler(records), num_workers=args.workers,
        collate_fn=Collator(tokenizer.pad_token_id or 0, MAX_LENGTH),
    )  # fmt: skip
    batches = iter(loader)
    for _ in islice(batches, min(NUM_BATCHES, len(loader) - 1)):
        pass
    print(json.dumps([os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]), flush=True)
    sys.stdin.read()


def start_part(part: str, args: argparse.Namespace, data: Path) -> subprocess.Popen:
    words = ["--part", part, "--data", str(data), "--workers", str(args.workers)]
    command = [sys.executable, "-m", "scripts.bench.train_data", *words]
    environment = os.environ | {"LLAVA_CACHE": str(data.parent / "cache")}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def time_start(args: argparse.Namespace, data: Path) -> dict:
    output, _ = start_part("start", args, data).communicate()
    return json.loads(output.splitlines()[-1])


def measure_memory(args: argparse.Namespace, data: Path) -> dict[str, list[dict[str, int]]]:
    """Start the ranks together, and return the memory of each rank and worker in KiB."""
    ranks = [start_part("rank", args, data) for _ in range(args.ranks)]
    try:
        ids = [json.loads(next(line for line in rank.stdout if line.startswith("["))) for rank in ranks]
        return {
            "rank": [read_memory(first) for first, *_ in ids],
            "worker": [read_memory(worker) for _, *workers in ids for worker in workers],
        }
    finally:
        for rank in ranks:
            rank.communicate()


def read_memory(process: int) -> dict[str, int]:
    """Read a process's share of memory, and what is its own, in KiB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    values = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines[1:])}
    return {name: values[name] for name in MEMORY}


def tell_costs(few: dict, all_of_them: dict) -> Iterator[tuple[str, dict[str, float]]]:
    """Print and yield what the records cost a rank and a worker, in MiB."""
    for role, held in all_of_them.items():
        costs = {
            name: (np.mean([one[name] for one in held]) - np.mean([one[name] for one in few[role]])) / MEBIBYTE
            for name in MEMORY
        }
        own = costs["Private_Clean"] + costs["Private_Dirty"]
        print(
            f"memory of the records per {role}: its own {own:.1f} MiB (written to {costs['Private_Dirty']:.1f} MiB), "
            f"share of what is mapped and its own {costs['Pss']:.1f} MiB"
        )
        yield role, costs


def main() -> None:
    args = make_parser().parse_args()
    if args.part:
        return {"start": run_start, "rank": run_rank}[args.part](args)
    if args.records < FEW or args.ranks < 1 or args.workers < 1:
        raise InputError(f"--records from {FEW}, --ranks and --workers from 1 on")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        few, data = write_data(folder, FEW), write_data(folder, args.records)
        print(f"{args.records} records, {data.stat().st_size / 1e6:.0f} MB of JSON, {args.records // 2} image files")
        starts = {label: time_start(args, data) for label in ("first", "second")}
        for label, start in starts.items():
            for part in ("records", "preflight"):
                wall, processor = start[f"{part}_seconds"]
                print(f"{label} start, {part}: {wall:.1f} s ({processor:.1f} s of a processor)")
        is_same = len({(start["order"], start["fingerprint"]) for start in starts.values()}) == 1
        print(f"order of a resumed second epoch: {'the same' if is_same else 'DIFFERENT'}")
        size = sum(file.stat().st_size for file in (folder / "cache").rglob("*"))
        print(f"store: {size / 1e6:.0f} MB on disk, {args.ranks} ranks with {args.workers} workers each")
        memory = {"few": measure_memory(args, few), "all": measure_memory(args, data)}
        costs = dict(tell_costs(memory["few"], memory["all"]))
    figures = {"starts": starts, "same_order": is_same, "store_bytes": size, "memory_kib": memory, "cost_mib": costs}
    side_by_side.write_figures(figures, args.json)
    return None


if __name__ == "__main__":
    run_command(main)
