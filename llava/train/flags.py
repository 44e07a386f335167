"""The flags of training: LLaVA's own three groups, and the check of a command line that comes before heavy imports.

Importing torch and transformers takes seconds; `--help` and a mistyped flag are answered without them. The names of
transformers' own flags are read from its source file. `llava.train.arguments` builds the values.

Where a default of the released code is LLaVA-1.0's and every released script overrides it, the default here is that of
the scripts.
"""

import argparse
import ast
import difflib
import importlib.util
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import NoReturn

from llava.errors import InputError
from llava.files import read_text
from llava.train.engine_flags import OFF, ON, check_engine
from llava.train.noise import hide_noise
from llava.train.score_command import check_command
from llava.train.trackers import check_trackers, split_names

FULL_BITS = 16  # not quantised
ASPECT_RATIOS = ("square", "pad", "anyres")
TOWER_DTYPES = ("float32", "bfloat16", "float16", "run")
QUERY_SOURCES = ("questions", "conversation", "turns")
TRAINER_DOCS = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"


@dataclass
class ModelArguments:
    """Which model is trained, from what, and which parts of it."""

    model_name_or_path: str = field(metadata={"help": "Language model or LLaVA checkpoint to start from."})
    version: str = field(
        default="v1",
        metadata={
            "help": "Conversation template; plain for projector pretraining; auto: the tokenizer's own, v1 without one."
        },
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads from the hub are kept."})
    freeze_backbone: bool = field(default=False, metadata={"help": "Freeze the decoder layers."})
    tune_mm_mlp_adapter: bool = field(default=False, metadata={"help": "Train the projector and nothing else."})
    freeze_mm_mlp_adapter: bool = field(default=False, metadata={"help": "Freeze the projector."})
    vision_tower: str | None = field(
        default=None,
        metadata={"help": "CLIP folder, hub id or open_clip:<model>. Default: the LLaVA checkpoint's own, if any."},
    )
    mm_vision_select_layer: int | None = field(
        default=None, metadata={"help": "Layer whose patches are used. Default: the checkpoint's, else -2."}
    )
    mm_vision_select_feature: str | None = field(
        default=None, metadata={"help": "patch or cls_patch. Default: the checkpoint's, else patch."}
    )
    mm_projector_type: str | None = field(
        default=None, metadata={"help": "linear or mlp<depth>x_gelu. Default: the checkpoint's, else mlp2x_gelu."}
    )
    mm_patch_merge_type: str | None = field(
        default=None, metadata={"help": "flat, spatial or spatial_unpad. Default: the checkpoint's, else flat."}
    )
    pretrain_mm_mlp_adapter: str | None = field(default=None, metadata={"help": "mm_projector.bin to start from."})
    mm_use_im_start_end: bool = field(default=False, metadata={"help": "Put <im_start> and <im_end> around an image."})
    mm_use_im_patch_token: bool = field(default=False, metadata={"help": "Add <im_patch> to the vocabulary."})
    tower_dtype: str = field(
        default="float32",
        metadata={"help": "What the frozen towers run in: float32, bfloat16, float16, or run, as the language model."},
    )
    mm_vision_token_reduce_func: str | None = field(
        default=None,
        metadata={
            "help": "Token reduction, e.g. TRIM:-1; TRIM:0.1-0.4 draws a budget for each step; none switches it off. "
            "Default: the checkpoint's, else none."
        },
    )
    mm_vision_token_reduce_query: str | None = field(
        default=None,
        metadata={
            "help": "Text that the reduction reads: questions (the user's turns as one text, cut where the text half "
            "ends), turns (each by itself, pooled; nothing is cut) or conversation (the prompt). Default: the "
            "checkpoint's, else questions."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager or flash_attention_2. Default: the entry point's choice."}
    )


@dataclass
class DataArguments:
    """What is trained on."""

    data_path: str = field(
        metadata={
            "help": "LLaVA training data: .json, .jsonl, .parquet, a folder of them, a .yaml mixture, or a hub name."
        }
    )
    data_cache: str | None = field(
        default=None,
        metadata={"help": "Folder for the records as they are read. Default: training_data in LLAVA_CACHE."},
    )
    image_folder: str | None = field(default=None, metadata={"help": "Folder that image names are relative to."})
    eval_data_path: str | None = field(
        default=None,
        metadata={
            "help": "Held-out records, as --data_path; their loss before the first step, every --eval_steps and at "
            "the end."
        },
    )
    image_aspect_ratio: str | None = field(
        default=None, metadata={"help": "square, pad or anyres. Default: the checkpoint's, else square."}
    )
    image_grid_pinpoints: str | None = field(
        default=None, metadata={"help": "Canvases for anyres, e.g. [[336,672],[672,336]]."}
    )
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder for what the frozen vision tower makes of images, kept for later epochs and runs."},
    )
    lazy_preprocess: bool = field(default=True, metadata={"help": "Ignored; samples are always built when needed."})
    is_multimodal: bool = field(default=False, metadata={"help": "Ignored; the data decide."})
    skip_broken_records: bool = field(
        default=False, metadata={"help": "Leave broken records out and log them, instead of stopping."}
    )


@dataclass
class LlavaTrainingFlags:
    """How it is trained: what LLaVA adds to transformers' own flags, or gives another default."""

    optim: str = field(default="adamw_torch", metadata={"help": "The optimizer."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator decides what the model gets."})
    dataloader_persistent_workers: bool | None = field(
        default=None, metadata={"help": "Workers live on from epoch to epoch. Default: wherever there are workers."}
    )
    model_max_length: int = field(default=2048, metadata={"help": "Longest sequence, image tokens included."})
    mpt_attn_impl: str | None = field(default=None, metadata={"help": "Ignored; MPT models are not trained."})
    mm_projector_lr: float | None = field(default=None, metadata={"help": "The projector's own learning rate."})
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "Batches of one modality and similar lengths."}
    )
    group_by_reduced_length: bool = field(
        default=False, metadata={"help": "Batches of similar lengths, counted as the reduction leaves them."}
    )
    packing: bool = field(
        default=False, metadata={"help": "Lay a batch's samples end to end, each attending to itself; the same loss."}
    )
    lora_enable: bool = field(default=False, metadata={"help": "Train LoRA adapters; the language model is frozen."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapters, times the rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapters."})
    lora_bias: str = field(
        default="none", metadata={"help": "Biases to train with the adapters: none, all, lora_only."}
    )
    lora_weight_path: str = field(default="", metadata={"help": "Ignored."})
    bits: int = field(default=16, metadata={"help": "4 or 8: quantise the frozen language model (QLoRA)."})
    double_quant: bool = field(default=True, metadata={"help": "With 4 bits: quantise the scales as well."})
    quant_type: str = field(default="nf4", metadata={"help": "With 4 bits: nf4 or fp4."})
    evaluation_strategy: str | None = field(default=None, metadata={"help": "Old name of --eval_strategy."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Ignored; a loss that is nan ends the run."})
    preflight_only: bool = field(
        default=False, metadata={"help": "Check flags, records and images, print what was found, and stop."}
    )
    eval_command: str | None = field(
        default=None,
        metadata={
            "help": "Command that scores the model in {checkpoint} and writes lines name<TAB>value into {results}; "
            "{step} is the step's number."
        },
    )
    eval_command_steps: int | None = field(default=None, metadata={"help": "How often --eval_command runs, in steps."})
    verbose_log: bool = field(
        default=False, metadata={"help": "Also print what libraries say that concerns no user. (Scripts: VERBOSE=1.)"}
    )
    resume_anyway: bool = field(
        default=False,
        metadata={"help": "Go on in an output folder with other settings, or without optimizer state."},
    )
    fsdp_transformer_layer_cls_to_wrap: str | None = field(
        default=None, metadata={"help": "Ignored; FSDP2 shards the decoder's layers, whatever their class."}
    )
    warmup_ratio: float | None = field(default=None, metadata={"help": "Warmup as a share of all steps, in [0, 1)."})


OWN_GROUPS = {"model": ModelArguments, "data": DataArguments, "training": LlavaTrainingFlags}


# ------------------------------------------------------------------------------------------------- the check
class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are `InputError` lines instead of pages of usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def check_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Answer `--help`, and refuse a command line that cannot be right, without importing torch or transformers.

    Args:
        arguments: the flags; None: those of the process.

    Returns:
        LLaVA's own flags as given, and those of transformers as texts.

    Raises:
        InputError: a flag that does not exist, is missing, has a wrong value, or does not go with another one.
        SystemExit: after `--help`.
    """
    words = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    # As transformers, take --lora-r for --lora_r.
    given, unknown = parser.parse_known_args([_with_underscores(word) for word in words])
    if unknown:
        raise InputError(_describe_unknown(unknown[0]))
    _check_values(given)
    return given


def begin_command() -> None:
    """Check the flags of this process, and hide what libraries would print while they are imported."""
    if not check_flags().verbose_log:
        hide_noise()


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `check_flags`: LLaVA's own flags with their help, and the names of transformers' own."""
    trainer_flags = list_trainer_flags()
    names = textwrap.fill(", ".join(sorted(trainer_flags)), 100, initial_indent="  ", subsequent_indent="  ")
    parser = OneLineParser(
        prog="python -m llava.train.train",
        usage="%(prog)s --model_name_or_path MODEL --data_path DATA --output_dir FOLDER [flags]",
        description="Train LLaVA, with or without token reduction. docs/training.md has commands and recipes.",
        epilog=f"transformers' own flags, as --name value ({TRAINER_DOCS}):\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, group in OWN_GROUPS.items():
        section = parser.add_argument_group(title)
        for own in fields(group):
            _add_own(section, own)
    own_names = {own.name for group in OWN_GROUPS.values() for own in fields(group)}
    for name, kind in trainer_flags.items():
        if name not in own_names:
            _add_trainer_flag(parser, name, kind)
    return parser


def list_trainer_flags() -> dict[str, str]:
    """List the names and type annotations of transformers' training flags, read from its source file."""
    spec = importlib.util.find_spec("transformers")
    if spec is None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
    (package,) = spec.submodule_search_locations
    source = ast.parse(read_text(Path(package) / "training_args.py"))
    body = next(
        node.body for node in source.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    )
    return {line.target.id: ast.unparse(line.annotation) for line in body if isinstance(line, ast.AnnAssign)}


_NUMBERS = {"int": int, "float": float}


def _parse_switch(text: str) -> bool:
    if text.lower() not in ON + OFF:
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return text.lower() in ON


def _add_own(section: argparse._ArgumentGroup, own: Field) -> None:
    kind = _plain_kind(own.type.__name__ if isinstance(own.type, type) else str(own.type))
    help_text, is_needed = own.metadata["help"], own.default is MISSING
    if is_needed:
        help_text += " Required."
    elif own.default not in (None, "") and "Default" not in help_text:
        help_text += f" Default: {own.default}."
    options = {"default": None if is_needed else own.default, "help": help_text}
    if kind == "bool":
        section.add_argument(
            f"--{own.name}", type=_parse_switch, nargs="?", const=True, metavar="True|False", **options
        )
        if own.default is True:
            section.add_argument(f"--no_{own.name}", dest=own.name, action="store_false", help=argparse.SUPPRESS)
        return
    parse, metavar = _NUMBERS.get(kind, str), kind.upper() if kind in _NUMBERS else "TEXT"
    section.add_argument(f"--{own.name}", type=parse, metavar=metavar, required=is_needed, **options)


def _add_trainer_flag(parser: argparse.ArgumentParser, name: str, annotation: str) -> None:
    """Add one of transformers' flags: numbers and switches are checked here, everything else by transformers."""
    kind = _plain_kind(annotation)
    if kind in _NUMBERS:
        parser.add_argument(f"--{name}", type=_NUMBERS[kind], help=argparse.SUPPRESS)
    elif kind == "bool":
        parser.add_argument(f"--{name}", type=_parse_switch, nargs="?", help=argparse.SUPPRESS)
        parser.add_argument(f"--no_{name}", action="store_true", help=argparse.SUPPRESS)
    else:
        parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)


def _plain_kind(annotation: str) -> str:
    return annotation.removesuffix(" | None")


def _with_underscores(word: str) -> str:
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word


def _describe_unknown(word: str) -> str:
    known = [own.name for group in OWN_GROUPS.values() for own in fields(group)] + list(list_trainer_flags())
    close = difflib.get_close_matches(word.lstrip("-").split("=")[0], known, n=1)
    return f"{word}: no such training argument" + (f"; did you mean --{close[0]}?" if close else "; see --help")


# ------------------------------------------------------------------------------------------------ the values
def _check_values(flags: argparse.Namespace) -> None:
    _check_choice("mm_vision_token_reduce_query", flags.mm_vision_token_reduce_query, (None, *QUERY_SOURCES))
    _check_choice("tower_dtype", flags.tower_dtype, TOWER_DTYPES)
    _check_choice("image_aspect_ratio", flags.image_aspect_ratio, (None, *ASPECT_RATIOS))
    _check_ranges(flags)
    if flags.tune_mm_mlp_adapter and flags.freeze_mm_mlp_adapter:
        raise InputError("--tune_mm_mlp_adapter and --freeze_mm_mlp_adapter together leave nothing to train")
    if flags.freeze_backbone and flags.freeze_mm_mlp_adapter:
        raise InputError("--freeze_backbone and --freeze_mm_mlp_adapter together leave nothing to train")
    if flags.group_by_modality_length and flags.group_by_reduced_length:
        raise InputError(
            "--group_by_modality_length and --group_by_reduced_length: choose one order of the data "
            "(the scripts set the first; --group_by_modality_length False takes it back)"
        )
    _check_lora(flags)
    _check_looks(flags)
    _check_unserved(flags)
    check_trackers(split_names(flags.report_to or []), _only(flags.output_dir) or ".", _only(flags.trackio_space_id))
    check_engine(flags)


def _check_looks(flags: argparse.Namespace) -> None:
    """Check what is asked of the model while it trains: held-out losses and scores."""
    strategy = flags.evaluation_strategy or _only(flags.eval_strategy) or "no"
    _check_choice("eval_strategy", strategy, ("no", "steps"))
    asked = {"eval_strategy": strategy != "no", "eval_steps": flags.eval_steps, "eval_on_start": flags.eval_on_start}
    for name, is_given in asked.items():
        if is_given and flags.eval_data_path is None:
            raise InputError(f"--{name}: needs --eval_data_path, the records that are held out")
    if bool(flags.eval_command) != bool(flags.eval_command_steps):
        raise InputError("--eval_command and --eval_command_steps go together: what scores the model, and how often")
    if flags.eval_command:
        check_command(flags.eval_command)


MAX_STEPS = 10**9
# What makes sense for numbers: (lowest, whether it is allowed itself, highest).
_RANGES: dict[str, tuple[float, bool, float]] = {
    "learning_rate": (0, True, 1e3),
    "mm_projector_lr": (0, True, 1e3),
    "weight_decay": (0, True, 1e3),
    "num_train_epochs": (0, False, 1e6),
    "per_device_train_batch_size": (1, True, 1e6),
    "gradient_accumulation_steps": (1, True, 1e6),
    "model_max_length": (2, True, 1e7),
    "max_grad_norm": (0, True, 1e9),
    "adam_beta1": (0, True, 0.999999),
    "adam_beta2": (0, True, 0.999999),
    "adam_epsilon": (0, True, 1),
    "warmup_steps": (0, True, 1e9),
    "seed": (0, True, 2**32 - 1),
    "data_seed": (0, True, 2**32 - 1),
    "dataloader_num_workers": (0, True, 1024),
    "save_steps": (0, False, 1e9),
    "save_total_limit": (1, True, 1e9),
    "logging_steps": (0, False, 1e9),
    "eval_steps": (0, False, 1e9),
    "eval_command_steps": (1, True, 1e9),
    "per_device_eval_batch_size": (1, True, 1e6),
    "lora_r": (1, True, 1e5),
    "lora_alpha": (0, False, 1e6),
}


def _check_ranges(flags: argparse.Namespace) -> None:
    """Refuse numbers with which nothing is learned, or the run ends in the middle; nan is in no range."""
    for name, (lowest, is_allowed, highest) in _RANGES.items():
        value = _to_number(getattr(flags, name))
        if value is None:
            continue
        if not (lowest < value <= highest or (is_allowed and value == lowest)):
            bound = f"from {lowest:g}" if is_allowed else f"above {lowest:g}"
            raise InputError(f"--{name} {value:g}: expected a number {bound}, at most {highest:g}")
    for name in ("warmup_ratio", "lora_dropout"):
        value = getattr(flags, name)
        if value is not None and not 0 <= value < 1:
            raise InputError(f"--{name} {value}: expected a share in [0, 1)")
    if flags.max_steps is not None and flags.max_steps != -1 and not 1 <= flags.max_steps <= MAX_STEPS:
        raise InputError(
            f"--max_steps {flags.max_steps}: expected a number from 1, at most {MAX_STEPS:g}, "
            "or -1 for --num_train_epochs"
        )
    if flags.resume_from_checkpoint and flags.resume_from_checkpoint[0].lower() not in ON + OFF:
        raise InputError(
            "--resume_from_checkpoint: a run resumes by itself at the newest complete checkpoint of --output_dir; "
            "leave it out"
        )
    if flags.label_smoothing_factor:
        raise InputError("--label_smoothing_factor: the loss of LLaVA has no smoothing; leave it out")


def _check_unserved(flags: argparse.Namespace) -> None:
    """Refuse flags of transformers that nothing here serves, or that need another one."""
    if flags.load_best_model_at_end:
        raise InputError("--load_best_model_at_end: no checkpoint is chosen by its held-out loss; leave it out")
    if flags.save_strategy == ["best"]:
        raise InputError("--save_strategy best: no checkpoint is chosen by its loss; expected no, steps or epoch")
    if flags.neftune_noise_alpha is not None:
        raise InputError("--neftune_noise_alpha: no noise is added to embeddings here; leave it out")
    if flags.dataloader_persistent_workers and not flags.dataloader_num_workers:
        raise InputError("--dataloader_persistent_workers True needs --dataloader_num_workers from 1")
    if flags.use_liger_kernel and not importlib.util.find_spec("liger_kernel"):
        raise InputError("--use_liger_kernel: liger_kernel is not installed: pip install liger-kernel")


def _only(words: Sequence[str] | None) -> str | None:
    """The word of a flag of transformers that has one; None where it is not given."""
    return words[0] if words else None


def _to_number(value: object) -> float | None:
    """Read a value that the check's parser may have left as a list of texts; None where it is no number."""
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


def _check_lora(flags: argparse.Namespace) -> None:
    _check_choice("lora_bias", flags.lora_bias, ("none", "all", "lora_only"))
    _check_choice("quant_type", flags.quant_type, ("nf4", "fp4"))
    _check_choice("bits", str(flags.bits), ("4", "8", "16"))
    if flags.bits != FULL_BITS and not flags.lora_enable:
        raise InputError(f"--bits {flags.bits}: quantised weights cannot be trained; add --lora_enable True")
    for name in ("tune_mm_mlp_adapter", "freeze_backbone"):
        if flags.lora_enable and getattr(flags, name):
            raise InputError(f"--lora_enable and --{name} together would freeze the adapters")


def _check_choice(name: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise InputError(f"--{name} {value}: expected one of {', '.join(filter(None, choices))}")
