"""Questions per second: the evaluation runner against a plain loop over the same model, with the same answers.

The plain loop works like LLaVA's scripts: batch one; for every question it decodes the image again, runs every layer of
the vision tower, and embeds the query.

    python -m scripts.bench.eval_loop                                   POPE style, 18 questions per image
    python -m scripts.bench.eval_loop --questions-per-image 1 --images 90   VizWiz style
"""
# ruff: noqa: T201

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionModelWithProjection

from llava.cli import positive_or_auto
from llava.constants import IMAGE_TOKEN_INDEX
from llava.efficiency.timing import time_in_turns
from llava.errors import run_command
from llava.eval.benchmark import LOADER_MAX_NEW_TOKENS, Question
from llava.eval.predict import Settings, answer_questions
from llava.image import load_image
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.loading import load_quietly
from llava.prompt import DEFAULT_CONV_MODE, wrap_prompt
from playground.shapes.sentence import UNANSWERABLE_HINT
from scripts.bench import side_by_side


class NaiveLoop:
    """One question at a time: nothing is cached, and every layer of the vision tower runs."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any):
        """Load the vision tower a second time, with the layers that the model leaves out."""
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        tower = model.get_vision_tower()
        whole, _ = load_quietly(CLIPVisionModelWithProjection, tower.name, what="vision tower", dtype=tower.dtype)
        self.whole_tower = whole.to(tower.device).vision_model
        self._selected: torch.Tensor | None = None
        layers_run = len(tower.vision_tower.vision_model.encoder.layers)
        self.whole_tower.encoder.layers[layers_run - 1].register_forward_hook(self._note)

    def _note(self, layer: Any, inputs: Any, output: Any) -> None:
        self._selected = output[0] if isinstance(output, tuple) else output

    def _hidden_state(self, pixels: torch.Tensor) -> torch.Tensor:
        self.whole_tower(pixel_values=pixels)
        return self._selected

    @contextmanager
    def _every_layer(self) -> Iterator[None]:
        tower = self.model.get_vision_tower()
        tower.hidden_state = self._hidden_state
        try:
            yield
        finally:
            del tower.hidden_state

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
            max_new_tokens=LOADER_MAX_NEW_TOKENS,
            use_cache=True,
        )
        return self.tokenizer.batch_decode(output_ids, skip_special_tokens=True)[0].strip()


def main() -> None:
    parser = side_by_side.make_parser(__doc__)
    parser.add_argument("--model-path", default=str(side_by_side.CHECKPOINT))
    parser.add_argument("--reduce", default=None, help="token reduction (default: the checkpoint's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--questions-per-image", type=int, default=18)
    parser.add_argument("--batch-size", type=positive_or_auto, help="default: auto")
    parser.add_argument("--naive-images", type=int, help="images for the plain loop, to save time (default: all)")
    args = parser.parse_args()
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path, device=args.device, dtype=args.dtype, reduce=args.reduce
    )
    hint = UNANSWERABLE_HINT if args.questions_per_image == 1 else ""
    settings = Settings(model_id="bench", batch_size=args.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        questions = side_by_side.draw_questions(Path(folder), args.images, args.questions_per_image, hint)
        few = questions[: (args.naive_images or args.images) * args.questions_per_image]
        naive, answers = NaiveLoop(model, tokenizer, image_processor), {}

        def run_naive() -> None:
            answers["naive"] = naive.ask(few)

        def run_runner() -> None:
            sink = side_by_side.MemorySink()
            with side_by_side.hide_progress():
                answer_questions(model, tokenizer, image_processor, questions, sink, settings)
            answers["runner"] = {key[0]: row["text"] for key, row in sink.done.items()}

        seconds = time_in_turns(
            {"naive": run_naive, "runner": run_runner}, repeats=args.rounds, device=torch.device(args.device)
        )
    report(args, questions, few, seconds, answers)


def report(args: Any, questions: list, few: list, seconds: dict[str, list[float]], answers: dict[str, dict]) -> None:
    """Print and write the figures; exit with 1 if the answers differ in float32."""
    counts = {"naive": len(few), "runner": len(questions)}
    same = sum(answers["runner"].get(question.id) == answers["naive"][question.id] for question in few)
    print(f"{args.questions_per_image} question(s) per image, {args.images} images, batch {args.batch_size or 'auto'}")
    side_by_side.tell_times(seconds, counts)
    each = {name: [value / counts[name] for value in values] for name, values in seconds.items()}
    ratio = side_by_side.tell_ratio("runner over naive, questions per second", each["naive"], each["runner"])
    print(f"same answers: {same} of {len(few)}; distinct answers: {len(set(answers['naive'].values()))}")
    side_by_side.write_figures(
        {"options": {key: str(value) for key, value in vars(args).items()}, "seconds": seconds, "questions": counts}
        | {"ratio": ratio, "same_answers": [same, len(few)]},
        args.json,
    )
    if args.dtype == "float32" and same < len(few):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
