"""What one rank of each machine does for all of them: reading, converting and checking data before training."""

import pickle
from collections.abc import Callable
from typing import TypeVar

import torch

from llava.errors import InputError
from llava.train.arguments import TrainingArguments

Result = TypeVar("Result")


def once_per_machine(work: Callable[[], Result], training_args: TrainingArguments) -> Result:
    """Let the first rank of each machine do something, and hand its result to the others, which wait.

    All ranks call this at the same point.

    Args:
        work: what to do; its result can be pickled.
        training_args: which rank this is.

    Raises:
        InputError: the work raised it, on this machine or on another; every rank gets the same line.
    """
    if not torch.distributed.is_initialized():
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
    if torch.distributed.is_initialized() and len(set(_gather(value))) > 1:
        raise InputError(f"{what} on different machines")


def _gather(value: object) -> list:
    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered
