"""Feed broken input to every door of the package: `python -m tests.fuzz --seconds 600 --seed N`.

Each input is a sound file, checkpoint or command line of the golden data with a few things changed. It must be taken or
be refused by an `InputError` (argparse's own refusals count): a traceback is a failure, and so is a hang of over ten
seconds. Failures are printed with the number that repeats them: `--only N`.
"""

import argparse
import contextlib
import copy
import faulthandler
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from unittest import mock

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = "llava-v1.5-tiny84-TRIM-r025"
TOWER = "openai/clip-vit-tiny-patch14-84"
HANG_SECONDS = 10

# Values that a key may hold by mistake.
ODD_VALUES = (
    *(None, True, False, 0, -1, 1, 2, 7, 10**6, 10**18, -(10**18), 0.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", " ", "null", "none", "PAD", "../x", "/dev/null", "a" * 5000, "\x00", "\x1b[31m", "é\u2028字", "\ud83d"),
    *([], [None], [[]], [1, "a"], {}, {"a": {}}, {"": None}, "TRIM:-1", "TRIM:x", "Random:0.001", ["<image>"]),
)
ODD_BYTES = (
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"[" * 5000,
    b"9" * 5000,
    b'{"a":1,}',
    b"{",
    b"null",
    b"[]",
    b"7",
)


class HangError(BaseException):
    """An input took more than `HANG_SECONDS`; not an Exception, so that nothing swallows it."""


@dataclass
class Report:
    """What a run of the fuzzer found.

    Attributes:
        counts: inputs by target.
        refused: how many of them were refused in one line.
        failures: a text for each input that ended in a traceback, or in none of the allowed ways, or not at all.
    """

    counts: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.counts.values())


# ------------------------------------------------------------------------------------------------------------ mutations
def mutate_json(data: object, rng: random.Random) -> object:
    """Change, drop or add one thing somewhere in JSON data, in place where that is possible; return the data."""
    if rng.random() < 0.03 or not isinstance(data, dict | list) or not data:
        return odd_value(rng)
    key = rng.choice(list(data) if isinstance(data, dict) else range(len(data)))
    if isinstance(data[key], dict | list) and data[key] and rng.random() < 0.6:
        data[key] = mutate_json(data[key], rng)
    elif rng.random() < 0.2:
        del data[key]
    elif isinstance(data, dict) and rng.random() < 0.1:
        data[rng.choice(("", "load_in_4bit", "quantization_config", "auto_map", str(key) + "s"))] = odd_value(rng)
    else:
        data[key] = odd_value(rng)
    return data


def odd_value(rng: random.Random) -> object:
    """Choose a value of its own: a shared list could end up inside itself."""
    return copy.deepcopy(rng.choice(ODD_VALUES))


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut, overwrite, repeat or replace a piece of a file."""
    place = rng.randrange(len(content) + 1)
    kind = rng.randrange(6)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + rng.randbytes(rng.randrange(1, 9)) + content[place + 4 :]
    if kind == 2:
        return content[:place] + content[max(0, place - 40) :]
    if kind == 3:
        return rng.choice(ODD_BYTES)
    if kind == 4:
        return content[:place] + rng.choice(ODD_BYTES) + content[place:]
    return content.decode("utf-8", "replace").encode(rng.choice(("utf-16", "latin-1", "utf-8-sig")), "replace")


def mutate_document(content: bytes, rng: random.Random) -> bytes:
    """Change a JSON document: mostly its data, sometimes its bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(content, rng)
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):  # changed before
        return mutate_bytes(content, rng)
    for _ in range(rng.randrange(1, 4)):
        data = mutate_json(data, rng)
    return json.dumps(data).encode()


