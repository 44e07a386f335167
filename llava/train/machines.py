"""What one rank does for its machine, and what ranks on several machines have to agree on before they train.

Data are read, converted and checked by one rank of each machine. All look at one output folder and what it holds.

Rank 0 writes run.json, config, weights and the trainer's state; each rank writes its own part of a checkpoint
(DeepSpeed's optimizer states, the random state), and resuming reads all parts. So the output folder is one folder that
all machines see. Without checkpoints (`--save_strategy no`) it need not be: the result is on the machine of rank 0.
"""

import pickle
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import distributed

from llava.errors import InputError
from llava.files import write_text
from llava.train.arguments import TrainingArguments

Result = TypeVar("Result")
SEEN_WITHIN_SECONDS = 10.0  # a network file system shows other machines' files with a delay
POLL_SECONDS = 0.1


def once_per_machine(work: Callable[[], Result], training_args: TrainingArguments) -> Result:
    """Let the first rank of each machine do something, and hand its result to the others, which wait.

    All ranks call this at the same point.

    Args:
        work: what to do; its result can be pickled.
        training_args: which rank this is.

    Raises:
        InputError: the work raised it, on this machine or on another; every rank gets the same line.
    """
    if not _has_others():
        return work()
    outcome = (None, None)
    if training_args.local_process_index == 0:
        try:
            outcome = (pickle.dumps(work()), None)
        except InputError as error:
            outcome = (None, str(error))
    outcomes = _gather(outcome)
    for _, error in outcomes:
        if error is not None:
            raise InputError(error)
    # Ranks are numbered machine by machine.
    return pickle.loads(outcomes[training_args.process_index - training_args.local_process_index][0])


def check_alike(value: str, what: str) -> None:
    """Check that all ranks have the same value.

    Args:
        value: of this rank.
        what: it says of the ranks, for the message.

    Raises:
        InputError: two ranks differ.
    """
    if _has_others() and len(set(_gather(value))) > 1:
        raise InputError(f"{what} on different machines")


def check_shared_folder(folder: Path, training_args: TrainingArguments) -> None:
    """Check that all ranks see the same output folder, if the run writes checkpoints; all ranks have to call.

    Args:
        folder: the output folder, made on each machine.
        training_args: with the way of saving, and this rank's number.

    Raises:
        InputError: on every rank, if one of them sees another folder.
    """
    if not _has_others() or training_args.save_strategy == "no":
        return
    is_first = training_args.process_index == 0
    names = [f".seen-by-all.{secrets.token_hex(8)}"]
    distributed.broadcast_object_list(names)
    mark = folder / names[0]
    if is_first:
        write_text(mark, "")
    distributed.barrier()
    blind = [place for place, sees in _gather((_describe_rank(), _appears(mark))) if not sees]
    if is_first:
        mark.unlink(missing_ok=True)
    if blind:
        raise InputError(
            f"--output_dir {folder} is not one folder: {blind[0]} does not see what rank 0 writes there. A checkpoint "
            "has a part of every rank: use a file system that all machines share, or --save_strategy no"
        )


def agree(find: Callable[[], str | None]) -> str | None:
    """Look for something on every rank, and return it if all find the same; all ranks have to call.

    Args:
        find: looks at files; what it returns, nothing or something, is shown in the message.

    Raises:
        InputError: on every rank, if `find` raises one on any of them, or the ranks find different things.
    """
    if not _has_others():
        return find()
    found, error = None, None
    try:
        found = find()
    except InputError as refusal:
        error = str(refusal)
    answers = _gather((_describe_rank(), found, error))
    for _, _, refusal in answers:
        if refusal is not None:
            raise InputError(refusal)
    first, here, _ = answers[0]
    for place, there, _ in answers:
        if there != here:
            raise InputError(
                f"the machines see different files: {first} finds {here or 'nothing'}, {place} {there or 'nothing'}; "
                "--output_dir has to be one folder that all machines share"
            )
    return found


def _has_others() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _gather(answer: object) -> list:
    answers: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(answers, answer)
    return answers


def _describe_rank() -> str:
    return f"rank {distributed.get_rank()} on {socket.gethostname()}"


def _appears(path: Path) -> bool:
    ends = time.monotonic() + SEEN_WITHIN_SECONDS
    while not path.exists():
        if time.monotonic() > ends:
            return False
        time.sleep(POLL_SECONDS)
    return True
