"""Recipes: what they may say, what is refused before anything starts, and who wins over whom."""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.train.recipe import SETTINGS, read_recipe

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "scripts" / "recipes"
PUBLISHED = ("pretrain", "finetune", "finetune_lora", "finetune_qlora", "finetune_8gpu_TRIM")
OPTIONAL = {"PROJECTOR_LEARNING_RATE", "LORA_RANK", "LORA_ALPHA", "BITS"}
LEFT_OPEN = {  # how a run is spread, saved and watched
    "NUM_GPUS", "NUM_NODES", "GRADIENT_ACCUMULATION", "SAVE_STEPS", "LOGGING_STEPS", "NUM_WORKERS", "REPORT_TO",
    "STOP_SECONDS", "LOG", "ENGINE", "EVAL_DATA", "EVAL_STEPS", "VERBOSE",
}  # fmt: skip


def dry_run(name: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    own = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    environment = own | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "DRY_RUN": "1"} | variables
    return subprocess.run(
        ["bash", str(ROOT / f"scripts/{name}.sh")],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def flags_of(done: subprocess.CompletedProcess) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    return {word[2:]: value for word, value in itertools.pairwise(shlex.split(done.stdout)) if word.startswith("--")}


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_says_all_that_decides_the_result(name: str):
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    assert SETTINGS.keys() - LEFT_OPEN - OPTIONAL <= recipe.settings.keys() <= SETTINGS.keys() - LEFT_OPEN
    published = {"weight_decay": "0.", "warmup_ratio": "0.03", "lr_scheduler_type": "cosine"}
    assert published.items() <= recipe.flags.items()


def test_every_setting_of_a_recipe_is_a_variable_that_the_scripts_list_and_use():
    script = (ROOT / "scripts/lib/train.sh").read_text(encoding="utf-8")
    listed = script[script.index("# Environment") : script.index("source=scripts/lib/common.sh")]
    for name in SETTINGS:
        assert re.search(rf"\b{name}\b", listed), name
        assert re.search(rf"\${{?{name}\b|\b{name}\b.*do check_count", script), name


def test_every_script_reads_a_recipe_and_none_is_left_over():
    scripts = [*(ROOT / "scripts").glob("*.sh"), *(ROOT / "scripts/v1_5").glob("*.sh")]
    read = {name for path in scripts for name in re.findall(r"^read_recipe (\S+)$", path.read_text(), re.MULTILINE)}
    assert read == {str(path.relative_to(ROOT)) for path in RECIPES.rglob("*.yaml")}
    for name in read:
        read_recipe(ROOT / name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("LEARNING_RAET: 2e-5", "my.yaml line 1: there is no setting LEARNING_RAET; is LEARNING_RATE meant?"),
        ("MODEL: a\nnode_rank: 1", "my.yaml line 2: there is no setting node_rank; "),
        ("MASTER_ADDR: node1", "my.yaml line 1: there is no setting MASTER_ADDR; expected MODEL, DATA, "),
        ("BATCH_SIZE: many", "my.yaml line 1: BATCH_SIZE: expected a whole number from 1 on, not 'many'"),
        ("BATCH_SIZE:", "BATCH_SIZE: expected a whole number from 1 on, not ''"),
        ("BATCH_SIZE: 1_0", "BATCH_SIZE: expected a whole number from 1 on, not '1_0'"),
        ("LEARNING_RATE: .nan", "LEARNING_RATE: expected a number from 0 on, not '.nan'"),
        ("LEARNING_RATE: nan", "LEARNING_RATE: expected a number from 0 on, not 'nan'"),
        ("PRECISION: fp8", "PRECISION: expected bf16 or fp16 or fp32, not 'fp8'"),
        ("GRADIENT_CHECKPOINTING: maybe", "GRADIENT_CHECKPOINTING: expected True or False, not 'maybe'"),
        ("MODEL: [a, b]", "my.yaml line 1: MODEL: a single value is needed, not a list or a mapping"),
        ('MODEL: "a\\nb"', "MODEL: a value is one line without control characters"),
        ("MODEL: a\nMODEL: b", "my.yaml line 2: MODEL is there twice; keep one of the lines"),
        ("- MODEL", "my.yaml: lines such as NAME: value are needed"),
        ("flags: x", "my.yaml: flags: lines such as NAME: value are needed"),
        (
            "flags:\n  learning_rate: 1",
            "my.yaml: flags line 2: learning_rate is set by LEARNING_RATE: write that instead",
        ),
        ("flags:\n  --deepspeed: x", "--deepspeed is set by ZERO: write that instead"),
        ("flags:\n  fsdp: True", "fsdp is set by ENGINE: write that instead"),
        ("ENGINE: fsdp", "my.yaml line 1: ENGINE: expected deepspeed or fsdp2, not 'fsdp'"),
        (
            "flags:\n  weight_decya: 0.",
            "my.yaml: flags: --weight_decya: no such training argument; did you mean --weight_decay?",
        ),
        ("flags:\n  weight_decay: much", "my.yaml: flags: --weight_decay: "),
        ("flags:\n  max_steps: -5", "my.yaml: flags: --max_steps -5: expected a number from 1"),
        ("MODEL: [a", "my.yaml line 1 is not YAML: "),
        ("MODEL: \x00", "my.yaml is not YAML: it holds control characters"),
        ("a: &x\n  - *y", "my.yaml line 2 is not YAML: found undefined alias 'y'"),
        ("# nothing", "my.yaml is empty: a recipe has lines such as LEARNING_RATE: 2e-5"),
        ("[" * 500, "my.yaml: the YAML is nested too deeply"),
    ],
)
def test_a_wrong_recipe_is_refused_in_a_line_that_names_the_place(text: str, says: str, write):
    with pytest.raises(InputError) as error:
        read_recipe(write(text))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_values_stay_as_they_are_written(write):
    recipe = read_recipe(
        write("LEARNING_RATE: 2e-5\nreduce_func_param: -1\nIMAGES:\nSEED: 0\nflags:\n  --lora-dropout: .1")
    )
    assert recipe.settings == {"LEARNING_RATE": "2e-5", "reduce_func_param": "-1", "IMAGES": "", "SEED": "0"}
    assert recipe.flags == {"lora_dropout": ".1"}


