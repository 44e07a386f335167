"""DeepSpeed, kept in one place: started, asked whether weights are partitioned, and left.

The same calls serve eight GPUs and two CPU ranks. Frozen towers stay outside of the engine, see `detach_tower`.
"""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from llava.errors import InputError
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

# The run-loop thread of gloo may drop its last work object while Python shuts down, which aborts the process after
# everything is done; a moment of rest avoids it.
GLOO_REST_SECONDS = 0.5


def check_engine(path: object) -> None:
    """Check what `--deepspeed` says, before anything is started with it.

    Args:
        path: the flag's value; a JSON file, or the JSON itself.

    Raises:
        InputError: no such file, or this process was not started by a launcher.
    """
    if isinstance(path, str) and not path.lstrip().startswith("{") and not Path(path).is_file():
        raise InputError(
            f"--deepspeed {path}: no such file; scripts/ has zero2.json, zero3.json and zero3_offload.json"
        )
    if "RANK" not in os.environ:
        raise InputError(
            "--deepspeed needs a launcher, also for one process: `deepspeed --num_gpus 1 llava/train/train_mem.py ...`"
        )


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
        # Serves inference only, but would be compiled here, for which not every machine has a compiler.
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


def leave_engine() -> None:
    """End the process group, if there is one, when every rank is done."""
    if not torch.distributed.is_initialized():
        return
    torch.distributed.barrier()
    if torch.distributed.get_backend() == "gloo":
        time.sleep(GLOO_REST_SECONDS)
    torch.distributed.destroy_process_group()


def is_partitioned() -> bool:
    """Tell whether this run's weights are spread over the ranks (ZeRO-3)."""
    return is_deepspeed_zero3_enabled()


@contextmanager
def whole_weights() -> Iterator[None]:
    """While inside, models are loaded whole on every rank, also under ZeRO-3."""
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


def gathered(parameters: Iterable[nn.Parameter], writable: bool = False) -> object:
    """Return a context in which partitioned parameters are whole; all ranks have to enter it.

    Args:
        parameters: partitioned or not.
        writable: keep what rank 0 writes into them.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if writable else None)


def detach_tower(model: LlavaLlamaForCausalLM, device: torch.device) -> None:
    """Take the frozen tower out of the module tree, where the engine does not see it; the model goes on using it.

    Inside, DeepSpeed would cast its weights to the run's dtype, so that patches would be chosen by other scores than
    at inference; under ZeRO-3 it would also partition them, and gather them for every picture again.

    Args:
        model: with a loaded tower.
        device: where this rank computes; nothing else moves the tower from now on.
    """
    inner = model.get_model()
    tower = inner.get_vision_tower()
    del inner.vision_tower
    object.__setattr__(inner, "vision_tower", tower.to(device))
    newline = getattr(inner, "image_newline", None)
    if newline is not None and is_partitioned():
        import deepspeed

        # Read while the outer module's forward runs, not that of the module which owns it.
        deepspeed.zero.register_external_parameter(model, newline)
