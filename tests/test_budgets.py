"""Means by calibration: the fence hits its target where it was fitted, results say what it came to elsewhere."""

import contextlib
import dataclasses
import importlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from llava.budgets import Calibration, find_budget
from llava.cli import ModelSpec
from llava.errors import InputError, run_command
from llava.eval.results import read_result
from llava.eval.run import Options
from llava.fence import Scores, fit_fence, keep_upper
from llava.model.token_reduction import parse_reducer, read_target
from playground.shapes.generate import write_eval

POCKET = Path(__file__).parents[1] / "playground" / "shapes" / "checkpoints" / "llava-shapes-trim"
AVERAGE = 12.0


def run(module: str, *arguments: object) -> SimpleNamespace:
    """Run a command within this process."""
    out, error, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
        mock.patch("sys.argv", [module, *map(str, arguments)]),
    ):
        try:
            run_command(importlib.import_module(module).main)
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(code=code, out=out.getvalue(), error=error.getvalue())


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """POPE's layout on two sets of pictures: to calibrate on, and to test on."""
    folder = tmp_path_factory.mktemp("worlds")
    for name, seed in (("fit", 11), ("test", 12)):
        write_eval(folder / name, 30, seed=seed)
    return SimpleNamespace(fit=folder / "fit" / "pope", test=folder / "test" / "pope")


def calibrate(root: Path, *options: object) -> SimpleNamespace:
    fixed = ("--model-path", POCKET, "--task", "pope", "--root", root, "--device", "cpu")
    return run("llava.calibrate", *fixed, *options)


