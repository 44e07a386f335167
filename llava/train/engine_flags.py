"""What may be asked of DeepSpeed and of FSDP2, checked before torch is imported: flags, settings files, packages."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from llava.errors import InputError
from llava.files import parse_json, read_json

OFF = ("no", "false", "f", "n", "0")
ON = ("yes", "true", "t", "y", "1")
FSDP_FILE = "scripts/fsdp2.json"
OLD_WORDS = {"full_shard": True, "shard_grad_op": False, "auto_wrap": None}
"""What FSDP1's commands name, and whether a layer's weights are given up after its forward pass."""
RESHARD = "reshard_after_forward"
FIXED = {
    "version": (2, "FSDP1 is not supported"),
    "state_dict_type": ("FULL_STATE_DICT", "checkpoints are written whole"),
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "each decoder layer is a part"),
    "cpu_ram_efficient_loading": (False, "every rank loads the model"),
    "cpu_offload": (False, "DeepSpeed does it: ZERO=scripts/zero3_offload.json"),
    "activation_checkpointing": (False, "--gradient_checkpointing True does it"),
}
"""Settings of FSDP that have one value here, and why."""
IGNORED = ("transformer_layer_cls_to_wrap",)  # layers are known, whatever their class
OLDEST_ACCELERATE = (1, 15)  # LoRA's checkpoints, and tied embeddings


def check_engine(flags: argparse.Namespace) -> None:
    """Refuse engines that this process cannot start, and what they cannot do.

    Args:
        flags: as `llava.train.flags.check_flags` reads them.

    Raises:
        InputError: says what would be right.
    """
    if _words_of(flags.fsdp):
        _check_fsdp(flags)
    elif flags.fsdp_config:
        raise InputError(f"--fsdp_config {flags.fsdp_config[0]}: add --fsdp True, or leave it out")
    elif os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ON:
        raise InputError(f"accelerate's launcher asks for FSDP: add --fsdp True --fsdp_config {FSDP_FILE}")
    if flags.deepspeed:
        _check_deepspeed(flags.deepspeed[0])


def read_fsdp(given: str | bool | Sequence[str] | None, settings: str | Mapping[str, object] | None) -> dict | None:
    """Read `--fsdp` and `--fsdp_config` into the settings that transformers takes.

    Args:
        given: True, or the words of FSDP1's commands (`full_shard auto_wrap`).
        settings: a JSON file or what it holds; None: the default.

    Returns:
        The settings; None without FSDP.

    Raises:
        InputError: an unknown word or setting, or a value that FSDP has not here.
    """
    words = _words_of(given)
    if not words:
        return None
    chosen = {name: wanted for name, (wanted, _) in FIXED.items()} | {RESHARD: True}
    for word in words:
        if word not in (*ON, *OLD_WORDS):
            raise InputError(f"--fsdp {word}: expected True, or of FSDP1's words {', '.join(OLD_WORDS)}")
        if OLD_WORDS.get(word) is not None:
            chosen[RESHARD] = OLD_WORDS[word]
    place = "--fsdp_config"
    if isinstance(settings, str) and settings.lstrip().startswith("{"):
        settings = parse_json(settings, place)
    elif isinstance(settings, str):
        place = f"--fsdp_config {settings}"
        settings = read_json(Path(settings), hint=f"--fsdp_config takes {FSDP_FILE}")
    return chosen | _check_settings({} if settings is None else settings, place)


def _check_settings(settings: object, place: str) -> dict[str, object]:
    """Return what a settings file chooses; `place` names it."""
    if not isinstance(settings, Mapping):
        raise InputError(f'{place}: expected settings such as {{"{RESHARD}": true}}')
    chosen = {}
    for key, value in settings.items():
        name = key.removeprefix("fsdp_")
        if name == RESHARD:
            if not isinstance(value, bool):
                raise InputError(f"{place}: {key}: expected true or false, not {value!r}")
            chosen[name] = value
        elif name in FIXED:
            wanted, why = FIXED[name]
            if value != wanted:
                raise InputError(f"{place}: {key}: expected {json.dumps(wanted)}, not {json.dumps(value)}: {why}")
        elif name not in IGNORED:
            raise InputError(f"{place}: there is no setting {key}; expected {', '.join((RESHARD, *FIXED))}")
    return chosen


def _words_of(given: str | bool | Sequence[str] | None) -> list[str]:
    """Return the words of `--fsdp`, which is given as words, a text or a switch; none where it is off."""
    if given is None or isinstance(given, bool):
        return [ON[0]] if given else []
    if not given and not isinstance(given, str):
        return [ON[0]]  # the flag alone
    words = (given if isinstance(given, str) else " ".join(given)).lower().split()
    return [] if words and words[0] in OFF else words


def _check_fsdp(flags: argparse.Namespace) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise InputError("--fsdp needs several processes (torchrun --nproc_per_node 2 ...); one process trains without")
    if flags.deepspeed:
        raise InputError("--fsdp and --deepspeed: choose one engine (scripts: ENGINE=fsdp2, or deepspeed)")
    if flags.bits in (4, 8):
        raise InputError(
            f"--bits {flags.bits}: FSDP2 does not shard quantised weights here; --deepspeed zero2.json does"
        )
    if flags.fp16:
        raise InputError("--fp16 True: with --fsdp use --bf16 True (scripts: PRECISION=bf16), or float32")
    read_fsdp(flags.fsdp, flags.fsdp_config[0] if flags.fsdp_config else None)
    installed = version("accelerate")
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST_ACCELERATE:
        oldest = ".".join(map(str, OLDEST_ACCELERATE))
        raise InputError(f"--fsdp needs accelerate {oldest}, here is {installed}: pip install -U accelerate")


def _check_deepspeed(settings: str) -> None:
    """Check `--deepspeed`, a JSON file or the JSON itself, before anything is started with it."""
    if not settings.lstrip().startswith("{"):
        read_json(Path(settings), hint="--deepspeed takes zero2.json, zero3.json or zero3_offload.json of scripts/")
    if "RANK" not in os.environ:
        raise InputError(
            "--deepspeed needs a launcher, also for one process: `deepspeed --num_gpus 1 llava/train/train_mem.py ...`"
        )
