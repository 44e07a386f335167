"""Mixtures of training sets: a YAML file that lists them with weights.

- path: llava_v1_5_mix665k.json      relative to the mixture's folder, or a name on the hub
- path: mine.parquet
  weight: 2                          each record twice per epoch; 0.5: half of the records
"""

import math
import random
import re
from pathlib import Path

import numpy as np
import yaml

from llava.errors import InputError
from llava.files import FileError, read_text

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SUFFIXES = (".yaml", ".yml")
LARGEST_WEIGHT = 1000
SEED = 20240916  # of the records that a share is made of


def list_parts(path: Path) -> list[tuple[str, float]]:
    """List the training sets that a path names, with their weights.

    Args:
        path: a mixture; anything else stands for itself, with weight 1.

    Raises:
        InputError: not a mixture, or an entry of it that cannot be meant.
    """
    if path.suffix not in SUFFIXES:
        return [(str(path), 1.0)]
    try:
        entries = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is not YAML: {reason[:200]}") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: expected a list of entries such as '- path: data.json'")
    return [_read_entry(entry, path, number) for number, entry in enumerate(entries, start=1)]


def _read_entry(entry: object, path: Path, number: int) -> tuple[str, float]:
    where = f"{path}, entry {number}"
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
        raise InputError(f"{where}: expected 'path: FILE', and if wanted 'weight: NUMBER', found {repr(entry)[:80]}")
    if unknown := [key for key in entry if key not in ("path", "weight")]:
        raise InputError(f"{where}: {unknown[0]!r} is not known; expected path and weight")
    weight = entry.get("weight", 1)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 < weight <= LARGEST_WEIGHT:
        raise InputError(
            f"{where}: weight {repr(weight)[:80]}: expected a number above 0, at most {LARGEST_WEIGHT}; leave an entry "
            "out to train without it"
        )
    name = entry["path"]
    if Path(name).suffix in SUFFIXES:
        raise InputError(f"{where}: {name} is a mixture itself; list its entries here")
    inside = path.parent / name
    is_on_hub = HUB_NAME.fullmatch(name) and not Path(name).suffix and not inside.exists()
    return name if is_on_hub else str(inside), float(weight)


def repeat_by_weight(positions: np.ndarray, weight: float) -> np.ndarray:
    """Repeat records as often as a weight says.

    Args:
        positions: int64[S], of a training set's records.
        weight: 2.5 gives all twice, and half of them, the same half each time, a third time.

    Returns:
        int64[round(S x weight)], at least one: the positions over and over, the share last and in order.
    """
    whole = math.floor(weight)
    num_more = round(len(positions) * (weight - whole)) or int(not whole)
    more = sorted(random.Random(SEED).sample(range(len(positions)), min(num_more, len(positions))))
    return np.concatenate([np.tile(positions, whole), positions[more]])
