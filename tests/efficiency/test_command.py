"""The command: counting without weights, measuring with them, files, and one line for every mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava.efficiency import __main__ as command
from llava.efficiency import report
from llava.errors import InputError

ROOT = Path(__file__).parents[2]
POCKET = ROOT / "playground" / "shapes" / "checkpoints" / "llava-shapes-trim"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["efficiency", *map(str, arguments)])
        command.main()
        return capsys.readouterr().out

    return run


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_7b_is_counted_without_weights(run, tmp_path):
    out = run(
        "--model-path", "llava-v1.5-7b", "--reduce", "TRIM:-1", "--against", "none", "--json", tmp_path / "x.json"
    )
    assert "8.672 TFLOPs" in out and "2.476 TFLOPs" in out and "122 / 186" in out
    figures = read(tmp_path / "x.json")
    trim, none = figures["runs"]
    assert (trim["prompt_length"], none["prompt_length"]) == (186, 640)
    assert trim["end_to_end_seconds"] is None
    assert figures["ratios"][0]["prefill_flops_per_prompt"] == pytest.approx(3.50, abs=0.01)
    assert none["kv_cache_bytes"] == 656 * 2**19


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_the_table_fits_the_terminal_with_every_run(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    specs = ("none", "TRIM:64", "VisionZip:64", "TRIM:-1|FastV:0.5")
    out = run("--model-path", "llava-v1.5-7b", "--reduce", "TRIM:-1", "--against", *specs)
    assert max(map(len, out.splitlines())) <= min(columns, 100)
    assert out.count("kept patches  ") == out.count("decode, one step") > 1 and all(spec in out for spec in specs)


@pytest.mark.parametrize(
    ("names", "totals", "unit", "says"),
    [
        (["TRIM:-1", "none"], [3.0, 9.0], "TFLOPs", "TRIM:-1 takes 33 % of the full model's FLOPs"),
        (["none", "TRIM:64", "TRIM:-1"], [9.0, 2.25, 3.0], "ms", "TRIM:64 takes 25 % of the full model's time"),
        (["TRIM:-1", "TRIM:64"], [3.0, 2.0], "ms", "TRIM:64 takes 67 % of TRIM:-1's time"),
        (["TRIM:64", "TRIM:-1"], [2.0, 3.0], "ms", "TRIM:64 takes 67 % of TRIM:-1's time"),
        (["none"], [1234.5], "ms", "none: 1234 ms per batch"),
    ],
)
def test_the_plots_title_says_how_much_less_the_best_method_takes(names, totals, unit, says):
    figures = {"runs": [{"reduce": name} for name in names]}
    assert report.tell_bars(figures, totals, unit) == says


@pytest.mark.parametrize("ending", ["svg", "pdf"])
def test_the_plot_is_vectors_by_its_ending_and_has_the_totals_on_its_bars(run, tmp_path, ending):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plot.{ending}"
    model = ("--model-path", "llava-v1.5-7b", "--reduce", "TRIM:-1", "--against", "none", "--plot", file)
    assert f"written to {file}" in run(*model)
    first = file.read_bytes()
    run(*model)
    assert file.read_bytes() == first
    with pytest.raises(InputError, match=r"a drawing is written as \.png, \.pdf, \.svg"):
        run(*model[:-1], tmp_path / "plot.gif")


def test_counting_loads_neither_transformers_nor_a_plotter():
    code = (
        "import sys; sys.argv = ['x', '--model-path', 'llava-v1.5-7b', '--reduce', 'TRIM:-1']\n"
        "from llava.efficiency.__main__ import main; main()\n"
        "sys.exit('transformers' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, stdout=subprocess.DEVNULL).returncode == 0
    )


def test_the_kept_share_is_obeyed(run):
    assert "288 of 576" in run("--model-path", "llava-v1.5-7b", "--reduce", "TRIM:-1", "--kept", "0.5")


def test_a_checkpoint_is_measured(run, tmp_path):
    pytest.importorskip("matplotlib")
    out = run(
        "--model-path", POCKET, "--against", "none", "--device", "cpu", "--repeats", 2, "--warmup", 1,
        "--new-tokens", 2, "--json", tmp_path / "x.json", "--plot", tmp_path / "deep" / "x.png",
    )  # fmt: skip
    figures = read(tmp_path / "x.json")
    assert "generate, end to end" in out and "ms" in out
    assert figures["device"] == "cpu" and figures["weights"] == "loaded"
    for each in figures["runs"]:
        assert each["stages"]["prefill"]["seconds"]["median"] > 0
    assert figures["runs"][0]["kept_patches"] == 13
    assert "end_to_end_seconds" in figures["ratios"][0]
    assert Image.open(tmp_path / "deep" / "x.png").width > 300


def test_picture_and_question_make_the_model_choose(run, tmp_path):
    Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "red.png")
    run(
        "--model-path", POCKET, "--device", "cpu", "--repeats", 1, "--warmup", 1, "--new-tokens", 1,
        "--image-file", tmp_path / "red.png", "--query", "Is there a red circle in the image?",
        "--json", tmp_path / "x.json",
    )  # fmt: skip
    (trim,) = read(tmp_path / "x.json")["runs"]
    assert trim["kept_source"].startswith("measured on")
    assert 0 <= trim["kept_patches"] <= 16


def test_a_share_of_flops_becomes_a_count_at_the_workload_asked_for(run, tmp_path):
    model = ("--model-path", "llava-v1.5-7b", "--reduce", "TRIM:flops=0.35")
    out = run(*model, "--json", tmp_path / "x.json")
    assert "TRIM:flops=0.35 is TRIM:134: 0.3500 of the FLOPs" in out and "134 of 576" in out
    (target,) = read(tmp_path / "x.json")["targets"]
    assert (target["asked"], target["spec"], target["workload"]["new_tokens"]) == ("TRIM:flops=0.35", "TRIM:134", 16)
    assert "TRIM:155" not in out and "TRIM:134" not in run(*model, "--new-tokens", "200")


def test_a_mean_that_is_not_calibrated_is_counted_as_if_every_image_kept_it(run):
    out = run("--model-path", "llava-v1.5-7b", "--reduce", "TRIM:avg=64", "--against", "FasterVLM:avg=64.5")
    assert "64 of 576" in out and "every image keeps the mean; to answer questions, calibrate" in out
    assert "kept patches of FasterVLM:avg=64.5: a mean over images" in out


def test_a_checkpoint_finds_a_count_by_time(run, tmp_path):
    # Two tiny measurements tell nothing; what is in reach is told by the first.
    arguments = ("--model-path", POCKET, "--device", "cpu", "--repeats", 1, "--warmup", 1, "--new-tokens", 1)
    with pytest.raises(InputError, match=r"TRIM:ms=0\.01: on this machine a batch takes \d+\.\d ms with 1 patch"):
        run(*arguments, "--reduce", "TRIM:ms=0.01")


@pytest.mark.parametrize("source", [POCKET, "llava-v1.5-7b"])
def test_a_reduction_that_looks_at_attention_is_counted_and_measured(run, tmp_path, source):
    out = run(
        "--model-path", source, "--reduce", "FasterVLM:12", "--against", "TRIM:12", "--device", "cpu", "--repeats", 1,
        "--warmup", 1, "--new-tokens", 2, "--json", tmp_path / "x.json",
    )  # fmt: skip
    faster, trim = read(tmp_path / "x.json")["runs"]
    assert "FasterVLM:12" in out and (faster["kept_patches"], faster["image_tokens"]) == (12, 12)
    assert faster["stages"]["vision tower"]["flops"] > trim["stages"]["vision tower"]["flops"]


def test_random_weights_keep_the_layers_that_a_reduction_looks_at(run, tmp_path, configs):
    tower = tmp_path / "clip"
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps(configs.tower))
    (tmp_path / "config.json").write_text(json.dumps(configs.model | {"mm_vision_tower": str(tower)}))
    out = run(
        "--model-path", tmp_path, "--random-weights", "--reduce", "FasterVLM:9,layer=-1", "--device", "cpu",
        "--repeats", 1, "--warmup", 1,
    )  # fmt: skip
    assert "9 of 36" in out


def test_random_weights_need_no_files(run, tmp_path, configs):
    tower = tmp_path / "clip"
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps(configs.tower))
    (tmp_path / "config.json").write_text(json.dumps(configs.model | {"mm_vision_tower": str(tower)}))
    out = run(
        "--model-path", tmp_path, "--random-weights", "--reduce", "TRIM:-1", "--against", "none", "--device", "cpu",
        "--dtype", "bfloat16", "--repeats", 1, "--warmup", 1, "--batch-size", 2, "--json", tmp_path / "x.json",
    )  # fmt: skip
    assert "8 of 36" in out
    assert read(tmp_path / "x.json")["weights"] == "random"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kept", "0"], "--kept 0"),
        (["--kept", "2"], "--kept 2"),
        (["--image-size", "640x"], "--image-size 640x"),
        (["--image-size", "9" * 5000], "--image-size 999"),
        (["--reduce", "TRIMM:-1"], 'unknown token reducer "TRIMM"'),
        (["--reduce", "none", "--against", ""], "nothing to compare"),
        (["--random-weights", "--count-only"], "--count-only"),
        (["--reduce", "TRIM:ms=40"], "milliseconds have to be measured"),
        (["--reduce", "TRIM:flops=0.01"], "of the FLOPs without reduction"),
        (["--reduce", "TRIM:-1|FastV:flops=0.3"], "flops= is for one method alone"),
        (["--reduce", "TRIM:avg=64", "--calibrated", "nothing.json"], "nothing.json"),
        (["--random-weights", "--image-file", "x.png"], "--image-file"),
        (["--prompt-tokens", "5000"], "positions"),
        (["--device", "abacus", "--random-weights"], "abacus"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, words):
    with pytest.raises(InputError) as caught:
        run("--model-path", "llava-v1.5-7b", *arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_too_little_memory_is_refused_with_the_numbers(run, monkeypatch):
    monkeypatch.setattr("llava.efficiency.random_model.available_bytes", lambda device: 10**10)
    with pytest.raises(InputError, match=r"needs \d+\.\d GB on cpu .* but 10\.0 GB are free"):
        run("--model-path", "llava-v1.5-7b", "--random-weights", "--device", "cpu")


def test_a_place_that_can_not_be_written_is_named(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        run("--model-path", "llava-v1.5-7b", "--json", tmp_path / "file" / "x.json")
