"""Help and mistaken flags are answered at once, without torch; what the check lets through is what the parser takes."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from llava.errors import InputError
from llava.train.flags import OWN_GROUPS, build_parser, check_flags, list_trainer_flags

ROOT = Path(__file__).parents[2]
REQUIRED = ["--model_name_or_path", "m", "--data_path", "d.json"]
# Runs a module or a file as Python itself would, and fails if that has imported a heavy package.
CODE = """
import runpy, sys
entry, *sys.argv[1:] = sys.argv[1:]
try:
    if entry.endswith(".py"):
        runpy.run_path(entry, run_name="__main__")
    else:
        runpy.run_module(entry, run_name="__main__", alter_sys=True)
finally:
    heavy = {"torch", "transformers", "deepspeed"} & set(sys.modules)
    assert not heavy, heavy
"""


def answer(entry: str, *flags: str) -> subprocess.CompletedProcess:
    """Run an entry point that is to end before any heavy import."""
    command = [sys.executable, "-c", CODE, entry, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("entry", ["llava/train/train_mem.py", "llava.train.train"])
def test_help_and_mistakes_are_answered_without_torch(entry: str):
    shown = answer(entry, "--help")
    assert shown.returncode == 0, shown.stderr
    text = " ".join(shown.stdout.split())
    for group in OWN_GROUPS.values():
        for own in dataclasses.fields(group):
            assert f"--{own.name} " in text and own.metadata["help"] in text
    assert "gradient_accumulation_steps" in text and "huggingface.co/docs/transformers" in text
    refused = answer(entry, *REQUIRED, "--lerning_rate", "1")
    assert refused.returncode == 2
    assert refused.stderr == "error: --lerning_rate: no such training argument; did you mean --learning_rate?\n"


def test_the_flags_read_from_the_source_are_those_of_transformers():
    fields = {one.name for one in dataclasses.fields(transformers.TrainingArguments) if one.init}
    assert set(list_trainer_flags()) == fields


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("", "the following arguments are required: --model_name_or_path, --data_path"),
        ("--model_name_or_path m", "the following arguments are required: --data_path"),
        ("{} --qqq 1", "--qqq: no such training argument; see --help"),
        ("{} stray", "stray: no such training argument; see --help"),
        ("{} --learning_rate fast", "--learning_rate: invalid float value: 'fast'"),
        ("{} --max_steps 1.5", "--max_steps: invalid int value: '1.5'"),
        ("{} --lora-r many", "--lora_r: invalid int value: 'many'"),
        ("{} --bf16 Tru", "--bf16: expected True or False, not 'Tru'"),
        ("{} --lora_enable perhaps", "--lora_enable: expected True or False, not 'perhaps'"),
        ("{} --image_aspect_ratio padd", "--image_aspect_ratio padd: expected one of square, pad, anyres"),
        ("{} --tower_dtype half", "--tower_dtype half: expected one of float32, bfloat16, float16, run"),
        ("{} --bits 3", "--bits 3: expected one of 4, 8, 16"),
        ("{} --eval_strategy steps", "--eval_strategy: needs --eval_data_path, the records that are held out"),
        ("{} --deepspeed none.json", "no such file: none.json; --deepspeed takes zero2.json"),
        ("{} --deepspeed scripts/zero2.json", "--deepspeed needs a launcher, also for one process"),
    ],
)
def test_a_mistake_is_one_line(flags: str, line: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError) as caught:
        check_flags(flags.format(" ".join(REQUIRED)).split())
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--learning_rate=2e-5", "--max-steps", "3", "--per_device_train_batch_size", "4"],
        ["--mm_vision_select_layer", "-2", "--lora_dropout", ".1", "--seed=0"],
        ["--bf16", "--tf32", "True", "--gradient_checkpointing", "False", "--no_dataloader_pin_memory"],
        ["--no_lazy_preprocess", "--skip_broken_records", "--double_quant", "no"],
        ["--report_to", "none", "--label_names", "a", "b", "--save_strategy", "no", "--eval_strategy", "no"],
        ["--local_rank=0", "--lr_scheduler_kwargs", '{"min_lr": 1}', "--group_by_mod", "True"],
    ],
)
def test_what_transformers_takes_is_let_through(flags: list[str]):
    assert check_flags([*REQUIRED, *flags]).data_path == "d.json"


def test_a_deepspeed_file_that_is_no_json_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "zero.json").write_text('{"bf16": }')
    with pytest.raises(InputError, match=r"zero\.json is not JSON"):
        check_flags([*REQUIRED, "--deepspeed", str(tmp_path / "zero.json")])
    check_flags([*REQUIRED, "--deepspeed", '{"zero_optimization": {"stage": 2}}'])
    check_flags([*REQUIRED, "--deepspeed", str(ROOT / "scripts/zero3.json")])


def test_the_help_names_every_flag_of_the_parser():
    text = " ".join(build_parser().format_help().split())
    assert all(name in text for name in list_trainer_flags())
