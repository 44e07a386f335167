"""Where an interrupted run resumes, from folders as a run leaves them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.train.checkpoint import find_last_checkpoint


@pytest.fixture
def leave(tmp_path: Path) -> Callable[..., Path]:
    """Make a checkpoint folder; with ranks, as DeepSpeed leaves it."""

    def make(name: str, state: str = "{}", ranks: int = 0) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state)
        if ranks:
            (folder / "latest").write_text("global_step7\n")
            (folder / "global_step7").mkdir()
            for rank in range(ranks):
                (folder / "global_step7" / f"zero_pp_rank_{rank}_optim_states.pt").touch()
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
    whole, cut = leave("checkpoint-4"), leave("checkpoint-8")
    (cut / "trainer_state.json").write_bytes(state.encode("utf-8", "surrogateescape"))
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