def mutate_lines(content: bytes, rng: random.Random) -> bytes:
    """Change one or several lines of a JSON Lines file, or its bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(content, rng)
    lines = content.splitlines(keepends=True)
    for _ in range(rng.randrange(1, 4)):
        number = rng.randrange(len(lines))
        lines[number] = mutate_document(lines[number], rng).strip() + b"\n"
    if rng.random() < 0.2:
        lines.append(rng.choice(lines))
    return b"".join(lines)


# -------------------------------------------------------------------------------------------------------------- targets
@dataclass
class World:
    """Where inputs are made: a folder with a sound checkpoint and the loaded tokenizer of it."""

    folder: Path

    def __post_init__(self) -> None:
        from llava.model.builder import load_tokenizer

        # What is imported late counts as no input's time.
        for module in (*COMMANDS, "llava.eval.predict", "llava.train.arguments", "llava.train.model_setup", "pandas"):
            import_module(module)
        self.checkpoint = self.folder / "checkpoint"
        shutil.copytree(GOLDEN / "checkpoints" / CHECKPOINT, self.checkpoint)
        self.tower = self.folder / "tower"
        shutil.copytree(GOLDEN / "checkpoints" / TOWER, self.tower)
        config = json.loads((self.checkpoint / "config.json").read_text())
        config["mm_vision_tower"] = str(self.tower)
        (self.checkpoint / "config.json").write_text(json.dumps(config))
        self.tokenizer = load_tokenizer(str(self.checkpoint))

    @contextlib.contextmanager
    def changed(
        self, path: Path, change: Callable[[bytes, random.Random], bytes], rng: random.Random
    ) -> Iterator[None]:
        """While inside, a file holds something else."""
        before = path.read_bytes()
        path.write_bytes(change(before, rng))
        try:
            yield
        finally:
            path.write_bytes(before)


def load(world: World) -> None:
    from llava.model.builder import load_pretrained_model

    load_pretrained_model(str(world.checkpoint), device="cpu", dtype="float32")


def fuzz_config(world: World, rng: random.Random) -> None:
    with world.changed(world.checkpoint / "config.json", mutate_document, rng):
        load(world)


def fuzz_checkpoint_files(world: World, rng: random.Random) -> None:
    names = ["checkpoint/generation_config.json", "checkpoint/tokenizer_config.json", "tower/preprocessor_config.json"]
    names += ["tower/config.json", "checkpoint/special_tokens_map.json", "tower/tokenizer.json"]
    path = world.folder / rng.choice(names)
    change = mutate_bytes if path.stat().st_size > 100_000 else mutate_document
    with world.changed(path, change, rng):
        load(world)


def fuzz_weight_files(world: World, rng: random.Random) -> None:
    names = [
        "checkpoint/model.safetensors",
        "checkpoint/tokenizer.model",
        "tower/pytorch_model.bin",
        "tower/merges.txt",
    ]
    with world.changed(world.folder / rng.choice(names), mutate_bytes, rng):
        load(world)


ORACLES = {
    "vqav2": ("vqav2", ("llava_vqav2_mscoco_val2014.jsonl", "v2_mscoco_val2014_annotations.json")),
    "gqa": ("gqa", ("llava_gqa_testdev_balanced.jsonl", "testdev_balanced_questions.json")),
    "vizwiz": ("vizwiz", ("llava_val.jsonl", "val.json")),
    "sqa": ("scienceqa", ("llava_test_CQM-A.json", "problems.json", "pid_splits.json")),
    "textvqa": ("textvqa", ("llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json")),
    "pope": ("pope", ("llava_pope_test.jsonl", "coco/coco_pope_random.json")),
    "mme": ("mme", ("llava_mme.jsonl",)),
    "mmbench": ("mmbench", ("mmbench_dev_20230712.tsv",)),
    "seed": ("seed_bench", ("llava-seed-bench.jsonl", "SEED-Bench.json")),
    "llavabench": ("llava_bench_in_the_wild", ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")),
    "mmvet": ("mm_vet", ("llava-mm-vet.jsonl", "mm-vet.json")),
}


def score(world: World, name: str, root: Path, rng: random.Random) -> None:
    judge = (
        ["--judge", "exact"] if name in ("llavabench", "mmvet") or (name == "mmbench" and rng.random() < 0.3) else []
    )
    partial = ["--allow-partial"] if rng.random() < 0.7 else []
    command(
        "llava.eval.__main__",
        *("score", name, "--root", root, "--answers", root / "answers.jsonl", "--json", world.folder / "scores.json"),
        *(*judge, *partial),
    )


def fuzz_benchmark_files(world: World, rng: random.Random) -> None:
    name = rng.choice(list(ORACLES))
    folder, files = ORACLES[name]
    root = world.folder / "oracle" / folder
    if not root.is_dir():
        shutil.copytree(GOLDEN / "oracle" / folder, root)
    file = root / rng.choice(files)
    change = mutate_lines if file.suffix == ".jsonl" or "coco" in str(file) else mutate_document
    with world.changed(file, mutate_bytes if file.suffix == ".tsv" else change, rng):
        score(world, name, root, rng)


def fuzz_answers(world: World, rng: random.Random) -> None:
    name = rng.choice(list(ORACLES))
    root = world.folder / "oracle" / ORACLES[name][0]
    if not root.is_dir():
        shutil.copytree(GOLDEN / "oracle" / ORACLES[name][0], root)
    with world.changed(root / "answers.jsonl", mutate_lines, rng):
        score(world, name, root, rng)


def make_record(identity: object, images: object, *turns: str) -> dict:
    speakers = ("human", "gpt") * len(turns)
    conversation = [{"from": speaker, "value": turn} for speaker, turn in zip(speakers, turns, strict=False)]
    return {"id": identity, "conversations": conversation, **({} if images is None else {"image": images})}


RECORDS = [
    make_record("a", "noise.png", "<image>\nWhat?", "A."),
    make_record("b", None, "Why?", "So.", "Really?", "Yes."),
    make_record(3, ["noise.png", "sign.png"], "<image> or <image>?", "B."),
]


def fuzz_training_records(world: World, rng: random.Random) -> None:
    from llava.conversation import conv_templates
    from llava.train.dataset import ConversationDataset, TextFormat
    from llava.train.records import check_image_files, read_records

    lines = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)
    content = mutate_lines(lines, rng) if rng.random() < 0.5 else mutate_document(json.dumps(RECORDS).encode(), rng)
    path = world.folder / rng.choice(("data.json", "data.jsonl"))
    path.write_bytes(content)
    skip = rng.random() < 0.5
    records = check_image_files(read_records(path, skip), GOLDEN / "data" / "images", skip)
    template = conv_templates[rng.choice(("v1", "plain", "llava_llama_2"))]
    dataset = ConversationDataset([each for each in records if not each.images], world.tokenizer, TextFormat(template))
    for index in range(len(dataset)):
        dataset[index]


def fuzz_images(world: World, rng: random.Random) -> None:
    from llava.image import load_image

    source = rng.choice(sorted((GOLDEN / "data" / "images_extra").glob("*.png")))
    path = world.folder / "image.png"
    path.write_bytes(mutate_bytes(source.read_bytes(), rng))
    load_image(path, upright=rng.random() < 0.5)


WORDS = (
    *("--model-path", "--reduce", "TRIM:-1", "TRIM:9", "none", "--dtype", "float32", "--device", "cpu", "cuda:9"),
    *("--answers", "--root", "--limit", "0", "-1", "nan", "inf", "1e9", "--batch-size", "auto", "--temperature", "="),
    *("--image-file", "--query", "", "--conv-mode", "vicuna_v1", "--out", "/dev/null", "/", "pope", "score", "answer"),
    *("report", "wrong", "export", "list", "run", "--json", "--help", "--no-such", "\x00", "é", "\ud83d", "a" * 3000),
    *("--model_name_or_path", "--data_path", "--output_dir", "--lora_r", "--src", "--dst", "--vision-tower", "--"),
)  # fmt: skip
COMMANDS = (
    *("llava.eval.__main__", "llava.eval.run_llava", "llava.eval.model_vqa_loader", "llava.eval.model_vqa_mmbench"),
    *("llava.eval.model_vqa_science", "llava.eval.eval_pope", "llava.eval.eval_textvqa", "llava.eval.eval_science_qa"),
    *("llava.eval.summarize_gpt_review", "llava.eval.eval_gpt_review_bench", "llava.visualize", "llava.calibrate"),
    *("llava.efficiency.__main__", "llava.model.consolidate", "llava.serve.cli", "llava.train.train"),
)


def fuzz_command_lines(world: World, rng: random.Random) -> None:
    words = [rng.choice((*WORDS, str(world.folder / "nothing"))) for _ in range(rng.randrange(0, 8))]
    command(rng.choice(COMMANDS), *words)


def command(module: str, *arguments: object) -> None:
    """Run a command in this process; its refusals by exit code are taken for what they are."""
    main = import_module(module).main
    with mock.patch("sys.argv", [module, *map(str, arguments)]), mock.patch("sys.stdin", io.StringIO("")):
        main()


def fuzz_specs(world: World, rng: random.Random) -> None:
    from llava.model.token_reduction import REDUCERS, parse_reducer

    pieces = [
        *REDUCERS,
        ":",
        ",",
        "=",
        "-1",
        "0.25",
        "1e400",
        "64",
        "avg",
        "flops",
        "fence",
        "similarity",
        "direct",
        "seed",
        "layer",
        "\x00",
        " ",
    ]
    parse_reducer("".join(rng.choice(pieces) for _ in range(rng.randrange(1, 9))))


# How often each is tried; loading a checkpoint takes a hundred times as long as parsing a spec.
TARGETS: dict[Callable[[World, random.Random], None], int] = {
    fuzz_config: 3,
    fuzz_checkpoint_files: 2,
    fuzz_weight_files: 1,
    fuzz_benchmark_files: 6,
    fuzz_answers: 4,
    fuzz_training_records: 6,
    fuzz_images: 6,
    fuzz_command_lines: 6,
    fuzz_specs: 4,
}


# ------------------------------------------------------------------------------------------------------------- the loop
def stop_hanging(number: int, frame: object) -> None:
    raise HangError


def try_one(world: World, target: Callable[[World, random.Random], None], seed: str) -> str | None:
    """Run one input.

    Returns:
        "taken", "refused", or what went wrong.
    """
    from llava.errors import InputError

    signal.signal(signal.SIGALRM, stop_hanging)
    signal.alarm(HANG_SECONDS)
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            target(world, random.Random(seed))
    except InputError as error:
        if "\n" in str(error).strip() and len(str(error)) > 2000:
            return f"a refusal of {len(str(error))} characters"
        return "refused"
    except SystemExit as end:
        return "refused" if end.code in (0, 2, 3, 4, None) else f"exit code {end.code}"
    except HangError:
        return f"no end after {HANG_SECONDS} seconds"
    except BaseException:
        return traceback.format_exc(limit=-6)
    finally:
        signal.alarm(0)
    return "taken"


def run(seconds: float, seed: int, only: int | None = None, show: Callable[[str], None] = lambda line: None) -> Report:
    """Try inputs until the time is over.

    Args:
        seconds: how long.
        seed: of all inputs; the same seed gives the same ones.
        only: repeat this input alone.
        show: gets a line for each failure.
    """
    report = Report()
    chosen = [target for target, weight in TARGETS.items() for _ in range(weight)]
    number = 0 if only is None else only
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        world = World(Path(folder))
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            target = random.Random(f"{seed} {number}").choice(chosen)
            outcome = try_one(world, target, f"{seed} {number} input")
            name = target.__name__.removeprefix("fuzz_")
            report.counts[name] = report.counts.get(name, 0) + 1
            report.refused += outcome == "refused"
            if outcome not in ("taken", "refused"):
                report.failures.append(f"--seed {seed} --only {number} ({name}): {outcome}")
                show(report.failures[-1])
            if only is not None:
                break
            number += 1
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="repeat the input of this number alone")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    faulthandler.enable()
    report = run(arguments.seconds, arguments.seed, arguments.only, lambda line: print(line, flush=True))
    print(f"{report.total} inputs, {report.refused} refused, {len(report.failures)} failures; {report.counts}")
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