def test_the_environment_wins_over_your_recipe_and_that_over_the_scripts_own(write, tmp_path: Path):
    recipe = write(
        "LEARNING_RATE: 1e-7\nSEED: 5\nMODEL: here/model\nOUTPUT: out\nPROJECTOR:\nflags:\n  weight_decay: 0.3\n"
        "  max_steps: 4\n"
    )
    (tmp_path / "here/model").mkdir(parents=True)
    flags = flags_of(dry_run("finetune_lora", tmp_path, RECIPE=recipe.name, SEED="6"))
    assert (flags["learning_rate"], flags["seed"], flags["weight_decay"]) == ("1e-7", "6", "0.3")
    assert (flags["max_steps"], flags["lora_r"], flags["lr_scheduler_type"]) == ("4", "128", "cosine")
    assert (ROOT / flags["output_dir"]).resolve() == tmp_path / "out"  # paths are relative to the user's folder
    assert (ROOT / flags["model_name_or_path"]).resolve() == tmp_path / "here/model"
    assert "pretrain_mm_mlp_adapter" not in flags


def test_your_recipe_wins_over_that_of_a_larger_model(write):
    flags = flags_of(dry_run("v1_5/finetune", RECIPE=str(write("MODEL: some/other"))))
    assert flags["model_name_or_path"] == "some/other"
    assert flags["output_dir"] == "checkpoints/llava-v1.5-13b"


@pytest.mark.parametrize("name", ["finetune", "finetune_lora"])
def test_a_copy_of_a_recipe_does_what_the_script_does(name: str, tmp_path: Path):
    copy = tmp_path / "copy.yaml"
    copy.write_text((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert flags_of(dry_run("finetune", RECIPE=str(copy))) == flags_of(dry_run(name))


@pytest.mark.parametrize(
    ("text", "says"), [(None, "no such file: {place}; RECIPE names a YAML file"), ("SEED: x", "{place} line 1: SEED: ")]
)
def test_a_script_refuses_a_wrong_recipe_in_one_line(text: str | None, says: str, tmp_path: Path):
    if text is not None:
        (tmp_path / "my.yaml").write_text(text)
    done = dry_run("finetune", tmp_path, RECIPE="my.yaml")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: " + says.format(place=tmp_path / "my.yaml")), done.stderr
    assert len(done.stderr.splitlines()) == 1
