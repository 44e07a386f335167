"""Recipes: the settings of a training script as a small YAML file, checked before anything is started.

A recipe maps the variables of `scripts/lib/train.sh` to their values, and under `flags` further flags of the trainer:

    LEARNING_RATE: 2e-5
    flags:
      weight_decay: 0.01

Values are texts, as in the environment. `scripts/recipes/` has the published ones. The scripts read them by
`python -c 'from llava.train.recipe import main; main()' FILE`, which prints lines `NAME=value` and `--flag=value`.
"""

import difflib
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml  # of PyYAML, which transformers needs

from llava.errors import InputError, run_command
from llava.files import read_text
from llava.train.flags import check_flags

FLAGS = "flags"
_REQUIRED_FLAGS = ["--model_name_or_path", "-", "--data_path", "-", "--output_dir", "-"]


def _is_count(text: str) -> bool:
    return re.fullmatch(r"[1-9][0-9]{0,8}", text) is not None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and float(text) >= 0
    except ValueError:
        return False


@dataclass(frozen=True)
class Kind:
    """What a value may be.

    Attributes:
        wanted: for the message.
        fits: whether a text is such a value.
    """

    wanted: str
    fits: Callable[[str], bool]


TEXT = Kind("a text", lambda _: True)
COUNT = Kind("a whole number from 1 on", _is_count)
SEED = Kind("a whole number from 0 on", lambda text: text == "0" or _is_count(text))
NUMBER = Kind("a number from 0 on", _is_number)
SWITCH = Kind("True or False", lambda text: text in ("True", "False", "true", "false"))


def _one_of(*choices: str) -> Kind:
    return Kind(" or ".join(choices), lambda text: text in choices)


@dataclass(frozen=True)
class Setting:
    """A variable of the scripts.

    Attributes:
        kind: of its value.
        flags: of the trainer that it sets; these are no `flags` of a recipe, as two values would be given.
        may_be_empty: whether an empty value leaves something out.
    """

    kind: Kind
    flags: tuple[str, ...] = ()
    may_be_empty: bool = False


SETTINGS = {
    "MODEL": Setting(TEXT, ("model_name_or_path",)),
    "DATA": Setting(TEXT, ("data_path",)),
    "IMAGES": Setting(TEXT, ("image_folder",), may_be_empty=True),
    "VISION_TOWER": Setting(TEXT, ("vision_tower",), may_be_empty=True),
    "PROJECTOR": Setting(TEXT, ("pretrain_mm_mlp_adapter",), may_be_empty=True),
    "OUTPUT": Setting(TEXT, ("output_dir",)),
    "LOG": Setting(TEXT),
    "VERSION": Setting(TEXT, ("version",)),
    "reduce_func": Setting(TEXT, ("mm_vision_token_reduce_func",), may_be_empty=True),
    "reduce_func_param": Setting(TEXT, may_be_empty=True),
    "ASPECT_RATIO": Setting(TEXT, ("image_aspect_ratio",)),
    "BATCH_SIZE": Setting(COUNT, ("per_device_train_batch_size",)),
    "GLOBAL_BATCH": Setting(COUNT),
    "GRADIENT_ACCUMULATION": Setting(COUNT, ("gradient_accumulation_steps",), may_be_empty=True),
    "LEARNING_RATE": Setting(NUMBER, ("learning_rate",)),
    "PROJECTOR_LEARNING_RATE": Setting(NUMBER, ("mm_projector_lr",), may_be_empty=True),
    "EPOCHS": Setting(NUMBER, ("num_train_epochs",)),
    "MAX_LENGTH": Setting(COUNT, ("model_max_length",)),
    "LORA_RANK": Setting(COUNT, ("lora_r",), may_be_empty=True),
    "LORA_ALPHA": Setting(COUNT, ("lora_alpha",), may_be_empty=True),
    "BITS": Setting(_one_of("4", "8", "16"), ("bits",), may_be_empty=True),
    "PRECISION": Setting(_one_of("bf16", "fp16", "fp32"), ("bf16", "fp16", "tf32")),
    "GRADIENT_CHECKPOINTING": Setting(SWITCH, ("gradient_checkpointing",)),
    "ENGINE": Setting(_one_of("deepspeed", "fsdp2"), ("fsdp", "fsdp_config")),
    "ZERO": Setting(TEXT, ("deepspeed",)),
    "SEED": Setting(SEED, ("seed",)),
    "SAVE_STEPS": Setting(COUNT, ("save_steps",)),
    "LOGGING_STEPS": Setting(COUNT, ("logging_steps",)),
    "NUM_WORKERS": Setting(SEED, ("dataloader_num_workers",)),
    "REPORT_TO": Setting(TEXT, ("report_to",)),
    "EVAL_DATA": Setting(TEXT, ("eval_data_path",), may_be_empty=True),
    "EVAL_STEPS": Setting(NUMBER, ("eval_steps",), may_be_empty=True),
    "VERBOSE": Setting(_one_of("0", "1"), ("verbose_log",)),
    "STOP_SECONDS": Setting(COUNT),
    "NUM_GPUS": Setting(COUNT, may_be_empty=True),
    "NUM_NODES": Setting(COUNT),
}
"""What a recipe may set. What differs from machine to machine (`NODE_RANK`, `MASTER_ADDR`, ...) is no part of one."""

