"""The command line that all commands share: types of values, options of the model and of images, loading both.

A command parses and checks its arguments before anything heavy is imported: this module loads neither torch nor
transformers until a model or an image is asked for.
"""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llava.conversation import (
    conv_templates,
    conversation_name_for,
    default_conversation,
    get_model_name_from_path,
)
from llava.errors import InputError
from llava.files import FileError, parse_natural, parse_record, read_json
from llava.protocols import ImageProcessor, Tokenizer, VisionLanguageModel

if TYPE_CHECKING:
    from PIL import Image

DTYPES = ("float16", "bfloat16", "float32")
ENGINES = ("torch", "vllm")
"""What can run the language model: this package's own loops, or vLLM on prompts that this package makes."""


# ------------------------------------------------------------------------------------------------------ types of values
def user_path(text: str) -> Path:
    """Parse a path; a leading `~` is the home folder."""
    return Path(text).expanduser()


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    return _parse_number(text, 1)


def positive_or_auto(text: str) -> int | None:
    """Parse a whole number above 0, or `auto`: None."""
    return None if text == "auto" else positive(text)


def natural(text: str) -> int:
    """Parse a whole number from 0 on."""
    return _parse_number(text, 0)


def _parse_number(text: str, least: int) -> int:
    number = parse_natural(text)
    if number is None or number < least:
        raise argparse.ArgumentTypeError(f"a whole number from {least} on is needed, not {text!r}")
    return number


# -------------------------------------------------------------------------------------------------------------- options
def add_model_options(
    parser: argparse._ActionsContainer,
    model_help: str = "checkpoint folder or hub id",
    base: bool = True,
    required: bool = True,
    several: bool = False,
) -> None:
    """Add the options that select a model and how it runs; `ModelSpec.from_options` reads them.

    Args:
        parser: gets the options.
        model_help: help text of `--model-path`.
        base: whether a checkpoint may be the part of a model that needs `--model-base`.
        required: whether `--model-path` has to be given.
        several: whether `--reduce` takes several specs: `reduce` is then a list, or None.
    """
    add = parser.add_argument
    add("--model-path", required=required, metavar="CKPT", help=model_help)
    if base:
        add("--model-base", metavar="CKPT", help="base model of a LoRA or projector-only checkpoint")
    add(
        "--reduce",
        metavar="SPEC",
        nargs="+" if several else None,
        help='token reduction, e.g. "TRIM:-1", "TRIM:0.25", "TRIM:flops=0.4" or "none" (default: config.json)',
    )
    add("--calibrated", type=user_path, metavar="FILE", help="the fence of --reduce TRIM:avg=64, by llava.calibrate")
    add("--device", help="cpu, cuda, cuda:1, ... (default: the accelerator if there is one)")
    add("--dtype", metavar="NAME", help=f"{', '.join(DTYPES)} (default: float16; on a CPU float32)")
    add("--tower-dtype", metavar="NAME", help="of the vision and text towers (default: float32, as in LLaVA)")
    add(
        "--attn-implementation",
        metavar="NAME",
        help="attention of the language model: sdpa, eager, flash_attention_2, ... (default: transformers' choice)",
    )


def add_engine_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that choose what runs the language model; `EngineSpec.from_options` reads them."""
    add = parser.add_argument
    add("--engine", choices=ENGINES, default=ENGINES[0], help="what runs the language model (default: %(default)s)")
    add("--tensor-parallel", type=positive, default=1, metavar="N", help="accelerators per model, with vllm")
    add("--gpu-memory-utilization", type=float, metavar="SHARE", help="of each accelerator, for vllm (default: 0.8)")
    add("--vllm-options", metavar="JSON", help="more of vllm's settings, as in '{\"enforce_eager\": true}'")


def add_bring_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that fetch data, for `llava.download.store.bring`."""
    parser.add_argument("--dry-run", action="store_true", help="only say what is there and what would be fetched")
    parser.add_argument("--keep-archives", action="store_true", help="leave archives in DIR/.downloads after unpacking")


def add_prompt_options(parser: argparse.ArgumentParser, *, conv_mode: str | None, temperature: float) -> None:
    """Add the options of the prompt and of the search.

    Args:
        parser: gets the options.
        conv_mode: template where training stored none; None: the one that fits the checkpoint's name.
        temperature: default.
    """
    default = conv_mode or "by the checkpoint's name"
    parser.add_argument(
        "--conv-mode", metavar="NAME", help=f"conversation template (default: the one of training, else {default})"
    )
    parser.set_defaults(usual_conv_mode=conv_mode)
    draw = "" if temperature == 0 else "; tokens are drawn, in each run others"
    parser.add_argument(
        "--temperature", type=float, default=temperature, help=f"0 is greedy (default: {temperature:g}{draw})"
    )


