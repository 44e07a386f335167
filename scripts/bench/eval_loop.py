"""Questions per second: the evaluation runner against a plain loop over the same model, with the same answers.

The plain loop works like LLaVA's scripts: batch one; for every question it decodes the image again, runs every layer of
the vision tower, and embeds the query.

    python -m scripts.bench.eval_loop                                   POPE style, 18 questions per image
    python -m scripts.bench.eval_loop --questions-per-image 1 --images 90   VizWiz style
"""
# ruff: noqa: T201

import argparse
import copy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.cli import positive_or_auto
from scripts.bench import side_by_side


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = side_by_side.make_parser(__doc__)
    parser.add_argument("--model-path", default=str(side_by_side.CHECKPOINT))
    parser.add_argument("--reduce", default=None, help="token reduction (default: the checkpoint's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--questions-per-image", type=int, default=18)
    parser.add_argument("--batch-size", type=positive_or_auto, help="default: auto")
    parser.add_argument("--naive-images", type=int, help="images for the plain loop, to save time (default: all)")
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.efficiency.timing import Spread, ratio_by_round, time_in_turns
from llava.errors import run_command
from llava.eval.benchmark import LOADER_MAX_NEW_TOKENS, Question
from llava.eval.predict import Settings, answer_questions
from llava.image import load_image
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.prompt import DEFAULT_CONV_MODE, wrap_prompt
from llava.sampling import Sampling
from playground.shapes.sentence import UNANSWERABLE_HINT


class NaiveLoop:
    """One question at a time: nothing is cached, and every layer of the vision tower runs."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, max_new_tokens: int):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.max_new_tokens = max_new_tokens

    @contextmanager
    def _every_layer(self) -> Iterator[None]:
        """Let the vision tower also run the layers behind the selected one, which it has not even loaded.

        Nothing reads what these give: copies of another layer take the same time.
        """
        tower = self.model.get_vision_tower()
        num_loaded = len(tower.layers)
        tower.layers.extend(copy.deepcopy(tower.layers[-1]) for _ in range(tower.num_layers - num_loaded))
        tower.num_layers_to_run = lambda needs: tower.num_layers
        try:
            yield
        finally:
            del tower.layers[num_loaded:]
            del tower.num_layers_to_run

    @torch.inference_mode()
    def ask(self, questions: Sequence[Question]) -> dict[int, str]:
        """Answer questions one by one; returns the texts by question id."""
        with self._every_layer():
            return {question.id: self._ask(question) for question in questions}

    def _ask(self, question: Question) -> str:
        prompt = wrap_prompt(question.prompt, len(question.images), DEFAULT_CONV_MODE)
        input_ids = tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        images = [load_image(path) for path in question.images]
        output_ids = self.model.generate(
            input_ids[None],
            images=process_images(images, self.image_processor, self.model.config),
            texts=[question.query],
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            use_cache=True,
        )
        return self.tokenizer.batch_decode(output_ids, skip_special_tokens=True)[0].strip()


@dataclass(frozen=True)
class Comparison:
    """What both loops took and answered.

    Attributes:
        seconds: of each round, by loop.
        counts: questions that each loop was asked.
        num_same: questions that both answered alike.
        num_distinct: different answers of the plain loop.
    """

    seconds: dict[str, list[float]]
    counts: dict[str, int]
    num_same: int
    num_distinct: int

    def per_second(self) -> dict[str, Spread]:
        """Questions per second, by loop."""
        return {
            name: Spread.of([self.counts[name] / value for value in values]) for name, values in self.seconds.items()
        }

    def ratio(self) -> Spread:
        """Questions per second of the runner over those of the plain loop."""
        each = {name: [value / self.counts[name] for value in values] for name, values in self.seconds.items()}
        return ratio_by_round(each["naive"], each["runner"])


def compare(
    model: Any,
    tokenizer: Any,
    image_processor: Any,
    questions: Sequence[Question],
    few: Sequence[Question],
    *,
    rounds: int,
    batch_size: int | None = None,
    max_new_tokens: int = LOADER_MAX_NEW_TOKENS,
) -> Comparison:
    """Ask all questions with the runner, and a few of them with the plain loop, in turns."""
    settings = Settings(model_id="bench", batch_size=batch_size, sampling=Sampling(max_new_tokens=max_new_tokens))
    naive, answers = NaiveLoop(model, tokenizer, image_processor, max_new_tokens), {}

    def run_naive() -> None:
        answers["naive"] = naive.ask(few)

    def run_runner() -> None:
        sink = side_by_side.MemorySink()
        with side_by_side.hide_progress():
            answer_questions(model, tokenizer, image_processor, questions, sink, settings)
        answers["runner"] = {key[0]: row["text"] for key, row in sink.done.items()}

    seconds = time_in_turns({"naive": run_naive, "runner": run_runner}, repeats=rounds, device=model.device)
    same = sum(answers["runner"].get(question.id) == answers["naive"][question.id] for question in few)
    counts = {"naive": len(few), "runner": len(questions)}
    return Comparison(seconds, counts, same, len(set(answers["naive"].values())))


def main() -> None:
    args = make_parser().parse_args()
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path, device=args.device, dtype=args.dtype, reduce=args.reduce
    )
    hint = UNANSWERABLE_HINT if args.questions_per_image == 1 else ""
    with tempfile.TemporaryDirectory() as folder:
        questions = side_by_side.draw_questions(Path(folder), args.images, args.questions_per_image, hint)
        few = questions[: (args.naive_images or args.images) * args.questions_per_image]
        found = compare(
            model, tokenizer, image_processor, questions, few, rounds=args.rounds, batch_size=args.batch_size
        )
    report(args, found)


def report(args: Any, found: Comparison) -> None:
    """Print and write the figures; exit with 1 if the answers differ in float32."""
    print(f"{args.questions_per_image} question(s) per image, {args.images} images, batch {args.batch_size or 'auto'}")
    side_by_side.tell_times(found.seconds, found.counts)
    ratio, asked = found.ratio(), found.counts["naive"]
    print(f"runner over naive, questions per second: {ratio.format(1, 3)} (median [quartiles] of {args.rounds} rounds)")
    print(f"same answers: {found.num_same} of {asked}; distinct answers: {found.num_distinct}")
    side_by_side.write_figures(
        {"options": {key: str(value) for key, value in vars(args).items()}}
        | {"seconds": found.seconds, "questions": found.counts}
        | {"ratio": ratio, "same_answers": [found.num_same, asked]},
        args.json,
    )
    if args.dtype == "float32" and found.num_same < asked:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