SETTING_OF_FLAG = {flag: name for name, setting in SETTINGS.items() for flag in setting.flags}


@dataclass(frozen=True)
class Recipe:
    """The settings of a recipe, as texts.

    Attributes:
        settings: by the names of `SETTINGS`.
        flags: of the trainer, by their names without dashes.
    """

    settings: dict[str, str]
    flags: dict[str, str]


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file.

    Raises:
        InputError: no such file; not YAML; a setting or flag that does not exist, is there twice, or has a wrong value.
    """
    settings: dict[str, str] = {}
    flags: dict[str, str] = {}
    for name, node, place in _entries(_parse(path), str(path)):
        if name == FLAGS:
            for flag, value_node, flag_place in _entries(node, f"{path}: {FLAGS}"):
                flags[_check_flag(flag, flag_place)] = _text_of(value_node, f"{flag_place}: {flag}")
        else:
            settings[name] = _check_setting(name, node, place)
    try:
        check_flags(_REQUIRED_FLAGS + [word for name, value in flags.items() for word in (f"--{name}", value)])
    except InputError as error:
        raise InputError(f"{path}: {FLAGS}: {error}") from None
    return Recipe(settings, flags)


def _parse(path: Path) -> yaml.Node:
    text = read_text(path, hint="RECIPE names a YAML file, such as those of scripts/recipes/")
    try:
        # Nodes know their lines, and values stay as they are written: YAML takes 1e-3 for a text, 1.0e-3 for a number.
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" line {error.problem_mark.line + 1}"
        raise InputError(f"{path}{line} is not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError:
        raise InputError(f"{path} is not YAML: it holds control characters") from None
    except RecursionError:
        raise InputError(f"{path}: the YAML is nested too deeply") from None
    if node is None:
        raise InputError(f"{path} is empty: a recipe has lines such as LEARNING_RATE: 2e-5")
    return node


def _entries(node: yaml.Node, place: str) -> Iterator[tuple[str, yaml.Node, str]]:
    """Yield name, value and place of what a mapping holds; `place` names the mapping."""
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{place}: lines such as NAME: value are needed")
    seen = set()
    for key, value in node.value:
        where = f"{place} line {key.start_mark.line + 1}"
        name = _text_of(key, where)
        if name in seen:
            raise InputError(f"{where}: {name} is there twice; keep one of the lines")
        seen.add(name)
        yield name, value, where


def _text_of(node: yaml.Node, place: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise InputError(f"{place}: a single value is needed, not a list or a mapping")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in node.value):
        raise InputError(f"{place}: a value is one line without control characters")
    return node.value


def _check_setting(name: str, node: yaml.Node, place: str) -> str:
    setting = SETTINGS.get(name)
    if setting is None:
        names = [*SETTINGS, FLAGS]
        near = difflib.get_close_matches(name.upper(), names, n=1)
        hint = f"is {near[0]} meant?" if near else f"expected {', '.join(names)}"
        raise InputError(f"{place}: there is no setting {name}; {hint}")
    value = _text_of(node, f"{place}: {name}")
    if not value and setting.may_be_empty:
        return value
    if not value or not setting.kind.fits(value):
        raise InputError(f"{place}: {name}: expected {setting.kind.wanted}, not {value!r}")
    return value


def _check_flag(name: str, place: str) -> str:
    flag = name.removeprefix("--").replace("-", "_")
    if flag in SETTING_OF_FLAG:
        raise InputError(f"{place}: {name} is set by {SETTING_OF_FLAG[flag]}: write that instead")
    return flag


def main() -> None:
    """Print a recipe for the scripts, or the line that says what is wrong with it."""
    run_command(_print_recipe)


def _print_recipe() -> None:
    recipe = read_recipe(Path(sys.argv[1]))
    lines = [f"{name}={value}" for name, value in recipe.settings.items()]
    lines += [f"--{name}={value}" for name, value in recipe.flags.items()]
    sys.stdout.writelines(f"{line}\n" for line in lines)
