"""From what a budget shall reach to a budget: `TRIM:avg=64` by a calibration, `TRIM:flops=0.35` by counting.

The parser of spec strings knows such targets and refuses to run them. Commands that load a checkpoint find the budget
first (`llava.cli.ModelSpec.resolve`), say what they found, and store it with their results. Milliseconds have to be
measured, which `python -m llava.efficiency` does.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from llava.efficiency.cost import Workload
from llava.efficiency.estimate import PUBLISHED_KEPT_RATIO, count_left, fix_kept
from llava.efficiency.shapes import ModelSource, read_source
from llava.efficiency.targets import describe_work, find_count
from llava.errors import InputError
from llava.files import read_json
from llava.model.token_reduction import Target, TokenReducer, parse_reduction, read_target
from llava.model.token_reduction.trim import AUTOMATIC_BUDGET


@dataclass(frozen=True)
class FoundBudget:
    """The budget that meets a target.

    Attributes:
        asked: the target's spec string.
        spec: the spec string to run.
        how: where it comes from, for a person.
        record: the same as JSON data.
    """

    asked: str
    spec: str
    how: str
    record: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.asked} is {self.spec}: {self.how}"

    def to_json(self) -> dict[str, Any]:
        return {"asked": self.asked, "spec": self.spec, **self.record}


@dataclass(frozen=True)
class Calibration:
    """A fence that keeps a mean number of patches on the questions of a benchmark, as `llava.calibrate` writes it.

    Attributes:
        asked: the target, such as `TRIM:avg=64`.
        spec: what to run, such as `TRIM:-1,fence=2.31`.
        target: the mean number of patches asked for.
        mean: the mean reached on these questions.
        interval: 95 % interval of that mean, over images.
        mean_tokens: the mean number of tokens that an image leaves, a mean token included.
        fence: the factor.
        task, split: the benchmark; None: its own split.
        num_questions, num_images: how many were looked at.
        model: fingerprints of the checkpoint, its base and its vision tower.
    """

    asked: str
    spec: str
    target: float
    mean: float
    interval: tuple[float, float]
    mean_tokens: float
    fence: float
    task: str
    split: str | None
    num_questions: int
    num_images: int
    model: Mapping[str, str | None]

    @property
    def place(self) -> str:
        """The benchmark and its split, for a person."""
        return f"{self.task}, {self.split}" if self.split else self.task

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.mean:.2f} patches kept on average, 95 % [{low:.2f}, {high:.2f}], {self.mean_tokens:.2f} tokens "
            f"({self.num_questions} questions on {self.num_images} images of {self.place})"
        )

    @classmethod
    def read(cls, file: Path) -> "Calibration":
        """Read the file that `llava.calibrate` wrote.

        Raises:
            InputError: it is missing or something else.
        """
        data = read_json(file, f"`python -m llava.calibrate --task NAME --average X --json {file}` makes it")
        if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
            data = {}
        kinds = {float: (int, float), int: int, str: str, str | None: (str, type(None))}
        known = {each.name: data.get(each.name) for each in fields(cls)}
        checked = [each for each in fields(cls) if each.type in kinds]
        wrong = [each.name for each in checked if not isinstance(known[each.name], kinds[each.type])]
        interval = data.get("interval")
        if not isinstance(interval, list) or len(interval) != 2:
            wrong.append("interval")
        if wrong:
            raise InputError(f"--calibrated {file} is no calibration of `python -m llava.calibrate`: no {wrong[0]}")
        parse_reduction(known["spec"])
        return cls(**known | {"interval": tuple(interval)})


def find_budget(spec: str | None, model_path: str, base: str | None, calibrated: Path | None) -> FoundBudget | None:
    """Find the budget of a target; None where the spec holds none.

    Args:
        spec: of `--reduce`.
        model_path: checkpoint folder or hub id.
        base: its base, if it is a part of a model.
        calibrated: file of a calibration.

    Raises:
        InputError: the target cannot be met here; says which command finds it.
    """
    target = read_target(spec)
    if calibrated is not None and (target is None or target.kind != "avg"):
        raise InputError(f"--calibrated (calibrated=) goes with the reduction METHOD:avg=X, not with {spec or 'none'}")
    if target is None:
        return None
    if target.kind == "flops":
        return find_by_flops(target, read_source(model_path), Workload())
    if target.kind == "avg" and calibrated is not None:
        # Its imports load transformers, which counting does without.
        from llava.model.identity import identify_parts

        return find_by_calibration(target, calibrated, identify_parts(model_path, base))
    parse_reduction(spec)  # says what finds it
    raise AssertionError(f"{spec} is a target that the parser lets pass")


def find_by_flops(target: Target, source: ModelSource, work: Workload) -> FoundBudget:
    """Count at the shapes of a model."""
    found = find_count(target, source.shape, work)
    how = f"{found.share:.4f} of the FLOPs without reduction ({describe_work(work)})"
    return FoundBudget(str(target), found.spec, how, {"flops_share": found.share, "workload": asdict(work)})


def expect_tokens(reducer: TokenReducer | None, grid: tuple[int, int]) -> tuple[int, bool]:
    """Find out how many tokens one view of an image leaves.

    Args:
        reducer: the method before the language model, or None.
        grid: rows and columns of patches.

    Returns:
        The number, and whether it is that of every image; else the method decides by the image, and it is taken to keep
        TRIM's published mean share of the patches.
    """
    fixed = fix_kept(reducer, grid[0] * grid[1], PUBLISHED_KEPT_RATIO)
    return count_left(fixed, grid).num_tokens, fixed == reducer


def assume_mean(target: Target) -> FoundBudget:
    """Let every image keep the mean, for counting and measuring, where no calibration says which ones keep more."""
    count = max(1, round(target.value))
    method = replace(target.method, budget=AUTOMATIC_BUDGET, min_keep=count, max_keep=count)
    how = "every image keeps the mean; to answer questions, calibrate a fence (python -m llava.calibrate --help)"
    return FoundBudget(str(target), method.spec(), how, {"assumed": "every image keeps the mean"})


def find_by_calibration(target: Target, file: Path, model: Mapping[str, str | None]) -> FoundBudget:
    """Take the fence of a calibration.

    Raises:
        InputError: it is one for another target, or on another model.
    """
    calibration = Calibration.read(file)
    if calibration.asked != str(target):
        raise InputError(f"--calibrated {file} is for {calibration.asked}, not for {target}: calibrate for that, too")
    differing = [name.replace("_", " ") for name in model if model[name] != calibration.model.get(name)]
    if differing:
        raise InputError(f"--calibrated {file} was made with another {differing[0]}: calibrate with this model")
    return FoundBudget(str(target), calibration.spec, str(calibration), {"calibration": asdict(calibration)})