@pytest.fixture(scope="module")
def calibrated(roots: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    file = tmp_path_factory.mktemp("calibrated") / "fence.json"
    done = calibrate(roots.fit, "--average", AVERAGE, "--json", file)
    assert done.code == 0, done.error
    return SimpleNamespace(file=file, out=done.out, found=Calibration.read(file))


def answer_and_score(root: Path, folder: Path, *options: object) -> tuple[SimpleNamespace, SimpleNamespace]:
    answers = folder / "answers.jsonl"
    shared = ("pope", "--root", root, "--answers", answers)
    asked = run(
        "llava.eval.__main__", "answer", *shared, "--model-path", POCKET, "--device", "cpu",
        "--max-new-tokens", 3, *options,
    )  # fmt: skip
    assert asked.code == 0, asked.error
    return asked, run("llava.eval.__main__", "score", *shared, "--json", folder / "result.json")


def test_the_fence_hits_its_target_on_the_split_that_it_was_fitted_on(calibrated: SimpleNamespace) -> None:
    found = calibrated.found
    assert abs(found.mean - AVERAGE) <= 0.05
    low, high = found.interval
    assert low < AVERAGE < high
    assert found.mean_tokens == found.mean + 1
    assert (found.asked, found.task, found.split, found.num_images) == ("TRIM:avg=12", "pope", None, 30)
    first, second = calibrated.out.splitlines()
    assert first == found.spec == f"TRIM:-1,fence={found.fence}"
    assert f"{found.mean:.2f} patches kept on average, 95 % [{low:.2f}, {high:.2f}]" in second


def test_a_run_on_the_same_split_keeps_that_mean(
    roots: SimpleNamespace, calibrated: SimpleNamespace, tmp_path: Path
) -> None:
    answer_and_score(roots.fit, tmp_path, "--reduce", "TRIM:avg=12", "--calibrated", calibrated.file)
    tokens = read_result(tmp_path / "result.json").tokens
    assert tokens.mean_tokens == pytest.approx(calibrated.found.mean_tokens)
    assert tokens.interval == pytest.approx([end + 1 for end in calibrated.found.interval], abs=0.2)


def test_a_result_says_what_the_target_came_to_on_its_own_split(
    roots: SimpleNamespace, calibrated: SimpleNamespace, tmp_path: Path
) -> None:
    asked, scored = answer_and_score(roots.test, tmp_path, "--reduce", "TRIM:avg=12", "--calibrated", calibrated.file)
    spec = calibrated.found.spec
    assert f"TRIM:avg=12 is {spec}: {calibrated.found}" in asked.error
    run_file = json.loads((tmp_path / "answers.jsonl.run.json").read_text())
    assert run_file["reduce"] == spec and "calibrated" not in run_file
    result = read_result(tmp_path / "result.json")
    assert result.budget["calibration"] == json.loads(calibrated.file.read_text())
    low, high = result.tokens.interval
    assert low < result.tokens.mean_tokens < high
    assert f"TRIM:avg=12 ran as {spec}: {result.tokens.mean_tokens:.2f} tokens on average" in scored.error
    assert f"{calibrated.found.mean_tokens:.2f} on pope, where it was calibrated" in scored.error


def test_a_share_of_flops_is_resolved_and_stored_with_a_run(roots: SimpleNamespace, tmp_path: Path) -> None:
    asked, _ = answer_and_score(roots.test, tmp_path, "--reduce", "TRIM:flops=0.9")
    assert "TRIM:flops=0.9 is TRIM:42: 0.8961 of the FLOPs without reduction (batch 1, 64 prompt" in asked.error
    result = read_result(tmp_path / "result.json")
    assert result.budget["spec"] == "TRIM:42" and result.budget["workload"]["prompt_tokens"] == 64
    assert result.tokens.mean_tokens == 43 and result.tokens.interval is None  # every image has as many


def test_runs_without_a_target_are_described_as_before(roots: SimpleNamespace, tmp_path: Path) -> None:
    answer_and_score(roots.test, tmp_path, "--reduce", "TRIM:9")
    assert not {"budget", "calibrated"} & json.loads((tmp_path / "answers.jsonl.run.json").read_text()).keys()
    assert read_result(tmp_path / "result.json").budget is None


def test_a_mean_out_of_reach_of_the_fence_says_what_it_reaches(roots: SimpleNamespace) -> None:
    done = calibrate(roots.fit, "--average", 40)
    assert done.code == 2 and done.out == ""
    line = done.error.splitlines()[-1]
    assert "TRIM:avg=40: on pope a fence keeps means of" in line and "at most a quarter of an image's 64" in line
    assert line.endswith("or fix the number: TRIM:40")


def test_textsim_and_options_are_calibrated_too(roots: SimpleNamespace) -> None:
    done = calibrate(roots.fit, "--average", 9, "--reduce", "TextSim:-1,similarity=direct", "--limit", 40)
    assert done.code == 0, done.error
    assert done.out.startswith("TextSim:-1,similarity=direct,fence=")
    assert "9.00 tokens (40 questions" in done.out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--average", "12", "--reduce", "TRIM:9"], "TRIM:9 has no fence to fit: use TRIM:-1"),
        (["--average", "12", "--reduce", "FasterVLM:9"], "FasterVLM:avg=12 needs no calibration"),
        (["--average", "12", "--reduce", "TRIM:-1|FastV:0.5"], "has no fence to fit"),
        (["--average", "12", "--reduce", "none"], "has no fence to fit"),
        (["--average", "0.5"], "token budget avg=0.5 is out of range"),
        (["--average", "nan"], "out of range"),
        ([], "--model-path, --task, --average go together"),
        (["--average", "12", "--pictures", "x"], "go together, without others"),
        (["--average", "12", "--split", "unknown"], "pope has one split only"),
    ],
)
def test_a_mistake_of_calibrate_is_one_line(roots: SimpleNamespace, options: list[str], says: str) -> None:
    done = calibrate(roots.fit, *options)
    assert done.code == 2 and says in done.error and len(done.error.splitlines()) == 1


def test_a_mean_without_calibration_names_the_command_that_makes_one() -> None:
    with pytest.raises(InputError, match=r"python -m llava\.calibrate .*--average 64 --json FILE.*--calibrated FILE"):
        ModelSpec(str(POCKET), reduce="TRIM:avg=64").resolve()


