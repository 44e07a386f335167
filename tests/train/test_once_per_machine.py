"""One rank of each machine works for all of them; a mistake that one finds, all report."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava.errors import InputError
from llava.train.machines import check_alike, once_per_machine

RANKS_PER_MACHINE = 2
NUM_RANKS = 4


@pytest.fixture
def on_ranks(tmp_path: Path) -> Callable[[Callable[[SimpleNamespace], object]], list]:
    """Run something on four ranks of two machines, forked from here, and return what each gave or raised."""

    def run(work: Callable[[SimpleNamespace], object]) -> list:
        children = []
        for rank in range(NUM_RANKS):
            child = os.fork()
            if child == 0:
                run_rank(work, rank, tmp_path)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]

    return run


def run_rank(work: Callable, rank: int, folder: Path) -> None:
    try:
        address = f"file://{folder / 'meeting'}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=NUM_RANKS)
        arguments = SimpleNamespace(process_index=rank, local_process_index=rank % RANKS_PER_MACHINE)
        try:
            result = work(arguments)
        except InputError as error:
            result = f"error: {error}"
        (folder / f"{rank}.json").write_text(json.dumps(result))
        torch.distributed.barrier()
    finally:
        os._exit(0)  # no interpreter shutdown, in which gloo's threads may abort


def test_the_first_rank_of_each_machine_works_and_the_others_get_its_result(on_ranks: Callable):
    found = on_ranks(lambda arguments: once_per_machine(lambda: [os.getpid(), arguments.process_index], arguments))
    assert [rank for _, rank in found] == [0, 0, 2, 2]
    assert found[0] == found[1] and found[2] == found[3] and found[0][0] != found[2][0]


def test_a_mistake_on_one_machine_is_the_same_line_on_all_ranks(on_ranks: Callable):
    def work(arguments: SimpleNamespace) -> object:
        def look() -> str:
            if arguments.process_index == 2:
                raise InputError("no image file a.png")
            return "fine"

        return once_per_machine(look, arguments)

    assert on_ranks(work) == ["error: no image file a.png"] * NUM_RANKS


def test_machines_with_different_records_are_refused(on_ranks: Callable):
    found = on_ranks(lambda arguments: check_alike(str(arguments.process_index // 2), "--data_path x: other records"))
    assert found == ["error: --data_path x: other records on different machines"] * NUM_RANKS


def test_a_single_process_works_by_itself():
    assert once_per_machine(lambda: "done", SimpleNamespace()) == "done"
    check_alike("value", "anything")
