"""The command line of training: the published flags, parsed into three dataclasses.

Flags that transformers 5 renamed are still taken; on a machine without accelerator the run moves to the CPU by itself,
so one command line serves both. Parity: where a published default is LLaVA-1.0's and every published script overrides
it, the default here is what the scripts say.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
import transformers
from transformers import HfArgumentParser

from llava.errors import InputError
from llava.model.token_reduction import parse_reducer
from llava.train.engine import check_engine
from llava.train.targets import QUERY_SOURCES, choose_template

FULL_BITS = 16  # not quantised
ASPECT_RATIOS = ("square", "pad", "anyres")


@dataclass
class ModelArguments:
    """Which model is trained, from what, and which parts of it."""

    model_name_or_path: str = field(metadata={"help": "Language model or LLaVA checkpoint to start from."})
    version: str = field(default="v1", metadata={"help": "Conversation template; plain for projector pretraining."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads of the hub go."})
    freeze_backbone: bool = field(default=False, metadata={"help": "Freeze the decoder layers."})
    tune_mm_mlp_adapter: bool = field(default=False, metadata={"help": "Train the projector and nothing else."})
    freeze_mm_mlp_adapter: bool = field(default=False, metadata={"help": "Freeze the projector."})
    vision_tower: str | None = field(
        default=None,
        metadata={
            "help": "CLIP folder, hub id or open_clip:<model>. Without it: that of the LLaVA checkpoint, or none."
        },
    )
    mm_vision_select_layer: int | None = field(
        default=None, metadata={"help": "Layer whose patches are taken. Default: the checkpoint's, else -2."}
    )
    mm_vision_select_feature: str | None = field(
        default=None, metadata={"help": "patch or cls_patch. Default: the checkpoint's, else patch."}
    )
    mm_projector_type: str | None = field(
        default=None, metadata={"help": "linear or mlp<depth>x_gelu. Default: the checkpoint's, else mlp2x_gelu."}
    )
    mm_patch_merge_type: str | None = field(
        default=None, metadata={"help": "flat, spatial or spatial_unpad. Default: the checkpoint's, else flat."}
    )
    pretrain_mm_mlp_adapter: str | None = field(default=None, metadata={"help": "mm_projector.bin to start from."})
    mm_use_im_start_end: bool = field(default=False, metadata={"help": "Put marks before and behind an image."})
    mm_use_im_patch_token: bool = field(default=False, metadata={"help": "Add <im_patch> to the vocabulary."})
    mm_vision_token_reduce_func: str | None = field(
        default=None,
        metadata={"help": "Token reduction, e.g. TRIM:-1; none switches it off. Default: the checkpoint's, else none."},
    )
    mm_vision_token_reduce_query: str = field(
        default="questions",
        metadata={"help": "Text that reduction reads: questions (user's turns) or conversation (as published)."},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager or flash_attention_2. Default: the entry point's choice."}
    )


@dataclass
class DataArguments:
    """What is trained on."""

    data_path: str = field(metadata={"help": "LLaVA training data: .json, .jsonl, .parquet, or a hub name."})
    image_folder: str | None = field(default=None, metadata={"help": "Where the records' image names start."})
    image_aspect_ratio: str | None = field(
        default=None, metadata={"help": "square, pad or anyres. Default: the checkpoint's, else square."}
    )
    image_grid_pinpoints: str | None = field(
        default=None, metadata={"help": "Canvases for anyres, e.g. [[336,672],[672,336]]."}
    )
    lazy_preprocess: bool = field(default=True, metadata={"help": "Accepted; samples are always built when needed."})
    is_multimodal: bool = field(default=False, metadata={"help": "Accepted; the data decide."})
    skip_broken_records: bool = field(
        default=False, metadata={"help": "Leave broken records out and log them, instead of stopping."}
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How it is trained: transformers' own arguments and LLaVA's."""

    optim: str = field(default="adamw_torch", metadata={"help": "The optimizer."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator decides what the model gets."})
    model_max_length: int = field(default=2048, metadata={"help": "Longest sequence, image tokens included."})
    mpt_attn_impl: str | None = field(default=None, metadata={"help": "Accepted; MPT models are not trained."})
    mm_projector_lr: float | None = field(default=None, metadata={"help": "The projector's own learning rate."})
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "Batches of one modality and like lengths."}
    )
    lora_enable: bool = field(default=False, metadata={"help": "Train LoRA adapters in the language model's place."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Their scale, times the rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of them."})
    lora_bias: str = field(default="none", metadata={"help": "Biases trained with them: none, all or lora_only."})
    lora_weight_path: str = field(default="", metadata={"help": "Accepted, and unused as in the published code."})
    bits: int = field(default=16, metadata={"help": "4 or 8: keep the frozen language model quantised (QLoRA)."})
    double_quant: bool = field(default=True, metadata={"help": "With 4 bits: quantise the scales as well."})
    quant_type: str = field(default="nf4", metadata={"help": "With 4 bits: nf4 or fp4."})
    evaluation_strategy: str | None = field(default=None, metadata={"help": "Old name of --eval_strategy."})
    warmup_ratio: float | None = field(default=None, metadata={"help": "Old way of --warmup_steps: a share of all."})

    @property
    def runs_deepspeed(self) -> bool:
        """Whether DeepSpeed trains: by `--deepspeed`, or by the launcher's own settings."""
        return self.deepspeed_plugin is not None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the run computes in."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    def __post_init__(self) -> None:
        """Map the old names, and move to the CPU where there is no accelerator."""
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if self.warmup_ratio and not self.warmup_steps:
            if not 0 <= self.warmup_ratio < 1:
                raise InputError(f"--warmup_ratio {self.warmup_ratio}: expected a share in [0, 1)")
            self.warmup_steps = self.warmup_ratio
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.use_cpu and self.tf32:
            self.tf32 = None
        if self.deepspeed:
            check_engine(self.deepspeed)
        super().__post_init__()


def parse_arguments(
    arguments: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse and check the command line.

    Args:
        arguments: the flags; None: those of the process.

    Raises:
        InputError: an unknown flag, or values that do not go together.
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"training arguments: {error}") from None
    if unknown:
        raise InputError(_describe_unknown(unknown[0]))
    model_args, data_args, training_args = parsed
    _check(model_args, data_args, training_args)
    return model_args, data_args, training_args


def _check(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    choose_template(model_args.version)
    parse_reducer(model_args.mm_vision_token_reduce_func)
    _check_choice("mm_vision_token_reduce_query", model_args.mm_vision_token_reduce_query, QUERY_SOURCES)
    _check_choice("image_aspect_ratio", data_args.image_aspect_ratio, (None, *ASPECT_RATIOS))
    if model_args.tune_mm_mlp_adapter and model_args.freeze_mm_mlp_adapter:
        raise InputError("--tune_mm_mlp_adapter and --freeze_mm_mlp_adapter together leave nothing to train")
    _check_lora(model_args, training_args)
    if training_args.eval_strategy != "no":
        raise InputError("--eval_strategy: training runs no evaluation; score checkpoints with llava.eval")


def _check_lora(model_args: ModelArguments, training_args: TrainingArguments) -> None:
    _check_choice("lora_bias", training_args.lora_bias, ("none", "all", "lora_only"))
    _check_choice("quant_type", training_args.quant_type, ("nf4", "fp4"))
    _check_choice("bits", str(training_args.bits), ("4", "8", "16"))
    if training_args.bits != FULL_BITS and not training_args.lora_enable:
        raise InputError(f"--bits {training_args.bits}: quantised weights cannot be trained; add --lora_enable True")
    for flag in ("tune_mm_mlp_adapter", "freeze_backbone"):
        if training_args.lora_enable and getattr(model_args, flag):
            raise InputError(f"--lora_enable and --{flag} together would freeze the adapters")


def _check_choice(flag: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise InputError(f"--{flag} {value}: expected one of {', '.join(filter(None, choices))}")


def _describe_unknown(flag: str) -> str:
    known = [one.name for cls in (ModelArguments, DataArguments, TrainingArguments) for one in fields(cls)]
    close = difflib.get_close_matches(flag.lstrip("-").split("=")[0], known, n=1)
    return f"{flag}: no such training argument" + (f"; did you mean --{close[0]}?" if close else "")
