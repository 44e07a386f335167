"""What the command-line faces share: their common options, and loading the model and the pictures they name."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import transformers
from PIL import Image

from llava.conversation import conversation_name_for
from llava.image import load_image
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model runs, and how."""
    parser.add_argument("--model-path", required=True, metavar="CKPT", help="checkpoint folder or hub name")
    parser.add_argument(
        "--model-base", default=None, metavar="CKPT", help="base model of a LoRA or projector checkpoint"
    )
    parser.add_argument(
        "--reduce",
        default=None,
        metavar="SPEC",
        help='token reduction, such as "TRIM:-1", "TRIM:0.25" or "none"; default: what the checkpoint says',
    )
    parser.add_argument(
        "--device", default=None, help="cpu, or an accelerator; default: the accelerator if there is one"
    )
    parser.add_argument("--dtype", default=None, metavar="NAME", help="float32, float16 or bfloat16")
    parser.add_argument(
        "--tower-dtype", default=None, metavar="NAME", help="of the vision and text towers; default: float32"
    )
    parser.add_argument(
        "--attn-implementation",
        default=None,
        metavar="NAME",
        help="attention of the language model: sdpa, eager, flash_attention_2, ...; default: transformers' choice",
    )


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which pictures are looked at."""
    parser.add_argument(
        "--image-file",
        action="append",
        required=True,
        metavar="FILE",
        help="picture file or http(s) address; several: repeat the option, or join them by --sep",
    )
    parser.add_argument("--sep", default=",", help="what joins several pictures in one --image-file")


def list_image_sources(image_files: str | list[str], sep: str) -> list[str]:
    """List the single pictures named by one or several option values.

    A value that is itself the name of a file is not taken apart.
    """
    values = [image_files] if isinstance(image_files, str) else image_files
    sources = []
    for value in values:
        sources += [value] if not sep or Path(value).is_file() else value.split(sep)
    return sources


def load_images(image_files: str | list[str], sep: str = ",") -> list[Image.Image]:
    """Read the pictures of a face, turned upright.

    Raises:
        InputError: one of them can't be read.
    """
    return [load_image(source, upright=True) for source in list_image_sources(image_files, sep)]


def load_model(args: Any) -> tuple[Any, Any, Any]:
    """Load what the options name.

    Args:
        args: has `model_path`; may have `model_base`, `reduce`, `device`, `dtype`, `tower_dtype`,
            `attn_implementation`, `load_8bit`, `load_4bit`.

    Returns:
        (tokenizer, model, image processor).

    Raises:
        InputError: the checkpoint or an option is not usable.
    """
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path,
        getattr(args, "model_base", None),
        get_model_name_from_path(args.model_path),
        load_8bit=getattr(args, "load_8bit", False),
        load_4bit=getattr(args, "load_4bit", False),
        device=getattr(args, "device", None),
        reduce=getattr(args, "reduce", None),
        dtype=getattr(args, "dtype", None),
        tower_dtype=getattr(args, "tower_dtype", None),
        attn_implementation=getattr(args, "attn_implementation", None),
    )
    return tokenizer, model, image_processor


def choose_template(args: Any) -> str:
    """Return the conversation template the options name, or the one that fits the checkpoint's name."""
    given = getattr(args, "conv_mode", None)
    return given or conversation_name_for(get_model_name_from_path(args.model_path))


def prepare_terminal() -> None:
    """Make text of any encoding readable and printable, and keep the libraries' own messages off the dialogue."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    transformers.utils.logging.disable_progress_bar()
    # A hub that can't be reached ends in one line of ours; each retry would add its own.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
