"""Shared by the benchmark commands: questions on drawn images, models with random weights, and the output of ratios."""
# ruff: noqa: T201

import argparse
import contextlib
import io
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.efficiency.shapes import PUBLISHED_TOWERS
from llava.errors import InputError
from llava.eval.benchmark import Question, Row
from playground.shapes import sentence
from playground.shapes.world import draw_scene

if TYPE_CHECKING:
    from llava.efficiency.timing import Spread
    from llava.model.token_reduction import Need

# Functions import torch: the commands answer --help and mistaken options before that.

CHECKPOINT = Path("playground/shapes/checkpoints/llava-shapes-trim")
PICTURE_SEED = (20260101, 2)  # used nowhere else: no model is trained on these images

# A model that is bound by arithmetic on a small machine: CLIP's ViT-B at 336 pixels with patches of 14 pixels (576
# patches, as in LLaVA-1.5), and a Llama of 0.5 B parameters.
MID_TOWER = PUBLISHED_TOWERS["openai/clip-vit-base-patch16"] | {
    "vision_config": PUBLISHED_TOWERS["openai/clip-vit-base-patch16"]["vision_config"]
    | {"image_size": 336, "patch_size": 14}
}
MID_MODEL = {
    "hidden_size": 1280,
    "intermediate_size": 3456,
    "num_hidden_layers": 22,
    "num_attention_heads": 20,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 768,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "random/clip",
    "image_aspect_ratio": "pad",
}
# A smaller version, to check that a command works.
TINY_TOWER = {
    "projection_dim": 64,
    "vision_config": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"image_size": 336, "patch_size": 14},
    "text_config": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
}
TINY_MODEL = MID_MODEL | {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4} | {
    "num_attention_heads": 4, "mm_hidden_size": 96
}  # fmt: skip
# The vision tower and the projector of LLaVA-1.5-7B, and one small decoder layer: for the way to the language model.
LARGE_TOWER = PUBLISHED_TOWERS["openai/clip-vit-large-patch14-336"]
LARGE_MODEL = MID_MODEL | {"hidden_size": 4096, "intermediate_size": 256, "num_hidden_layers": 1} | {
    "num_attention_heads": 32, "vocab_size": 1000, "mm_hidden_size": 1024
}  # fmt: skip
SIZES = {"mid": (MID_MODEL, MID_TOWER), "tiny": (TINY_MODEL, TINY_TOWER), "large": (LARGE_MODEL, LARGE_TOWER)}


def make_parser(description: str, *, repeats: bool = True) -> argparse.ArgumentParser:
    """Build a parser with the options of all benchmarks; `--rounds` only where measurements are repeated."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repeats:
        parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    return parser


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmarks that build a model with random weights."""
    parser.add_argument("--size", choices=SIZES, default="mid", help="size of the model (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))


def build_model(
    args: argparse.Namespace, size: str | None = None, needs: "Collection[Need]" = frozenset(), **changes: Any
) -> tuple[Any, Any]:
    """Build the model that the options describe; returns model and image processor.

    Args:
        args: parsed options with `size`, `device` and `dtype`.
        size: overrides `args.size`.
        needs: what token reductions that the model will be switched to look at, besides text.
        **changes: entries of the vision tower's config to replace.
    """
    import torch

    from llava.efficiency.random_model import build_random_model

    config, tower = SIZES[size or args.size]
    tower = tower | {"vision_config": tower["vision_config"] | changes}
    dtype = getattr(torch, args.dtype)
    device = torch.device(args.device)
    return build_random_model(config, tower, needs=needs, device=device, dtype=dtype, tower_dtype=dtype)


def write_clip(model: Any, image_processor: Any, tower_config: Mapping[str, Any], folder: Path) -> None:
    """Write a CLIP with random weights of the shape of a model's tower, with its tokenizer and image processor.

    Args:
        model: of `build_random_model`.
        image_processor: of the same.
        tower_config: the CLIP's config, in Hugging Face's keys.
        folder: becomes the CLIP's.
    """
    from transformers import CLIPConfig, CLIPModel

    text_tower, width = model.get_vision_tower().text_tower, tower_config["projection_dim"]
    clip_config = CLIPConfig(
        vision_config=tower_config["vision_config"] | {"projection_dim": width},
        text_config=text_tower.model.config.to_dict(),
        projection_dim=width,
    )
    CLIPModel(clip_config).save_pretrained(folder)
    image_processor.save_pretrained(folder)
    text_tower.tokenizer.save_pretrained(folder)


def copy_tokenizer(folder: Path) -> None:
    """Put the pocket model's tokenizer into a checkpoint's folder; its ids are fewer than any model's here."""
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, folder / name)


def draw_questions(folder: Path, num_images: int, questions_per_image: int, hint: str = "") -> list[Question]:
    """Draw images of shapes, with presence questions about each.

    Args:
        folder: folder for the images.
        num_images: number of images.
        questions_per_image: between 1 and the number of object names.
        hint: text between the question and the short-answer suffix.

    Raises:
        InputError: for more questions than there are object names.
    """
    names = sentence.ALL_NAMES
    if not 1 <= questions_per_image <= len(names):
        raise InputError(f"--questions-per-image {questions_per_image}: must be between 1 and {len(names)}")
    folder.mkdir(parents=True, exist_ok=True)
    questions = []
    for index in range(num_images):
        picture, _ = draw_scene(*PICTURE_SEED, index)
        path = folder / f"{index:06d}.png"
        picture.save(path, compress_level=1)
        for number in range(questions_per_image):
            text = sentence.ask_presence(names[(index + number) % len(names)]) + hint + sentence.SUFFIX
            questions.append(Question(len(questions), prompt=text, query=text, images=(path,)))
    return questions


class MemorySink:
    """Keeps answers in memory: the runner's sink without a file."""

    key_fields = ("question_id",)

    def __init__(self) -> None:
        self.done: dict[tuple, Row | None] = {}

    def claim(self, unit: int) -> bool:
        """Give every unit to the only worker."""
        return True

    def refresh(self) -> None:
        """Do nothing: there is no other worker."""

    def append(self, rows: Sequence[Row]) -> None:
        self.done.update({(row["question_id"],): row for row in rows})


@contextmanager
def hide_progress() -> Iterator[None]:
    """Hide progress bars inside the `with` block."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def tell_times(seconds: Mapping[str, Sequence[float]], units: Mapping[str, int] | None = None) -> None:
    """Print one line per candidate: its time in ms and, with `units`, its rate per second."""
    from llava.efficiency.timing import Spread

    for name, values in seconds.items():
        line = f"{name:<28}{Spread.of(values).format(1e3, 2):>34} ms"
        if units:
            line += f"{Spread.of([units[name] / value for value in values]).format(1, 2):>34} per second"
        print(line)


def tell_ratio(title: str, above: Sequence[float], below: Sequence[float]) -> "Spread":
    """Print and return the ratio of two lists of measurements, computed round by round."""
    from llava.efficiency.timing import ratio_by_round

    ratio = ratio_by_round(above, below)
    print(f"{title}: {ratio.format(1, 3)} (median [quartiles] of {len(above)} rounds)")
    return ratio


def write_figures(figures: Mapping[str, Any], path: Path | None) -> None:
    """Write figures as JSON, with a description of the machine; does nothing if `path` is None."""
    if path is None:
        return
    import torch

    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({**figures, "machine": machine}, indent=2, default=vars) + "\n", encoding="utf-8")
    os.replace(partial, path)
    print(f"written to {path}")