def test_milliseconds_name_the_command_that_measures() -> None:
    with pytest.raises(InputError, match=r"python -m llava\.efficiency --model-path CKPT --reduce TRIM:ms=40"):
        ModelSpec(str(POCKET), reduce="TRIM:ms=40").resolve()


@pytest.mark.parametrize("reduce", [None, "none", "TRIM:-1", "FasterVLM:avg=9.5", "TRIM:-1|FastV:0.5"])
def test_what_is_no_target_stays_as_it_is(reduce: str | None) -> None:
    spec = ModelSpec(str(POCKET), reduce=reduce)
    assert spec.resolve() is spec


@pytest.mark.parametrize(
    ("reduce", "change", "says"),
    [
        ("TRIM:avg=13", {}, "is for TRIM:avg=12, not for TRIM:avg=13"),
        ("TRIM:avg=12,similarity=direct", {}, "is for TRIM:avg=12, not for"),
        ("TRIM:avg=12", {"model": {}}, "was made with another checkpoint"),
        ("TRIM:avg=12", {"model": None}, "is no calibration"),
        ("TRIM:avg=12", {"mean": "many"}, "is no calibration of `python -m llava.calibrate`: no mean"),
        ("TRIM:avg=12", {"spec": "TRIMM:-1"}, 'unknown token reducer "TRIMM"'),
        ("TRIM:avg=12", {"interval": 3}, "no interval"),
        ("TRIM:-1", {}, "--calibrated (calibrated=) goes with the reduction METHOD:avg=X, not with TRIM:-1"),
        ("TRIM:flops=0.5", {}, "--calibrated (calibrated=) goes with"),
        (None, {}, "METHOD:avg=X, not with none"),
    ],
)
def test_a_calibration_that_does_not_fit_is_one_line(
    calibrated: SimpleNamespace, tmp_path: Path, reduce: str | None, change: dict, says: str
) -> None:
    file = tmp_path / "fence.json"
    file.write_text(json.dumps(json.loads(calibrated.file.read_text()) | change))
    with pytest.raises(InputError) as caught:
        find_budget(reduce, str(POCKET), None, file)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_scripts_take_a_calibration_from_where_the_user_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    options = Options.parse(["--reduce", "TRIM:avg=12", "--calibrated", "fence.json", "--split", "val"])
    assert options.answer == ["--reduce", "TRIM:avg=12", "--calibrated", str(tmp_path / "fence.json")]
    assert options.shared == ["--split", "val"]


@pytest.fixture(scope="module")
def probabilities() -> torch.Tensor:
    scores = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    return (3 * scores).softmax(dim=1)


@pytest.fixture(scope="module")
def make_scores(probabilities: torch.Tensor) -> Callable[[], Scores]:
    images = [f"{number // 3}.jpg" for number in range(300)]
    return lambda: Scores(*keep_upper(probabilities), images, 64, 300)


@pytest.mark.parametrize("spec", ["TRIM:-1", "TextSim:-1", "TRIM:-1,min_keep=3,max_keep=9"])
def test_stored_scores_give_the_counts_of_the_rule_itself(
    probabilities: torch.Tensor, make_scores: Callable[[], Scores], spec: str
) -> None:
    for fence in (0.0, 0.3, 1.5, 4.0, 30.0, 1e38):
        reducer = dataclasses.replace(parse_reducer(spec), fence=fence)
        assert make_scores().count(reducer).equal(reducer.count(probabilities))


@pytest.mark.parametrize("average", [1.0, 2.5, 6.0, 9.75, 13.0])
def test_no_fence_comes_closer_than_the_one_found(make_scores: Callable[[], Scores], average: float) -> None:
    scores = make_scores()
    reducer = fit_fence(read_target(f"TRIM:avg={average}"), scores, "here")
    # One more patch of one image is a three-hundredth.
    assert abs(scores.mean(reducer) - average) <= max(1 / 300, 5e-4 * average)
    assert len(f"{reducer.fence:g}") <= 8
    low, high = scores.interval(reducer)
    assert low < scores.mean(reducer) < high
