"""All that knows DeepSpeed: starting it, partitioned weights, and ending it; and what it shares with FSDP2.

The same calls serve eight GPUs and two CPU ranks. Frozen towers stay outside either engine, see `detach_tower`.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from llava.errors import InputError
from llava.model.language_model.causal import LlavaCausalLM
from llava.train.arguments import TrainingArguments

# gloo's thread may release its last work object while Python shuts down, which aborts a process that has finished;
# a short wait avoids it.
GLOO_REST_SECONDS = 0.5


def start_engine(dtype: torch.dtype) -> None:
    """Let DeepSpeed take over the process group, so that ZeRO-3 knows the number of ranks when weights are loaded.

    Args:
        dtype: what the run computes in.

    Raises:
        InputError: DeepSpeed does not compute in this dtype on this device.
    """
    import deepspeed

    check_precision(dtype)
    if not torch.accelerator.is_available():
        # Used for inference only, but would be compiled here, and not every machine has a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()


def check_precision(dtype: torch.dtype) -> None:
    """Check that DeepSpeed computes in a dtype on this device; its own check comes after the weights are loaded.

    Args:
        dtype: float32, bfloat16 or float16.

    Raises:
        InputError: it does not; names what it does instead.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    # DeepSpeed answers None for "no" where the processor has no half-precision matrix products.
    is_supported = {
        torch.float32: True,
        torch.bfloat16: bool(accelerator.is_bf16_supported()),
        torch.float16: bool(accelerator.is_fp16_supported()),
    }
    if is_supported[dtype]:
        return
    name, other, other_dtype = (
        ("fp16", "bf16", torch.bfloat16) if dtype is torch.float16 else ("bf16", "fp16", torch.float16)
    )
    instead = f"--{other} True (scripts: PRECISION={other}), or " if is_supported[other_dtype] else ""
    raise InputError(
        f"--{name} True: DeepSpeed does not compute in {name} on this {accelerator.device_name()} device; "
        f"use {instead}float32, without either flag (scripts: PRECISION=fp32)"
    )


def zero_stage(training_args: TrainingArguments) -> str | None:
    """Name the ZeRO stage of a run; None without DeepSpeed."""
    if not training_args.runs_deepspeed:
        return None
    settings = training_args.deepspeed_plugin.hf_ds_config.config
    return f"ZeRO-{settings.get('zero_optimization', {}).get('stage', 0)}"


def leave_engine() -> None:
    """End the process group, if there is one, when every rank has finished."""
    if not torch.distributed.is_initialized():
        return
    torch.distributed.barrier()
    if torch.distributed.get_backend() == "gloo":
        time.sleep(GLOO_REST_SECONDS)
    torch.distributed.destroy_process_group()


def is_partitioned() -> bool:
    """Whether this run's weights are partitioned over the ranks (ZeRO-3)."""
    return is_deepspeed_zero3_enabled()


def calls_head_once(training_args: TrainingArguments) -> bool:
    """Whether ranks gather the output head's weights together, and so have to call it equally often."""
    return is_partitioned() or training_args.runs_fsdp


@contextmanager
def whole_weights() -> Iterator[None]:
    """Inside this context, models are loaded whole on every rank, also under ZeRO-3."""
    if not is_partitioned():
        yield
        return
    from transformers.integrations import deepspeed as integration

    settings = integration._hf_deepspeed_config_weak_ref()
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(settings)


def gathered(parameters: Iterable[nn.Parameter], writable: bool = False) -> AbstractContextManager:
    """Return a context in which partitioned parameters are whole; all ranks have to enter it.

    Args:
        parameters: partitioned or not.
        writable: what rank 0 writes into them is kept.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if writable else None)


def detach_tower(model: LlavaCausalLM, device: torch.device) -> None:
    """Take the frozen tower out of the module tree, so that the engine does not find it; the model still uses it.

    DeepSpeed and FSDP2 would cast its weights to the run's dtype, and patches would be chosen by other scores than at
    inference; ZeRO-3 and FSDP2 would also partition them, and gather them again for every image.

    Args:
        model: with a loaded tower.
        device: this rank's; nothing else moves the tower from now on.
    """
    inner = model.get_model()
    tower = inner.get_vision_tower()
    del inner.vision_tower
    object.__setattr__(inner, "vision_tower", tower.to(device))
    newline = getattr(inner, "image_newline", None)
    if newline is not None and is_partitioned():
        import deepspeed

        # It is read in the outer module's forward pass, not in that of the module that owns it.
        deepspeed.zero.register_external_parameter(model, newline)
