"""Where an interrupted run resumes, from folders as a run leaves them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava.errors import InputError
from llava.train.checkpoint import FSDP, data_only, drop_second_names, find_last_checkpoint
from tests.families import build_language_model


@pytest.fixture
def leave(tmp_path: Path) -> Callable[..., Path]:
    """Make a checkpoint folder; with ranks, as DeepSpeed leaves it."""

    def make(name: str, state: str = '{"global_step": 4}', ranks: int = 0) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state)
        save_file({"lm_head.weight": torch.zeros(9)}, folder / "model.safetensors")
        for rank in range(ranks):
            torch.save({"python": (3, (1, 2), None)}, folder / f"rng_state_{rank}.pth")
        if not ranks:
            torch.save({"state": {}}, folder / "optimizer.pt")
            torch.save({"last_epoch": 4}, folder / "scheduler.pt")
            torch.save({"python": (3, (1, 2), None)}, folder / "rng_state.pth")
            return folder
        (folder / "latest").write_text("global_step7\n")
        parts = folder / "global_step7"
        parts.mkdir()
        torch.save({"module": torch.zeros(9)}, parts / "mp_rank_00_model_states.pt")
        for rank in range(ranks):
            torch.save({"state": torch.zeros(9)}, parts / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        return folder

    return make


def test_a_fresh_folder_has_none(tmp_path: Path):
    assert find_last_checkpoint(str(tmp_path), None) is None
    assert find_last_checkpoint(str(tmp_path / "absent"), None) is None


def test_the_highest_step_is_the_last(leave: Callable, tmp_path: Path):
    last = [leave(f"checkpoint-{step}") for step in (900, 10000, 9999)][1]
    for other in ("checkpoint-old", "checkpoint-20000-copy", "run"):
        leave(other)
    assert find_last_checkpoint(str(tmp_path), None) == str(last)


@pytest.mark.parametrize("state", ["", '{"global_step": 12', "\udcff"])
def test_a_checkpoint_that_was_cut_off_is_not_used(state: str, leave: Callable, tmp_path: Path):
    whole, broken = leave("checkpoint-4"), leave("checkpoint-8")
    (broken / "trainer_state.json").write_bytes(state.encode("utf-8", "surrogateescape"))
    assert find_last_checkpoint(str(tmp_path), None) == str(whole)


@pytest.mark.parametrize(
    ("written_by", "num_ranks", "line"),
    [
        (0, 2, "was not written by DeepSpeed, this run has --deepspeed"),
        (2, None, "was written by DeepSpeed, this run has no --deepspeed"),
        (2, 4, "was written by 2 ranks, this run has 4"),
    ],
)
def test_a_checkpoint_of_another_engine_is_refused(
    written_by: int, num_ranks: int | None, line: str, leave: Callable, tmp_path: Path
):
    leave("checkpoint-4", ranks=written_by)
    with pytest.raises(InputError, match=rf"checkpoint-4 {line}: start with the same settings as before, or"):
        find_last_checkpoint(str(tmp_path), num_ranks)


def test_a_checkpoint_of_as_many_ranks_is_taken(leave: Callable, tmp_path: Path):
    folder = leave("checkpoint-4", ranks=2)
    assert find_last_checkpoint(str(tmp_path), 2) == str(folder)


# ---------------------------------------------------------------------------------------------------------- FSDP2's
@pytest.fixture
def leave_sharded(leave: Callable) -> Callable[..., Path]:
    """Make a checkpoint folder as two ranks of FSDP2 leave it."""

    def make(name: str) -> Path:
        folder = leave(name)
        (folder / "optimizer.pt").rename(folder / "optimizer.bin")
        torch.save({"lm_head.weight": torch.zeros(9)}, folder / "pytorch_model_fsdp.bin")
        (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
        torch.save({"python": (3, (1, 2), None)}, folder / "rng_state_1.pth")
        return folder

    return make


def test_fsdps_checkpoint_is_taken_by_as_many_ranks_of_it(leave_sharded: Callable, tmp_path: Path):
    folder = leave_sharded("checkpoint-4")
    assert find_last_checkpoint(tmp_path, 2, engine=FSDP) == str(folder)
    with pytest.raises(InputError, match=r"checkpoint-4 was written by 2 ranks, this run has 4: start with"):
        find_last_checkpoint(tmp_path, 4, engine=FSDP)
    with pytest.raises(InputError, match=r"checkpoint-4 was written by FSDP2, this run has no --fsdp: start with"):
        find_last_checkpoint(tmp_path, 2)
    with pytest.raises(InputError, match=r"checkpoint-4 was written by FSDP2, this run has no --fsdp: start with"):
        find_last_checkpoint(tmp_path, None)


@pytest.mark.parametrize(
    ("ranks", "line"),
    [
        (0, "was not written by FSDP2, this run has --fsdp"),
        (2, "was written by DeepSpeed, this run has no --deepspeed"),
    ],
)
def test_fsdp_goes_on_from_no_other_checkpoint(ranks: int, line: str, leave: Callable, tmp_path: Path):
    leave("checkpoint-4", ranks=ranks)
    with pytest.raises(InputError, match=rf"checkpoint-4 {line}: start with the same settings as before, or"):
        find_last_checkpoint(tmp_path, 2, engine=FSDP)


@pytest.mark.parametrize("name", ["pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt"])
def test_what_fsdps_checkpoint_lacks_is_named(
    name: str, leave_sharded: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    whole, broken = leave_sharded("checkpoint-4"), leave_sharded("checkpoint-8")
    (broken / name).unlink()
    assert find_last_checkpoint(tmp_path, 2, engine=FSDP) == str(whole)
    assert f"{broken} is not used: it has no {name}" in caplog.text


@pytest.mark.parametrize("name", ["pytorch_model_fsdp.bin", "optimizer.bin"])
def test_a_payload_in_fsdps_checkpoint_does_not_run(name: str, leave_sharded: Callable, tmp_path: Path):
    torch.save({"state": Payload(tmp_path / "ran")}, leave_sharded("checkpoint-4") / name)
    with pytest.raises(InputError, match=rf"{name} holds code \(posix.mkdir\) and is not loaded"):
        find_last_checkpoint(tmp_path, 2, engine=FSDP)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------- broken ones are passed over
def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda folder: cut(folder / "model.safetensors"), "its model.safetensors is cut off or damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "it has no model.safetensors"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "has no optimizer state (optimizer.pt, scheduler.pt)"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "has no optimizer state (optimizer.pt, scheduler.pt)"),
        (lambda folder: cut(folder / "optimizer.pt"), "its optimizer.pt is cut off or damaged"),
        (lambda folder: (folder / "optimizer.pt").write_bytes(b""), "its optimizer.pt is cut off or damaged"),
        (lambda folder: (folder / "rng_state.pth").unlink(), "it has no random state (rng_state.pth)"),
        (lambda folder: (folder / "trainer_state.json").unlink(), "its trainer_state.json, which is written last"),
        (lambda folder: (folder / "trainer_state.json").write_text("[]"), "its trainer_state.json has no global_step"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "b.safetensors"}}'
            ),
            "it has no b.safetensors",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
            "its model.safetensors.index.json is damaged",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "it has no non_lora_trainables.bin"),
    ],
)
def test_a_broken_newest_checkpoint_is_named_and_the_older_one_taken(
    damage: Callable[[Path], None], fault: str, leave: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    whole, broken = leave("checkpoint-4"), leave("checkpoint-8")
    damage(broken)
    assert find_last_checkpoint(str(tmp_path), None) == str(whole)
    assert f"{broken} is not used: {fault}" in caplog.text


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", "it holds the optimizer states of 1 of 2 ranks"),
        ("mp_rank_00_model_states.pt", "its global_step7 has no weights"),
    ],
)
def test_a_broken_deepspeed_checkpoint_is_named_and_the_older_one_taken(
    damage: str, fault: str, leave: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    whole, broken = leave("checkpoint-4", ranks=2), leave("checkpoint-8", ranks=2)
    (broken / "global_step7" / damage).unlink()
    assert find_last_checkpoint(str(tmp_path), 2) == str(whole)
    assert f"{broken} is not used: {fault}" in caplog.text
    cut(whole / "global_step7/mp_rank_00_model_states.pt")
    assert find_last_checkpoint(str(tmp_path), 2) is None
    assert f"{whole} is not used: its global_step7/mp_rank_00_model_states.pt is cut off or damaged" in caplog.text


def test_without_any_optimizer_state_a_run_resumes_only_when_told_to(leave: Callable, tmp_path: Path):
    folder = leave("checkpoint-4")
    (folder / "optimizer.pt").unlink()
    with pytest.raises(InputError, match=r"checkpoint-4 has no optimizer state .*: --resume_anyway True goes on"):
        find_last_checkpoint(str(tmp_path), None)
    assert find_last_checkpoint(str(tmp_path), None, resume_anyway=True) == str(folder)


def test_a_checkpoint_of_another_kind_of_training_is_refused(leave: Callable, tmp_path: Path):
    leave("checkpoint-4")
    with pytest.raises(InputError, match="checkpoint-4 was trained without LoRA, this run trains with it: start with"):
        find_last_checkpoint(str(tmp_path), None, is_lora=True, resume_anyway=True)


# --------------------------------------------------------------------------------------------- no code in checkpoints
class Payload:
    """Pickled, it makes a folder when it is unpickled."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        (2, "global_step7/mp_rank_00_model_states.pt"),
        (2, "global_step7/zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        (2, "rng_state_1.pth"),
        (0, "optimizer.pt"),
        (0, "scheduler.pt"),
        (0, "rng_state.pth"),
        (0, "scaler.pt"),
        (0, "pytorch_model.bin"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_planted_payload_does_not_run_and_the_run_is_refused(
    ranks: int, name: str, protocol: int, leave: Callable, tmp_path: Path
):
    folder = leave("checkpoint-4", ranks=ranks)
    torch.save({"module": Payload(tmp_path / "ran")}, folder / name, pickle_protocol=protocol)
    with pytest.raises(InputError, match=r"(holds code \(posix.mkdir\)|is not a checkpoint file).*") as caught:
        find_last_checkpoint(str(tmp_path), ranks or None)
    assert folder.name in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_no_library_unpickles_code_while_a_run_resumes(tmp_path: Path):
    torch.save({"a": Payload(tmp_path / "ran")}, tmp_path / "state.pt")
    with data_only(), pytest.raises(InputError, match=r"state\.pt holds more than data and is not loaded"):
        torch.load(tmp_path / "state.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()
    torch.save({"a": torch.ones(2)}, tmp_path / "state.pt")
    with data_only():
        assert torch.load(tmp_path / "state.pt", weights_only=False)["a"].tolist() == [1, 1]


@pytest.mark.parametrize(("name", "dropped"), [("qwen", {"lm_head.weight"}), ("qwen2", set())])
def test_of_tied_weights_that_were_copied_one_name_is_saved(name: str, dropped: set[str]):
    model = build_language_model(name)
    copied = {key: value.clone() for key, value in model.state_dict().items()}
    assert copied.keys() - drop_second_names(model, copied).keys() == dropped