def add_seed_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that makes a draw repeatable."""
    parser.add_argument(
        "--seed", type=natural, help="draw the same tokens in each run, to compare settings (default: no seed)"
    )


def complete_options(parser: argparse.ArgumentParser, args: object) -> argparse.Namespace:
    """Give options that a script made the command's defaults where they are missing.

    Args:
        parser: of the command.
        args: parsed options, or any object with some of them as attributes.

    Raises:
        InputError: one that the command requires is missing, or one is no text that has to be.
    """
    options = argparse.Namespace(usual_conv_mode=parser.get_default("usual_conv_mode"))
    for action in parser._actions:
        if action.dest == "help":
            continue
        if action.required and getattr(args, action.dest, None) is None:
            raise InputError(f"{action.dest} is missing: {action.help}")
        value = getattr(args, action.dest, action.default)
        if not (value is None or _takes_value(action, value)):
            raise InputError(f"{action.dest} {value!r}: expected a text, not {type(value).__name__}")
        if action.type is user_path and isinstance(value, str):
            value = user_path(value)  # scripts give paths as text
        setattr(options, action.dest, value)
    return options


def _takes_value(action: argparse.Action, value: object) -> bool:
    """Whether a script's value is a text where the option of the command line is one; others are checked where read."""
    is_text = type(action) is argparse._StoreAction and action.type is None and action.nargs is None
    return not is_text or isinstance(value, (str, os.PathLike))


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name images; `list_image_sources` and `load_images` read them."""
    parser.add_argument(
        "--image-file",
        action="append",
        required=True,
        metavar="FILE",
        help="image file or http(s) address; several: repeat the option, or join them by --sep",
    )
    parser.add_argument("--sep", default=",", help="what joins several images in one --image-file (default: a comma)")


def choose_template(args: object, config: object = None) -> str:
    """Return the conversation template: the option's, else what training stored, else by the checkpoint's name.

    Where no option names it, a line on stderr does; answers on stdout stay as they are.

    Args:
        args: with `model_path` and possibly `conv_mode`.
        config: of the loaded model; training stores `conv_mode` in it.
    """
    if getattr(args, "conv_mode", None):
        return args.conv_mode
    template, source = guess_template(args.model_path, config)
    sys.stderr.write(f"conversation template {template}, {source} (--conv-mode names another)\n")
    return template


def choose_run_template(args: object) -> str:
    """Return the conversation template of an evaluation, whose command has a usual one (`add_prompt_options`).

    It is the option's, else what training stored, else the usual one; this also where training used the template of
    LLaVA-1.5, of which there are several names. Torch is imported only now.

    Args:
        args: with `model_path`, `conv_mode` and `usual_conv_mode`.
    """
    if args.conv_mode:
        return args.conv_mode
    from llava.model.config_rules import CONFIG_FILE
    from llava.model.stored_weights import find_file

    file = find_file(str(user_path(args.model_path)), CONFIG_FILE)
    try:
        values = {} if file is None else read_json(Path(file))
    except FileError:  # loading it says what is wrong
        values = {}
    stored = values.get("conv_mode") if isinstance(values, dict) else None
    if not isinstance(stored, str) or conv_templates.get(stored) is default_conversation:
        return args.usual_conv_mode
    return stored


def guess_template(model_path: str, config: object = None) -> tuple[str, str]:
    """Return the conversation template of a checkpoint, and for a person where it is from.

    Args:
        model_path: checkpoint folder or hub id.
        config: of the loaded model; training stores `conv_mode` in it.
    """
    stored, name = getattr(config, "conv_mode", None), get_model_name_from_path(model_path)
    return (stored, "from config.json") if stored else (conversation_name_for(name), f'by the name "{name}"')


# ---------------------------------------------------------------------------------------------------------------- model
class LoadedModel(NamedTuple):
    """A model with what turns text and images into its input."""

    tokenizer: Tokenizer
    model: VisionLanguageModel
    image_processor: ImageProcessor


@dataclass(frozen=True)
class ModelSpec:
    """A model and how it is loaded.

    Attributes:
        path: checkpoint folder or hub id.
        base: base model of a LoRA or projector-only checkpoint.
        reduce: token reduction, or the target of one; None: what the checkpoint's config.json says, "none": none.
        device: None: the accelerator if there is one, else the CPU.
        dtype: "float16", "bfloat16", "float32"; None: float16 on an accelerator, float32 on the CPU.
        tower_dtype: of the vision and text towers; None: float32.
        attn_implementation: of the language model; None: transformers' choice.
        load_8bit: quantise the language model to 8 bit.
        load_4bit: quantise it to 4 bit.
        calibrated: file that holds the fence of a target `avg=`.
        budget: what is known of a target whose budget `reduce` is, as JSON data.

    Raises:
        InputError: there is no such dtype.
    """

    path: str
    base: str | None = None
    reduce: str | None = None
    device: str | None = None
    dtype: str | None = None
    tower_dtype: str | None = None
    attn_implementation: str | None = None
    load_8bit: bool = False
    load_4bit: bool = False
    calibrated: Path | None = None
    budget: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for option, name in (("--dtype", self.dtype), ("--tower-dtype", self.tower_dtype)):
            if name not in (None, *DTYPES):
                raise InputError(f"{option} {name}: expected {', '.join(DTYPES)}")

    @classmethod
    def from_options(cls, args: object, **changes: Any) -> "ModelSpec":
        """Make the spec of `add_model_options`; in any object but `model_path` every attribute may be missing.

        Args:
            args: the object.
            changes: attributes of the spec in place of the object's.
        """
        names = [name for name in cls.__dataclass_fields__ if name not in ("path", "base")]
        given = {name: getattr(args, name) for name in names if hasattr(args, name)}
        path = str(user_path(args.model_path))
        return cls(**{"path": path, "base": getattr(args, "model_base", None), **given, **changes})

    @property
    def name(self) -> str:
        """The checkpoint's name, as in the column `model_id` of an answers file."""
        return get_model_name_from_path(self.path)

    def resolve(self) -> "ModelSpec":
        """Find the budget where `reduce` holds a target, and say on stderr what was found; torch is imported only now.

        Raises:
            InputError: the target cannot be met here; says which command finds it.
        """
        from llava.budgets import find_budget

        found = find_budget(self.reduce, self.path, self.base, self.calibrated)
        if found is None:
            return self
        sys.stderr.write(f"{found}\n")
        return replace(self, reduce=found.spec, calibrated=None, budget=found.to_json())

    def load(self, quiet: bool = False, *, without_layers: bool = False) -> LoadedModel:
        """Load the model; torch and transformers are imported only now.

        Args:
            quiet: keep the libraries' progress bars and messages off the terminal.
            without_layers: see `load_pretrained_model`: for a model that embeds prompts which another engine answers.

        Raises:
            InputError: the checkpoint or an option is not usable.
        """
        import transformers

        from llava.model.builder import load_pretrained_model

        if quiet:
            transformers.utils.logging.disable_progress_bar()
            # A hub that cannot be reached ends in one line of ours; each retry would add its own.
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        reduce = self.resolve().reduce
        loaded = load_pretrained_model(
            self.path,
            self.base,
            self.name,
            load_8bit=self.load_8bit,
            load_4bit=self.load_4bit,
            device=self.device,
            reduce=reduce,
            dtype=self.dtype,
            tower_dtype=self.tower_dtype,
            attn_implementation=self.attn_implementation,
            without_layers=without_layers,
        )
        return LoadedModel(*loaded[:3])


