"""The command line of training as values: three dataclasses, transformers' own arguments among them.

Flags that transformers 5 renamed still work; on a machine without an accelerator the run moves to the CPU, so one
command line serves both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from transformers import HfArgumentParser

from llava.errors import InputError
from llava.model.token_reduction import parse_reduction
from llava.train.flags import DataArguments, LlavaTrainingFlags, ModelArguments, OneLineParser, check_flags
from llava.train.targets import choose_template


@dataclass
class TrainingArguments(LlavaTrainingFlags, transformers.TrainingArguments):
    """How it is trained: transformers' own arguments and LLaVA's."""

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
            self.warmup_steps = self.warmup_ratio
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.use_cpu and self.tf32:
            self.tf32 = None
        super().__post_init__()


class _Parser(OneLineParser, HfArgumentParser):
    pass


def parse_arguments(
    arguments: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse and check the command line.

    Args:
        arguments: the flags; None: those of the process.

    Raises:
        InputError: an unknown flag, a wrong value, or values that do not go together.
    """
    check_flags(arguments)
    parser = _Parser((ModelArguments, DataArguments, TrainingArguments))
    try:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"training arguments: {error}") from None
    choose_template(model_args.version)
    parse_reduction(model_args.mm_vision_token_reduce_func)
    return model_args, data_args, training_args
