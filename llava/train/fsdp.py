"""All that knows FSDP2: the ranks that it shards over, the precision of a pass, and whole weights of sharded ones.

accelerate shards the model when the trainer prepares it: each decoder layer, the embeddings and the head by themselves,
the rest (projector, newline) with the model. Trained weights are float32 masters, as without an engine; a pass gathers
them in the run's dtype. The frozen tower stays outside (`engine.detach_tower`), whole and in its own dtype.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from llava.errors import InputError
from llava.train.arguments import TrainingArguments

Value = TypeVar("Value")


def describe_ranks(training_args: TrainingArguments) -> dict[str, object]:
    """Return arguments of `Accelerator`: shard over all ranks, on the device that they compute on.

    Left to itself torch takes the device that it was built for, which this machine may not have.
    """
    return {"parallelism_config": ParallelismConfig(dp_shard_size=training_args.world_size)}


@contextmanager
def ranks_of_any_device() -> Iterator[None]:
    """Inside, an `Accelerator` shards over ranks on the CPU too, for which accelerate has DDP alone."""
    state = PartialState._shared_state
    if state.get("distributed_type") is not DistributedType.MULTI_CPU:
        yield
        return
    state["distributed_type"] = DistributedType.MULTI_GPU  # of these accelerate makes FSDP
    try:
        yield
    finally:
        if state["distributed_type"] is DistributedType.MULTI_GPU:
            state["distributed_type"] = DistributedType.MULTI_CPU


def settle_accelerator(accelerator: Accelerator, dtype: torch.dtype) -> None:
    """Set what transformers' flags cannot say, before the model is sharded.

    Args:
        accelerator: as the trainer made it.
        dtype: of a pass.

    Raises:
        InputError: accelerate would train without FSDP2.
    """
    if not accelerator.is_fsdp2:
        raise InputError(f"--fsdp True: accelerate starts {accelerator.distributed_type.value} instead of FSDP2")
    # Inputs stay as they are: the tower reads float32 pixels whatever the run computes in. Gradients are added up in
    # float32, and so is the loss.
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=None if dtype is torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # Each of the batches that are accumulated hands its gradients over; else every rank would hold them all.
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True


def reshard(model: nn.Module) -> None:
    """Give up the weights that a pass without a backward pass has gathered, which are no masters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(value: Value) -> Value:
    """Return a tensor whole if each rank holds a part of it, anything else as it is; all ranks have to call."""
    return value.full_tensor() if isinstance(value, DTensor) else value
