"""Where a run came from: versions, machine, command line and data, for OUTPUT/run.json."""

import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from llava.files import find_repository
from llava.train.arguments import TrainingArguments
from llava.train.figures import GIBIBYTE
from llava.train.flags import DataArguments, ModelArguments
from llava.train.store import Records

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "peft", "bitsandbytes", "flash-attn", "llava")
GIT_SECONDS = 10
SECRET = "hub_token"


def to_json(value: object) -> object:
    """Return a flag's value as JSON knows it."""
    if isinstance(value, Enum):
        return to_json(value.value)
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def list_flags(*groups: ModelArguments | DataArguments | TrainingArguments) -> dict[str, object]:
    """Return the value of every flag, also of those that do not decide the result; secrets are left out."""
    return {
        flag.name: to_json(getattr(group, flag.name))
        for group in groups
        for flag in fields(group)
        if flag.init and flag.name != SECRET
    }


@cache
def describe_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed, and the commit of a git checkout."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = find_commit()
    return found if commit is None else found | {"commit": commit}


def find_commit() -> str | None:
    """Return the commit that is checked out, with `+` where files differ from it; None without git or a checkout."""
    repository = find_repository()
    if repository is None or not (repository / ".git").exists():
        return None
    words = ("git", "--no-optional-locks", "-C", str(repository))
    try:
        answers = [
            subprocess.run([*words, *rest], capture_output=True, text=True, check=True, timeout=GIT_SECONDS).stdout
            for rest in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return answers[0].strip() + ("+" if answers[1].strip() else "")


def describe_hardware(num_ranks: int) -> dict[str, object]:
    """Describe the first rank's machine, and how many ranks there are."""
    found: dict[str, object] = {
        "machine": platform.node(),
        "system": platform.platform(),
        "ranks": num_ranks,
        "threads": torch.get_num_threads(),
    }
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        found |= {
            "accelerator": torch.get_device_module(kind).get_device_name() if kind.type != "mps" else "mps",
            "accelerator_gib": round(torch.accelerator.get_memory_info()[1] / GIBIBYTE, 1),
        }
    return found


def describe_records(path: str, records: Records) -> dict[str, object]:
    """Describe a set of records: where it was, how large, and by content."""
    num_images = int(records.num_images.sum())
    return {"path": path, "records": len(records), "images": num_images, "fingerprint": records.fingerprint()}


def describe_start(num_ranks: int) -> dict[str, object]:
    """Describe one start of a run; its end is added later."""
    return {
        "started": now(), "ended": None, "versions": describe_versions(), "hardware": describe_hardware(num_ranks),
    }  # fmt: skip


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def sum_up(log: Sequence[Mapping[str, float]]) -> dict[str, object]:
    """Return the final figures of a run's log: the last step, the last held-out loss, the scores, and the whole."""
    steps = [entry for entry in log if "loss" in entry]
    held_out = [entry for entry in log if "eval_loss" in entry]
    scores = [entry for entry in log if any(key.startswith("score_") for key in entry)]
    whole = [entry for entry in log if "train_runtime" in entry]
    return {
        "last_step": steps[-1] if steps else None,
        "held_out": held_out[-1] if held_out else None,
        "scores": scores,
        "whole": whole[-1] if whole else None,
    }
