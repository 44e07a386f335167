"""FSDP2 on two CPU ranks equals one process in losses, weights and files; what it cannot do is refused at once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava import Llava
from llava.errors import InputError
from llava.train.engine_flags import read_fsdp
from llava.train.flags import check_flags
from tests.families import write_checkpoint
from tests.train.scenarios import LIMIT_SECONDS, LLM, LORA, ROOT, furthest, losses, read_result, stage_1, weights

FSDP = {"fsdp": True, "fsdp_config": ROOT / "scripts/fsdp2.json"}
OLD = {"fsdp": "full_shard auto_wrap", "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
NUM_STEPS, STOPPED_AT = 6, 3
KINDS = ("full", "lora", "stage1", "tied-and-all")
REQUIRED = ["--model_name_or_path", "m", "--data_path", "d.json"]
TOKENS = {"mm_use_im_start_end": True, "pretrain_mm_mlp_adapter": None}


@pytest.fixture(scope="module")
def runs(run_ranks: Callable, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each with FSDP2 on two ranks, and as one process that accumulates two samples; LoRA is stopped and goes on."""
    whole = {"data_path": data["mixed"], "max_steps": NUM_STEPS, "group_by_modality_length": True}
    few = {"data_path": data["mixed"], "max_steps": 4}
    tied = write_checkpoint(tmp_path_factory.mktemp("tied") / "model", "qwen", is_llava=False)
    everything = few | {
        "model_name_or_path": tied, "version": "qwen_2", "pretrain_mm_mlp_adapter": None,
        "per_device_train_batch_size": 2, "packing": True, "group_by_modality_length": True, "max_grad_norm": 0.5,
        "mm_projector_lr": 1e-4, "eval_data_path": data["held_out"], "per_device_eval_batch_size": 2, "max_steps": 2,
    }  # fmt: skip
    kinds = {
        "full": whole,
        "lora": few | LORA,
        "stage1": stage_1(data) | TOKENS | {"max_steps": 4},
        "tied-and-all": everything,
    }
    scenarios = []
    for name, flags in kinds.items():
        accumulated = 4 if name == "tied-and-all" else 2
        alone = flags | {"gradient_accumulation_steps": accumulated}
        sharded = (
            flags | FSDP | {"gradient_accumulation_steps": accumulated // 2, "gradient_checkpointing": name != "full"}
        )
        scenarios += [{"name": f"{name}-one", "ranks": 1, "flags": alone}]
        if name == "lora":
            scenarios += [{"name": "lora-begun", "folder": "lora", "flags": sharded, "stop_at": STOPPED_AT - 1}]
        scenarios += [{"name": name, "flags": sharded}]
    scenarios += [
        {"name": "bf16", "flags": whole | FSDP | {"bf16": True, "max_steps": 4}},
        {"name": "stopped", "flags": whole | OLD, "stop_at": STOPPED_AT - 1},
        {"name": "went-on", "folder": "stopped", "flags": whole | FSDP},
    ]
    return run_ranks(scenarios)


# --------------------------------------------------------------------------------------------------- what is trained
@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_SECONDS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_one_process(kind: str, runs: Path):
    assert losses(runs, kind) == pytest.approx(losses(runs, f"{kind}-one"), abs=1e-5)
    assert len(losses(runs, kind)) == {"full": NUM_STEPS, "tied-and-all": 2}.get(kind, 4)
    sharded, alone = (read_result(runs, name)["log"] for name in (kind, f"{kind}-one"))
    for key, tolerance in {"grad_norm": 1e-4, "eval_loss": 1e-5, "kept_tokens_mean": 1e-9}.items():
        pairs = [[entry[key] for entry in log if key in entry] for log in (sharded, alone)]
        assert pairs[0] == pytest.approx(pairs[1], rel=tolerance)


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_SECONDS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_holds_about_half_of_the_weights(kind: str, runs: Path):
    assert read_result(runs, kind)["held_share"] == pytest.approx(0.5, abs=0.02)
    assert read_result(runs, f"{kind}-one")["held_share"] == 1


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_SECONDS)
@pytest.mark.parametrize("kind", KINDS)
def test_files_are_those_of_one_process(kind: str, runs: Path, golden: Path, checkpoints: Path):
    names = [
        {path.name for path in (runs / name).iterdir() if path.is_file()} - {"README.md"}
        for name in (kind, f"{kind}-one")
    ]
    assert names[0] == names[1]
    configs = [json.loads((runs / name / "config.json").read_text(encoding="utf-8")) for name in (kind, f"{kind}-one")]
    assert configs[0]["architectures"] == configs[1]["architectures"]
    files = {"lora": ("adapter_model.safetensors", "non_lora_trainables.bin"), "stage1": ("mm_projector.bin",)}
    for file in files.get(kind, ("model.safetensors",)):
        load = load_file if file.endswith("safetensors") else lambda path: torch.load(path, weights_only=True)
        saved, alone = (load(runs / name / file) for name in (kind, f"{kind}-one"))
        assert furthest(saved, alone) < 1e-5
        assert {value.dtype for value in saved.values()} == {torch.float32}
    if kind != "stage1":
        llava = Llava.from_pretrained(runs / kind, base=LLM if kind == "lora" else None, device="cpu")
        answer = llava.ask(golden / "data/images/tall_shapes.png", "Who?", max_new_tokens=2)
        assert 0 < answer.num_tokens < answer.num_patches


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_SECONDS)
def test_a_16_bit_run_keeps_the_same_patches_and_saves_16_bit(runs: Path):
    scores, expected = (read_result(runs, name)["scores"] for name in ("bf16", "full"))
    assert scores and scores == expected[: len(scores)]  # bit for bit: the tower runs in float32
    assert len(losses(runs, "bf16")) == 4
    assert {value.dtype for value in weights(runs, "bf16").values()} == {torch.bfloat16}


