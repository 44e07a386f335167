"""LoRA: small adapters beside frozen weights, and these weights quantised where `--bits` says so (QLoRA)."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from llava.errors import InputError
from llava.model.builder import UNQUANTISED
from llava.train.arguments import FULL_BITS, TrainingArguments
from llava.train.engine import is_partitioned


def quantisation_settings(training_args: TrainingArguments, dtype: torch.dtype) -> dict[str, Any]:
    """Return what `from_pretrained` needs to quantise the language model; nothing with 16 bits.

    Args:
        training_args: bits and their kind.
        dtype: that the run computes in.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    if training_args.bits == FULL_BITS:
        return {}
    if not is_bitsandbytes_available():
        raise InputError(f"--bits {training_args.bits} needs bitsandbytes: pip install -e '.[quantise]'")
    settings = BitsAndBytesConfig(
        load_in_4bit=training_args.bits == 4,
        load_in_8bit=training_args.bits == 8,
        llm_int8_skip_modules=list(UNQUANTISED),
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=training_args.double_quant,
        bnb_4bit_quant_type=training_args.quant_type,
        # ZeRO-3 cuts weights into pieces, which it can do with numbers of the run's dtype alone.
        bnb_4bit_quant_storage=dtype if is_partitioned() else None,
    )
    place = None if is_partitioned() else {"": training_args.device}
    return {"quantization_config": settings, "device_map": place}


def add_lora(model: PreTrainedModel, training_args: TrainingArguments) -> PreTrainedModel | PeftModel:
    """Freeze a language model and put adapters beside every linear layer of its decoder.

    Args:
        model: without towers, whose layers have the same names; changed in place.
        training_args: with `lora_enable` and the adapters' settings.

    Returns:
        What the trainer trains and saves: the model in PEFT's wrapper; without `lora_enable` the model itself.
    """
    if not training_args.lora_enable:
        return model
    settings = LoraConfig(
        r=training_args.lora_r,
        lora_alpha=training_args.lora_alpha,
        lora_dropout=training_args.lora_dropout,
        bias=training_args.lora_bias,
        target_modules=list_linear_names(model.model.layers),
        task_type="CAUSAL_LM",
    )
    # Adapters are masters like other trained weights, but DeepSpeed keeps masters itself and wants one dtype.
    return get_peft_model(model, settings, autocast_adapter_dtype=not training_args.runs_deepspeed)


def list_linear_names(layers: nn.Module) -> list[str]:
    """List the last names of the linear layers, e.g. `q_proj`, sorted."""
    return sorted({name.rsplit(".", 1)[-1] for name, module in layers.named_modules() if isinstance(module, nn.Linear)})
