"""The weight files of a checkpoint: find them, list what they hold without reading it, and refuse what does not fit.

A checkpoint is one file or several shards with an index, safetensors or torch's `.bin`. Names and shapes come from the
headers alone, so that a wrong checkpoint is refused before anything large is read.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import NoReturn

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from llava.errors import InputError
from llava.files import parse_record, read_text

Shapes = Mapping[str, tuple[int, ...]]

# In the order in which transformers looks for them.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SEARCH_ORDER = (WEIGHT_FILES[0], INDEX_FILES[0], WEIGHT_FILES[1], INDEX_FILES[1])
NO_WEIGHTS = f"holds no weights: expected {' or '.join(WEIGHT_FILES)}, or shards"
COPY_AGAIN = "copy or download it again"
_LAYER = re.compile(r"(.*?\blayers\.)(\d{1,9})\.")


# ------------------------------------------------------------------------------------------------------- the files
def find_file(path: str, name: str, cache_dir: str | None = None, *, at_hand: bool = False) -> str | None:
    """Return the path of a file in a folder or hub repository, or None where it has none of that name.

    With `at_hand` the hub is not asked: of its repositories, files are found that were downloaded before.
    """
    try:
        return cached_file(
            path,
            name,
            cache_dir=cache_dir,
            local_files_only=at_hand,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError):  # no such folder, or nothing that could be a hub id
        return None


def holds_weights(folder: Path) -> bool:
    """Return whether a folder has a weight file or an index of shards."""
    return any((folder / name).is_file() for name in SEARCH_ORDER)


def list_weight_files(path: str, containing: str = "") -> list[str]:
    """List the weight files of a folder or hub id; those of a hub id are downloaded.

    Args:
        path: the checkpoint.
        containing: of shards, only those with a tensor whose name contains this.

    Raises:
        InputError: there are none, or a shard is missing.
    """
    for name in SEARCH_ORDER:
        found = find_file(path, name)
        if found is None:
            continue
        if name in WEIGHT_FILES:
            return [found]
        shards = sorted({shard for key, shard in read_weight_map(found).items() if containing in key})
        files = {shard: find_file(path, shard) for shard in shards}
        absent = [shard for shard, file in files.items() if file is None]
        if absent:
            raise InputError(
                f"checkpoint {path} lacks {len(absent)} of {len(shards)} weight files, first {absent[0]}: "
                "copy or download it again"
            )
        return [file for file in files.values() if file is not None]
    raise InputError(f"checkpoint {path} {NO_WEIGHTS}")


def read_weight_map(index: str | Path) -> dict[str, str]:
    """Read which file holds which weight.

    Raises:
        InputError: not an index file, or one that names something other than files beside it.
    """
    content = parse_record(read_text(Path(index)), str(index))
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{index}: weight_map is {show(weight_map)}; expected an object that names the file of each tensor"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith((".safetensors", ".bin")):
            raise InputError(
                f'{index}: weight_map has {show(shard)} for "{name}"; expected a .safetensors or .bin file beside it'
            )
    if not isinstance(content.get("metadata"), dict):
        raise InputError(f"{index}: metadata is {show(content.get('metadata'))}; expected an object (it may be empty)")
    return weight_map


def show(value: object) -> str:
    """Spell a value from a JSON file as JSON does, cut to a readable length."""
    names = {None: "null", True: "true", False: "false"}
    text = names.get(value) if value is None or isinstance(value, bool) else None
    if text is None:
        text = f'"{value}"' if isinstance(value, str) else repr(value)
    text = " ".join(text.split()) or '""'
    return text if len(text) <= 60 else f"{text[:57]}..."


# ----------------------------------------------------------------------------------------------------- the tensors
def read_shapes(file: str) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of a weight file's tensors from its header.

    Raises:
        InputError: it cannot be read, or holds something other than tensors.
    """
    if not file.endswith(".safetensors"):
        return {name: tuple(value.shape) for name, value in _read_torch_file(file).items()}
    try:
        with safe_open(file, framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except Exception as error:
        # Many kinds: safetensors' own errors, OSError.
        raise InputError(f"{file} can't be read: {first_line(error)}; copy or download it again") from error


def iterate_tensors(file: str, containing: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield a weight file's tensors one by one, on the CPU, without holding the whole file in memory.

    Args:
        file: `.safetensors`, or torch's format under any other name.
        containing: only tensors whose name contains this.

    Raises:
        InputError: as in `read_shapes`.
    """
    if not file.endswith(".safetensors"):
        yield from ((name, value) for name, value in _read_torch_file(file).items() if containing in name)
        return
    names = [name for name in read_shapes(file) if containing in name]
    with safe_open(file, framework="pt") as weights:
        for name in names:
            yield name, weights.get_tensor(name)


def read_dtypes(file: str) -> dict[str, str]:
    """Read the names and dtypes of a weight file's tensors from its header, as its format spells them: F16, float16.

    Raises:
        InputError: as in `read_shapes`.
    """
    if not file.endswith(".safetensors"):
        return list_dtypes(_read_torch_file(file))
    names = read_shapes(file)
    with safe_open(file, framework="pt") as weights:
        return {name: weights.get_slice(name).get_dtype() for name in names}


def list_dtypes(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """List the dtypes of tensors, as torch spells them: float16, int8."""
    return {name: str(value.dtype).removeprefix("torch.") for name, value in weights.items()}


def _read_torch_file(file: str) -> dict[str, Tensor]:
    """Read a `.bin` file as a memory map where its format allows it; pickled code never runs."""
    try:
        try:
            stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            stored = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise InputError(
            f"{file} can't be read: it holds no weights, or more than weights (code is not run); {COPY_AGAIN}"
        ) from error
    except Exception as error:
        # Many kinds: zip and end-of-file errors, OSError.
        raise InputError(f"{file} can't be read: {first_line(error)}; copy or download it again") from error
    if not isinstance(stored, Mapping):
        raise InputError(f"{file} holds a {type(stored).__name__}; expected named tensors")
    for name, value in stored.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{file}: {show(name)} is a {type(value).__name__}; expected named tensors")
    return dict(stored)


def first_line(error: Exception) -> str:
    """Return the first line of an error, or its type where it has no message."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


# ------------------------------------------------------------------------------------------------------ the checks
def check_shapes(
    stored: Shapes,
    expected: Shapes,
    what: str,
    *,
    optional: Collection[str] = (),
    ignored: Collection[str] = (),
    hint: str = COPY_AGAIN,
) -> None:
    """Compare what a checkpoint holds with what the model of its config has.

    Args:
        stored: names and shapes in the files.
        expected: names and shapes in the model.
        what: subject of the messages.
        optional: names that may be missing, or of another shape, because other weights replace them.
        ignored: patterns of stored names that the model leaves alone.
        hint: what a missing tensor most likely means.

    Raises:
        InputError: another number of layers, a tensor missing, without a place, or of another shape; it is named.
    """
    unknown = sorted(name for name in stored if name not in expected and not is_ignored(name, ignored))
    missing = sorted(name for name in expected if name not in stored and name not in optional)
    given = _count_layers(stored)
    for stack, number in _count_layers(expected).items():
        if given.get(stack, number) != number:
            raise InputError(
                f"{what}: config.json says num_hidden_layers {number}, the weights have {given[stack]} {stack}*"
            )
    refuse_missing(missing, what, hint)
    refuse_unknown(unknown, what)
    for name, shape in expected.items():
        if name in stored and name not in optional and tuple(stored[name]) != tuple(shape):
            refuse_shape(name, stored[name], shape, what)


def refuse_missing(names: Collection[str], what: str, hint: str = COPY_AGAIN) -> None:
    """Refuse a checkpoint that lacks tensors, if there are any.

    Raises:
        InputError: there are.
    """
    if names:
        count = "1 weight" if len(names) == 1 else f"{len(names)} weights, first"
        raise InputError(f"{what} lacks {count} {min(names)}: {hint}")


def refuse_unknown(names: Collection[str], what: str) -> None:
    """Refuse a checkpoint that holds tensors which the model has no place for, if there are any.

    Raises:
        InputError: there are.
    """
    if names:
        count = "1 weight" if len(names) == 1 else f"{len(names)} weights"
        raise InputError(
            f"{what} holds {count} that its config.json has no place for, first {min(names)}: "
            "is it another kind of model?"
        )


def refuse_shape(
    name: str, stored: Iterable[int], expected: Iterable[int], what: str, asks: str = "the config"
) -> NoReturn:
    """Refuse a tensor of another shape than the model's.

    Raises:
        InputError: always.
    """
    raise InputError(f"{what}: {name} has shape {list(stored)}, {asks} asks for {list(expected)}")


def check_dtypes(stored: Mapping[str, str], expected: Collection[str], what: str) -> None:
    """Refuse weights that are no floating-point numbers: read as such, integers or complex numbers mean nothing.

    Args:
        stored: names and dtypes, as `read_dtypes` or `list_dtypes` gives them.
        expected: names in the model.
        what: subject of the message.

    Raises:
        InputError: the first one by name.
    """
    for name in sorted(set(stored) & set(expected)):
        if not stored[name].lower().startswith(("f", "bf")):
            raise InputError(
                f"{what}: {name} holds {stored[name]}; expected floating-point numbers (a checkpoint quantised in "
                "another format? take the one it was made from)"
            )


def is_ignored(name: str, patterns: Collection[str]) -> bool:
    """Return whether a tensor's name matches one of some regular expressions."""
    return any(re.search(pattern, name) for pattern in patterns)


def _count_layers(names: Iterable[str]) -> dict[str, int]:
    """Count the layers of each stack, such as `model.layers.`, by the highest number in the names of its tensors."""
    counts: dict[str, int] = {}
    for match in filter(None, map(_LAYER.match, names)):
        counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return counts


def check_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Refuse tensors that hold inf or NaN.

    One pass over the values, at the speed of memory: the extremes show an inf or NaN anywhere. The host waits once per
    device.

    Args:
        tensors: names and values; those that are not floating-point, packed (4 bit), or held elsewhere (meta,
            partitioned), pass.
        what: subject of the message.

    Raises:
        InputError: the first tensor that does.
    """
    by_device: dict[torch.device, list[tuple[str, Tensor, Tensor]]] = {}
    for name, value in tensors:
        is_packed = hasattr(value, "quant_state")  # bitsandbytes keeps 4-bit codes in memory of any dtype
        if value.is_floating_point() and value.itemsize > 1 and value.numel() and not (value.is_meta or is_packed):
            extremes = torch.stack(value.detach().aminmax()).isfinite().all()
            by_device.setdefault(value.device, []).append((name, value, extremes))
    for rows in by_device.values():
        are_finite = torch.stack([is_finite for _, _, is_finite in rows]).tolist()
        for (name, value, _), is_finite in zip(rows, are_finite, strict=True):
            if not is_finite:
                count = int((~value.isfinite()).sum())
                raise InputError(
                    f"{what}: {name} holds inf or NaN ({count} of {value.numel()} values): the training that wrote it "
                    "diverged, or the file is damaged"
                )