@dataclass(frozen=True)
class EngineSpec:
    """What runs the language model, and how.

    Attributes:
        name: one of `ENGINES`.
        tensor_parallel: accelerators that share the language model.
        gpu_memory_utilization: share of each accelerator's memory; None: the engine's own choice.
        options: further settings of vLLM's, by name.
    """

    name: str = ENGINES[0]
    tensor_parallel: int = 1
    gpu_memory_utilization: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_options(cls, args: object) -> "EngineSpec":
        """Make the spec of `add_engine_options`; in any object every attribute may be missing.

        Raises:
            InputError: something is given to another engine than vLLM, or `--vllm-options` is no JSON object.
        """
        found = cls(
            getattr(args, "engine", ENGINES[0]),
            getattr(args, "tensor_parallel", 1),
            getattr(args, "gpu_memory_utilization", None),
        )
        text = getattr(args, "vllm_options", None)
        if found.name != "vllm":
            unused = {"max_positions": None, "vllm_options": None, "tensor_parallel": 1, "gpu_memory_utilization": None}
            for name, default in unused.items():
                if getattr(args, name, default) != default:
                    raise InputError(f"--{name.replace('_', '-')}: only with --engine vllm")
        return found if text is None else replace(found, options=parse_record(text, "--vllm-options"))


def print_now(line: str) -> None:
    """Print a line of a command that takes long, without waiting for more of them."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


# --------------------------------------------------------------------------------------------------------------- images
def list_image_sources(image_files: str | Sequence[str], sep: str) -> list[str]:
    """List the single images named by one or several option values.

    A value that is itself the name of a file is not split.

    Raises:
        InputError: one is neither a text nor a path.
    """
    values = image_files if isinstance(image_files, (list, tuple)) else [image_files]
    sources: list[str] = []
    for value in values:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            raise InputError(
                f"image_file: expected a path or an http(s) address, or a list of these, not {type(value).__name__}; "
                "llava.Llava takes images of every kind"
            )
        sources += [value] if not sep or os.path.isfile(value) else value.split(sep)
    return sources


def load_image(image_file: str) -> "Image.Image":
    """Read an image by its path or address, turned upright.

    Raises:
        InputError: it cannot be read.
    """
    from llava import image

    return image.load_image(image_file, upright=True)


def load_images(image_files: Sequence[str]) -> "list[Image.Image]":
    """Read the images that `list_image_sources` lists; see `load_image`."""
    return [load_image(image_file) for image_file in image_files]