# ---------------------------------------------------------------------------------------------------------- resuming
@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_SECONDS)
def test_a_run_that_a_signal_stopped_goes_on_as_if_it_had_not_been(runs: Path):
    assert len(losses(runs, "stopped")) == len(losses(runs, "lora-begun")) == STOPPED_AT
    assert losses(runs, "went-on") == pytest.approx(losses(runs, "full"), abs=1e-6)
    assert furthest(weights(runs, "stopped"), weights(runs, "full")) < 1e-6


# ---------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--fsdp True --deepspeed scripts/zero2.json", "--fsdp and --deepspeed: choose one engine"),
        (
            "--fsdp True --bits 4 --lora_enable True",
            "--bits 4: FSDP2 does not shard quantised weights here; --deepspeed",
        ),
        ("--fsdp True --fp16 True", "--fp16 True: with --fsdp use --bf16 True (scripts: PRECISION=bf16), or float32"),
        ("--fsdp hybrid_shard", "--fsdp hybrid_shard: expected True, or of FSDP1's words full_shard, shard_grad_op,"),
        ("--fsdp --fsdp_config none.json", "no such file: none.json; --fsdp_config takes scripts/fsdp2.json"),
        ('--fsdp --fsdp_config {"version":1}', "--fsdp_config: version: expected 2, not 1: FSDP1 is not supported"),
        (
            '--fsdp --fsdp_config {"fsdp_state_dict_type":"SHARDED_STATE_DICT"}',
            '--fsdp_config: fsdp_state_dict_type: expected "FULL_STATE_DICT", not "SHARDED_STATE_DICT": checkpoints',
        ),
        ('--fsdp --fsdp_config {"reshard_after_forward":1}', "--fsdp_config: reshard_after_forward: expected true or"),
        ('--fsdp --fsdp_config {"shard":1}', "--fsdp_config: there is no setting shard; expected reshard_after_for"),
        ("--fsdp --fsdp_config []", "no such file: []"),
        ("--fsdp_config scripts/fsdp2.json", "--fsdp_config scripts/fsdp2.json: add --fsdp True, or leave it out"),
    ],
)
def test_what_cannot_be_is_one_line(flags: str, line: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as caught:
        check_flags([*REQUIRED, *flags.split()])
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_an_older_accelerate_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("llava.train.engine_flags.version", lambda name: "1.15.0")
    check_flags([*REQUIRED, "--fsdp", "True"])
    monkeypatch.setattr("llava.train.engine_flags.version", lambda name: "1.14.0")
    with pytest.raises(InputError, match=r"--fsdp needs accelerate 1\.15, here is 1\.14\.0: pip install -U accelerate"):
        check_flags([*REQUIRED, "--fsdp", "True"])


def test_fsdp_by_accelerates_launcher_alone_is_told_what_to_add(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"add --fsdp True --fsdp_config scripts/fsdp2\.json"):
        check_flags(REQUIRED)


@pytest.mark.parametrize(
    ("given", "reshard"),
    [
        ("True", True),
        (True, True),
        ([], True),
        ("full_shard auto_wrap", True),
        (["full_shard", "auto_wrap"], True),
        ("shard_grad_op auto_wrap", False),
    ],
)
def test_fsdp1s_words_mean_what_they_meant(given: str | bool | list[str], reshard: bool):
    settings = {"fsdp_transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    assert read_fsdp(given, settings)["reshard_after_forward"] is reshard
    assert read_fsdp(given, {"reshard_after_forward": False})["reshard_after_forward"] is False


@pytest.mark.parametrize("given", [None, False, "", "False", [""], ["no"]])
def test_fsdp_is_off_where_it_is_not_asked_for(given: str | bool | list[str] | None):
    assert read_fsdp(given, None) is None
