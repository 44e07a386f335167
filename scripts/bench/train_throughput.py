"""Samples per second of training: each way to speed it up alone, and all together, in turns in one run.

A pass reads the same records for every way, from image files to the optimizer's step, with a learning rate of 0, so
that losses can be compared as well. The cache of features is warm, as in the second epoch. Beside the time a pass takes
stands the processor time of the training process: what its workers take, or other programs, is not in it.

    python -m scripts.bench.train_throughput                       the pocket model
    python -m scripts.bench.train_throughput --model LLM           a language model with the pocket's tower, for example
                                                                   SmolLM2 (`python tests/train/smollm2.py LLM`)
    python -m scripts.bench.train_throughput --model random --batch 1 --passes 2   the mid-size model, random weights
"""
# ruff: noqa: T201

import argparse
from dataclasses import dataclass

from scripts.bench import side_by_side

POCKET = "pocket"
RANDOM = "random"


@dataclass(frozen=True)
class Way:
    """How a pass goes; the default is the plain way. What is new gets a field here, a line in `WAYS`, a use below.

    Attributes:
        only_loss: the output head reads labelled positions alone.
        reads_queries: the loader makes ids of the queries for the text tower.
        has_cache: features come from `--feature_cache`.
        num_workers: of the loader; 0: the main process reads.
        tower_dtype: of the frozen towers, by its name.
    """

    only_loss: bool = False
    reads_queries: bool = False
    has_cache: bool = False
    num_workers: int = 0
    tower_dtype: str = "float32"


