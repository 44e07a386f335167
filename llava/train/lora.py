"""LoRA: small trained adapters beside frozen weights, which `--bits` quantises (QLoRA)."""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from llava.errors import InputError
from llava.model.builder import UNQUANTISED
from llava.packages import tell_install
from llava.train.arguments import TrainingArguments
from llava.train.engine import is_partitioned
from llava.train.flags import FULL_BITS

if TYPE_CHECKING:
    from peft import PeftModel

NO_DECODER = ("lm_head", "mm_projector", "vision_tower")
"""In the names of linear layers that get no adapter."""


def quantisation_settings(training_args: TrainingArguments, dtype: torch.dtype) -> dict[str, object]:
    """Return the arguments by which `from_pretrained` quantises the language model; none with 16 bits.

    Args:
        training_args: number of bits and their kind.
        dtype: the run computes in it.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    if training_args.bits == FULL_BITS:
        return {}
    if not is_bitsandbytes_available():
        raise InputError(f"--bits {training_args.bits} needs bitsandbytes: {tell_install('bitsandbytes')}")
    settings = BitsAndBytesConfig(
        load_in_4bit=training_args.bits == 4,
        load_in_8bit=training_args.bits == 8,
        llm_int8_skip_modules=list(UNQUANTISED),
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=training_args.double_quant,
        bnb_4bit_quant_type=training_args.quant_type,
        # ZeRO-3 partitions weights of the run's dtype only.
        bnb_4bit_quant_storage=dtype if is_partitioned() else None,
    )
    place = None if is_partitioned() else {"": training_args.device}
    return {"quantization_config": settings, "device_map": place}


def add_lora(model: PreTrainedModel, training_args: TrainingArguments) -> "PreTrainedModel | PeftModel":
    """Freeze a language model and put adapters beside every linear layer of its decoder.

    Args:
        model: still without towers, whose layers have the same names; changed in place.
        training_args: with `lora_enable` and the adapters' settings.

    Returns:
        What the trainer trains and saves: PEFT's wrapper around the model; without `lora_enable` the model itself.
    """
    if not training_args.lora_enable:
        return model
    from peft import LoraConfig, get_peft_model  # takes seconds

    settings = LoraConfig(
        r=training_args.lora_r,
        lora_alpha=training_args.lora_alpha,
        lora_dropout=training_args.lora_dropout,
        bias=training_args.lora_bias,
        target_modules=find_all_linear_names(model),
        task_type="CAUSAL_LM",
    )
    # Adapters are float32 masters like other trained weights; DeepSpeed keeps masters itself and needs one dtype.
    return get_peft_model(model, settings, autocast_adapter_dtype=not training_args.runs_deepspeed)


def find_all_linear_names(model: nn.Module) -> list[str]:
    """List the last names of the decoder's linear layers, e.g. `q_proj`, sorted.

    Args:
        model: its output head, towers and projector, where it has them, are left out.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return sorted({name.rsplit(".", 1)[-1] for name in names if not any(part in name for part in NO_DECODER)})
