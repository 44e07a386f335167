"""What the log of a run says: figures that are true, one row per step, no noise, and a record of where it came from."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from llava.clock import Timeline
from llava.constants import IGNORE_INDEX
from llava.errors import InputError
from llava.train.console import COLUMNS, HEADING, format_step
from llava.train.figures import OTHER, PARTS, Meter
from llava.train.llava_trainer import LLaVATrainer
from llava.train.noise import is_noise, pass_on
from llava.train.trackers import check_trackers, check_wandb, split_names

WIDTH = 120
TRIM = {"mm_vision_token_reduce_func": "TRIM:-1"}
# All six records in one step, in which nothing is learned: every figure can be computed anew.
WHOLE = {"max_steps": 1, "per_device_train_batch_size": 6, "learning_rate": 0.0}


def records_of(trainer: LLaVATrainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# ----------------------------------------------------------------------------------------------------------- figures
@pytest.fixture
def one_step(run_training: Callable) -> LLaVATrainer:
    return run_training(**WHOLE, **TRIM)


@torch.no_grad()
def measure_alone(trainer: LLaVATrainer) -> list[tuple[bool, float, int, list[int], int]]:
    """Each sample by itself: has it an image, its summed loss, learned tokens, kept tokens per image, its length."""
    trainer.model.eval()
    found = []
    for sample in (trainer.train_dataset[index] for index in range(len(trainer.train_dataset))):
        batch = trainer.data_collator([sample])
        prompts = trainer.model.embed_prompts(
            batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"], images=batch["images"],
            image_sizes=batch["image_sizes"], texts=batch["texts"],
        )  # fmt: skip
        logits = trainer.model(inputs_embeds=prompts.embeds, attention_mask=prompts.attention_mask).logits
        targets = prompts.labels[0, 1:]
        loss = cross_entropy(logits[0, :-1], targets, ignore_index=IGNORE_INDEX, reduction="sum").item()
        image_of = prompts.image_of[0]
        kept = [int((image_of == number).sum()) for number in range(len(sample.images))]
        found.append((bool(kept), loss, int((targets != IGNORE_INDEX).sum()), kept, prompts.embeds.shape[1]))
    return found


def test_losses_by_modality_are_means_over_the_learned_tokens_of_their_samples(one_step: LLaVATrainer):
    (record,), alone = records_of(one_step), measure_alone(one_step)
    for name, kind in (("loss_image", True), ("loss_text", False)):
        parts = [(loss, tokens) for has_image, loss, tokens, _, _ in alone if has_image is kind]
        expected = sum(loss for loss, _ in parts) / sum(tokens for _, tokens in parts)
        assert record[name] == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_one_batch_is_its_modalities_losses_weighted_by_their_tokens(one_step: LLaVATrainer):
    (record,), alone = records_of(one_step), measure_alone(one_step)
    tokens = {kind: sum(own[2] for own in alone if own[0] is kind) for kind in (True, False)}
    joined = record["loss_image"] * tokens[True] + record["loss_text"] * tokens[False]
    assert joined / sum(tokens.values()) == pytest.approx(record["loss"], rel=1e-5)


def test_kept_tokens_and_padding_are_those_of_the_batch(one_step: LLaVATrainer):
    (record,), alone = records_of(one_step), measure_alone(one_step)
    kept = torch.tensor([count for own in alone for count in own[3]]).double()
    assert record["kept_tokens_mean"] == pytest.approx(kept.mean().item())
    assert record["kept_tokens_std"] == pytest.approx(kept.std(correction=0).item())
    lengths = [own[4] for own in alone]
    assert record["padding_share"] == pytest.approx(1 - sum(lengths) / (max(lengths) * len(lengths)))
    rates = record["text_tokens_per_second"] / record["visual_tokens_per_second"]
    assert rates == pytest.approx((sum(lengths) - kept.sum().item()) / kept.sum().item())


def test_without_a_reduction_every_image_keeps_all_patches(run_training: Callable):
    (record,) = records_of(run_training(**WHOLE))
    assert (record["kept_tokens_mean"], record["kept_tokens_std"]) == (36, 0)


def test_a_step_of_texts_alone_has_no_figure_of_images(
    run_training: Callable, conversations: list[dict], write_records: Callable
):
    texts = write_records([raw for raw in conversations if "image" not in raw] * 4)
    for record in records_of(run_training(data_path=texts)):
        assert record["loss_text"] == pytest.approx(record["loss"], rel=1e-5)
        assert record["visual_tokens_per_second"] == 0
        assert not {"loss_image", "kept_tokens_mean", "kept_tokens_std"} & record.keys()


def test_a_language_model_alone_has_its_figures_too(
    run_training: Callable, conversations: list[dict], write_records: Callable
):
    texts = write_records([raw for raw in conversations if "image" not in raw] * 4)
    trainer = run_training(data_path=texts, vision_tower=None, image_folder=None, gradient_accumulation_steps=2)
    for record in records_of(trainer):
        assert record["loss_text"] == pytest.approx(record["loss"], rel=1e-5)
        assert record["text_tokens_per_second"] > 0 and record["padding_share"] == 0


def test_a_record_of_several_steps_covers_all_of_them(run_training: Callable, tmp_path: Path):
    few = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "learning_rate": 0.0}
    (record,) = records_of(run_training(logging_steps=3, **few, **TRIM))
    single = records_of(run_training(logging_steps=1, output_dir=tmp_path / "single", **few, **TRIM))
    parts = [f"seconds_{name}" for name in ("data", "tower", "language_model", "optimizer", "other")]
    seconds = sum(record[name] for name in parts)
    assert record["samples_per_second"] * seconds == pytest.approx(6)
    assert sum(own["samples_per_second"] * sum(own[name] for name in parts) for own in single) == pytest.approx(6)
    assert all(record[name] > 0 for name in parts)
    assert record["eta_seconds"] == 0 and single[0]["eta_seconds"] > 0
    assert record["memory_gib"] > 0


def test_time_counts_for_the_innermost_part_and_is_never_counted_twice(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(100))
    monkeypatch.setattr("llava.clock.time.perf_counter", lambda: float(next(clock)))
    timeline = Timeline(torch.device("cpu"), PARTS, OTHER)
    timeline.enter("language_model")
    with timeline.during("tower"):
        pass
    timeline.enter("optimizer")
    timeline.enter("other")
    timeline.fold()
    taken = timeline.take()
    assert (taken["language_model"], taken["tower"], taken["optimizer"], taken["other"]) == (2, 1, 1, 0)
    timeline.enter("data")
    timeline.fold()
    assert timeline.take()["other"] == 1


def test_the_time_left_leaves_out_the_first_step_which_warms_up(monkeypatch: pytest.MonkeyPatch):
    now = iter([0.0, 60.0, 60.0, 62.0])
    monkeypatch.setattr("llava.train.figures.time.monotonic", lambda: next(now))
    meter = Meter(torch.device("cpu"))
    meter.begin(10)
    meter.end_step(11)
    assert meter.seconds_left(11, 13) == 120
    meter.end_step(12)
    assert meter.seconds_left(12, 13) == 2


# ------------------------------------------------------------------------------------------------------------ screen
@pytest.mark.parametrize("size", [0.0, 1.0, 123.456, 1e5, 1e9])
def test_a_row_fits_120_columns_under_its_heading(size: float):
    names = ("loss", "loss_image", "loss_text", "learning_rate", "visual_tokens_per_second", "text_tokens_per_second")
    record = dict.fromkeys([*names, "samples_per_second"], size) | {
        "kept_tokens_mean": min(size, 2880), "kept_tokens_std": min(size, 999), "padding_share": min(size, 1.0),
        "memory_gib": min(size, 999), "eta_seconds": min(size, 3.6e7),
    }  # fmt: skip
    record |= {f"seconds_{name}": size for name in ("data", "tower", "language_model", "optimizer", "other", "pause")}
    for step, last in ((1, 9), (123456, 5000000), (10**9, 10**9)):
        row = format_step(record, step, last)
        assert len(row) <= WIDTH and len(row) == len(HEADING)
        assert len(row.split()) == len(COLUMNS) + 1, "two figures touch"


def test_a_figure_that_a_step_has_not_is_a_dash():
    assert format_step({"loss": 1.0}, 3, 9).split() == ["3/9", "1.0000", *["-"] * (len(COLUMNS) - 1)]


def test_the_screen_has_one_row_per_logging_step(run_training: Callable, capsys: pytest.CaptureFixture):
    run_training(max_steps=3, disable_tqdm=None)
    printed = capsys.readouterr()
    rows = [line for line in printed.out.splitlines() if line.split()[0] in ("1/3", "2/3", "3/3")]
    assert len(rows) == 3 and printed.out.count(HEADING) == 1
    assert "| 1/3 [" not in printed.err and "{'loss'" not in printed.out


@pytest.mark.parametrize(
    "line",
    [
        "[2026-01-01 10:00:00,000] [INFO] [launch.py:152:main] WORLD INFO DICT: {'localhost': [0, 1]}",
        "[2026-01-01 10:00:00,000] [WARNING] [runner.py:214:fetch_hostfile] Unable to find hostfile, will proceed with "
        "training with local resources only.",
        "/x/transformers/training_args.py:1541: FutureWarning: `gradient_checkpointing` is deprecated",
        "  warnings.warn(f'`{old}` is deprecated', FutureWarning)",
        "/x/device_mesh.py:746: UserWarning: Slicing a flattened dim from root mesh will be deprecated in PT 2.11. ",
        "  sliced_mesh_layout = self._get_slice_mesh_layout(mesh_dim_names)",
        "[transformers] When using FSDP, prefer `activation_checkpointing` in `fsdp_config` over `gradient_check...`",
        "\rWriting model shards: 100%|██████████| 1/1 [00:00<00:00, 156.30it/s]\n",
    ],
)
def test_what_libraries_say_to_their_authors_is_noise(line: str):
    assert is_noise(line)


@pytest.mark.parametrize(
    "line",
    [
        "error: no such file: x.json",
        "Traceback (most recent call last):",
        '  File "train.py", line 3, in <module>',
        "[2026-01-01 10:00:00,000] [WARNING] [stage3.py:10:step] loss scale is too small",
        "[2026-01-01 10:00:00,000] [ERROR] [launch.py:325:sigkill_handler] exits with return code = 1",
        "/x/torch/nn.py:5: UserWarning: something is slow",
        HEADING,
        "trained: checkpoints/try",
    ],
)
def test_whatever_may_concern_a_user_is_shown(line: str):
    assert not is_noise(line)


def test_a_screen_that_is_gone_does_not_stop_whoever_writes():
    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None: ...

    lines = iter(["a\n", "b\n"])
    pass_on(lines, Gone())
    assert next(lines, None) is None


def test_the_filter_passes_bytes_of_any_kind_on_and_leaves_noise_out():
    text = b"[2026-01-01 10:00:00,000] [INFO] [a.py:1:b] x\nkept 12\xc2\xb13 \xff\n"
    code = "from llava.train.noise import main; main()"
    done = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, check=True)
    assert done.stdout.startswith("kept 12±3 ".encode()) and b"INFO" not in done.stdout


# ---------------------------------------------------------------------------------------------------------- run.json
def test_run_json_says_where_the_run_came_from_and_what_came_of_it(run_training: Callable, tmp_path: Path):
    trainer = run_training(run_name="mine", **TRIM)
    content = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    assert content["flags"]["run_name"] == "mine" and content["flags"]["max_steps"] == 2
    assert "hub_token" not in content["flags"]
    assert content["data"]["records"] == 6 and content["data"]["images"] == 5
    assert content["data"]["fingerprint"] == content["contents"]["data_path"]["fingerprint"]
    (start,) = content["starts"]
    assert start["started"] <= start["ended"]
    assert start["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"python", "transformers"} <= start["versions"].keys() and start["hardware"]["ranks"] == 1
    assert content["figures"]["last_step"] == records_of(trainer)[-1]
    assert content["figures"]["whole"]["train_loss"] > 0


def test_run_json_keeps_every_start_of_a_run_that_goes_on(run_training: Callable, tmp_path: Path):
    saved = {"save_strategy": "steps", "save_steps": 1, **TRIM}
    run_training(**saved)
    file = tmp_path / "run/run.json"
    before = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(before | {"finished": False}), encoding="utf-8")
    run_training(**saved)
    starts = json.loads(file.read_text(encoding="utf-8"))["starts"]
    assert len(starts) == 2 and starts[0] == before["starts"][0]


# ---------------------------------------------------------------------------------------------------------- trackers
@pytest.fixture
def all_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every tracker's package seems to be there, and nobody is logged in anywhere."""
    monkeypatch.setattr("llava.train.trackers.importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "HF_TOKEN", "HF_HOME", "NETRC", "RANK"):
        monkeypatch.delenv(name, raising=False)


def test_names_of_trackers_come_with_commas_or_spaces():
    assert split_names(["tensorboard,wandb", "trackio"]) == ["tensorboard", "wandb", "trackio"]


def test_a_tracker_that_would_ask_for_a_login_is_refused_with_the_mend(all_installed: None, tmp_path: Path):
    with pytest.raises(
        InputError, match=r"--report_to wandb: no key for api\.wandb\.ai: run `wandb login`, set WANDB_"
    ):
        check_trackers(["tensorboard", "wandb"], str(tmp_path))
    with pytest.raises(InputError, match=r"--trackio_space_id me/x: no token of the hub: run `hf auth login`"):
        check_trackers(["trackio"], str(tmp_path), "me/x")
    check_trackers(["trackio"], str(tmp_path))


@pytest.mark.parametrize(
    "environment",
    [{"WANDB_API_KEY": "k"}, {"WANDB_MODE": "offline"}, {"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"}],
)
def test_a_tracker_with_a_key_or_offline_may_start(environment: dict, all_installed: None):
    check_wandb(environment)


def test_a_key_in_netrc_and_the_settings_of_wandb_offline_count(all_installed: None, tmp_path: Path):
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password k\n")
    check_wandb({})
    with pytest.raises(InputError, match=r"no key for wandb\.example\.org"):
        check_wandb({"WANDB_BASE_URL": "https://wandb.example.org"})
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/settings").write_text("[default]\nmode = offline\n")
    check_wandb({"WANDB_BASE_URL": "https://wandb.example.org"})


def test_a_folder_that_tensorboard_cannot_make_is_refused(
    all_installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file/logs"))
    with pytest.raises(InputError, match=r"--report_to tensorboard: cannot write .*file/logs: .*file is not a folder"):
        check_trackers(["tensorboard"], str(tmp_path))


def test_none_stands_alone():
    with pytest.raises(InputError, match=r"--report_to none,wandb: none and all stand alone"):
        check_trackers(["none", "wandb"], ".")