PLAIN = "plain"
TOGETHER = "together"
WAYS = {
    PLAIN: Way(),
    "loss of labels alone": Way(only_loss=True),
    "queries read by the loader": Way(reads_queries=True),
    "feature cache": Way(has_cache=True),
    "one worker": Way(num_workers=1),
    "towers in bfloat16": Way(tower_dtype="bfloat16"),
    # Of those above, what changes no arithmetic but the rounding of cached features.
    TOGETHER: Way(only_loss=True, reads_queries=True, has_cache=True, num_workers=1),
}


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = side_by_side.make_parser(__doc__)
    side_by_side.add_machine_options(parser)
    parser.add_argument("--model", default=POCKET, help=f"{POCKET}, {RANDOM}, or a language model (default: {POCKET})")
    parser.add_argument("--reduce", default="TRIM:-1")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--passes", type=int, default=8, metavar="N", help="batches of a pass (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from llava.efficiency.timing import time_in_turns
from llava.errors import run_command
from llava.model.feature_files import FeatureFiles
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.token_reduction import TEXT
from llava.train.arguments import parse_arguments
from llava.train.collator import Batch, Collator
from llava.train.dataset import ConversationDataset, ImageFormat, TextFormat
from llava.train.feature_cache import FeatureCache
from llava.train.model_setup import (
    add_vision,
    choose_trainable,
    complete_arguments,
    load_language_model,
    load_training_tokenizer,
    read_config,
)
from llava.train.records import Record, read_records
from llava.train.targets import choose_template, settle_version
from playground.shapes.generate import write_train

TOWER = "playground/shapes/checkpoints/shapes-clip"
DATA_SEED = 20260102
MAX_LENGTH = 2048


class Training:
    """A model, its data, and passes over them in different ways."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, records: list[Record], folder: Path, batch: int):
        """Prepare a model for steps that change nothing."""
        model.train()
        self.model, self.tower = model, model.get_vision_tower()
        self.tower.freeze()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
        self.cache = FeatureCache(FeatureFiles(folder / "cache", "bench", model.needs), self.tower)
        self.records, self.tokenizer, self.folder, self.batch = records, tokenizer, folder, batch
        self.losses: dict[Way, list[float]] = {}
        self.processor_seconds: dict[Way, list[float]] = {}
        self._loaders: dict[Way, DataLoader] = {}

    def run(self, way: Way) -> None:
        """Train on all records once."""
        losses, start = [], time.process_time()
        with use_dtype(self.tower, getattr(torch, way.tower_dtype)):
            for batch in self._loader(way):
                loss = self.model(**self._prepare(batch), only_loss=way.only_loss).loss
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                losses.append(loss.item())
        self.cache.flush()
        self.losses[way] = losses
        self.processor_seconds.setdefault(way, []).append(time.process_time() - start)

    def _loader(self, way: Way) -> DataLoader:
        if way not in self._loaders:
            template = choose_template(settle_version("auto", self.tokenizer), self.tokenizer)
            samples = ConversationDataset(
                self.records,
                self.tokenizer,
                TextFormat(template),
                ImageFormat(self.folder / "images", self.tower.image_processor, "pad"),
                feature_files=self.cache.files if way.has_cache else None,
                read_query=self.tower.text_reader if way.reads_queries and TEXT in self.model.needs else None,
            )
            self._loaders[way] = DataLoader(
                samples,
                batch_size=self.batch,
                collate_fn=Collator(self.tokenizer.pad_token_id, MAX_LENGTH),
                num_workers=way.num_workers,
                persistent_workers=way.num_workers > 0,
            )
        return self._loaders[way]

    def _prepare(self, batch: Batch) -> dict[str, Any]:
        keys = batch.pop("image_keys", None)
        if keys is None:
            return dict(batch)
        return {**batch, "images": self.cache.complete(batch["images"], keys, batch["image_sizes"])}


@contextlib.contextmanager
def use_dtype(tower: VisionTower, dtype: torch.dtype) -> Iterator[None]:
    """Let the towers run in a dtype inside the block; weights that were float32 are so again behind it."""
    if dtype is torch.float32:
        yield
        return
    kept = {name: value.clone() for name, value in tower.state_dict().items()}
    tower.to(dtype)
    try:
        yield
    finally:
        tower.to(torch.float32)
        tower.load_state_dict(kept)


def load(args: argparse.Namespace) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the model that the options name as training does, and its tokenizer."""
    is_llava = args.model in (POCKET, RANDOM)
    start = str(side_by_side.CHECKPOINT) if is_llava else args.model
    flags = ["--model_name_or_path", start, "--data_path", "unused", "--output_dir", "unused"]
    flags += ["--mm_vision_token_reduce_func", args.reduce, "--version", "auto", "--image_aspect_ratio", "pad"]
    flags += ["--report_to", "none"] + ([] if is_llava else ["--vision_tower", TOWER])
    model_args, data_args, training_args = parse_arguments(flags)
    config = read_config(model_args)
    model_args, data_args = complete_arguments(model_args, data_args, config)
    tokenizer = load_training_tokenizer(model_args, training_args)
    if args.model == RANDOM:
        model, _ = side_by_side.build_model(args)
        model.set_token_reduction(args.reduce)
        return model, tokenizer
    model = load_language_model(model_args, training_args, config)
    add_vision(model, tokenizer, model_args, data_args, training_args)
    choose_trainable(model, model_args)
    return model, tokenizer


def main() -> None:
    args = make_parser().parse_args()
    chosen = {name: WAYS[name] for name in dict.fromkeys((PLAIN, *args.ways))}
    with tempfile.TemporaryDirectory() as place:
        folder, count = Path(place), args.batch * args.passes
        with side_by_side.hide_progress():
            write_train(folder, count, 1, DATA_SEED)
            model, tokenizer = load(args)
        records = read_records(folder / "finetune.json")[:count]
        training = Training(model, tokenizer, records, folder, args.batch)
        steps = {name: lambda way=way: training.run(way) for name, way in chosen.items()}
        # The round that is not counted fills the cache and starts the workers.
        seconds = time_in_turns(steps, repeats=args.rounds)
        print(f"\n{args.model}: {len(records)} samples a pass, batch {args.batch}, {args.reduce}")
        side_by_side.tell_times(seconds, dict.fromkeys(seconds, len(records)))
        # Without the round that is not counted.
        processor = {name: training.processor_seconds[way][1:] for name, way in chosen.items()}
        print("processor time of the training process:")
        side_by_side.tell_times(processor)
        plain = training.losses[chosen[PLAIN]]
        figures: dict[str, Any] = {}
        for name, way in chosen.items():
            furthest = max(abs(loss - other) for loss, other in zip(training.losses[way], plain, strict=True))
            figures[name] = {"seconds": seconds[name], "processor_seconds": processor[name], "furthest_loss": furthest}
            if name != PLAIN:
                for title, times in (("time", seconds), ("processor time", processor)):
                    ratio = side_by_side.tell_ratio(f"{name} over {PLAIN}, {title}", times[PLAIN], times[name])
                    figures[name][f"{title} ratio"] = ratio
                print(f"  losses differ by at most {furthest:.1e}")
        side_by_side.write_figures(figures, args.json)


if __name__ == "__main__":
    run_command(main)
