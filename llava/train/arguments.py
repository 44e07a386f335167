"""The command line of training as values: three dataclasses, transformers' own arguments among them.

Flags that transformers 5 renamed still work; on a machine without an accelerator the run moves to the CPU, so one
command line serves both.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import HfArgumentParser, Trainer, get_scheduler

from llava.errors import InputError
from llava.model.token_reduction import read_training_reduction
from llava.train.engine_flags import read_fsdp
from llava.train.flags import DataArguments, LlavaTrainingFlags, ModelArguments, OneLineParser, check_flags
from llava.train.targets import check_version
from llava.train.trackers import split_names


@dataclass
class TrainingArguments(LlavaTrainingFlags, transformers.TrainingArguments):
    """How it is trained: transformers' own arguments and LLaVA's."""

    @property
    def runs_deepspeed(self) -> bool:
        """Whether DeepSpeed trains: by `--deepspeed`, or by the launcher's own settings."""
        return self.deepspeed_plugin is not None

    @property
    def runs_fsdp(self) -> bool:
        """Whether FSDP2 trains (`--fsdp`)."""
        return bool(self.fsdp)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the run computes in."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    def __post_init__(self) -> None:
        """Map the old names, move to the CPU where there is no accelerator, and choose how the loader works."""
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if self.report_to is not None:
            self.report_to = split_names([self.report_to] if isinstance(self.report_to, str) else self.report_to)
        if self.warmup_ratio and not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.use_cpu and self.tf32:
            self.tf32 = None
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        self.dataloader_pin_memory = self.dataloader_pin_memory and not self.use_cpu
        self.fsdp_config = read_fsdp(self.fsdp, self.fsdp_config)
        self.fsdp = None if self.fsdp_config is None else True
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
    with explaining_refusals("training arguments"):
        model_args, data_args, training_args = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    check_version(model_args.version)
    read_training_reduction(model_args.mm_vision_token_reduce_func)
    try_recipe(training_args)
    return model_args, data_args, training_args


@contextmanager
def explaining_refusals(what: str) -> Iterator[None]:
    """Turn what transformers and torch refuse about their own settings inside the block into one line.

    Args:
        what: the settings, for the message.

    Raises:
        InputError: they refuse something.
    """
    try:
        yield
    except InputError:
        raise
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{what}: {error}") from error


def try_recipe(training_args: TrainingArguments) -> None:
    """Set up optimizer, schedule, checkpointing and compilation for one weight: what is refused is refused now.

    The trainer sets them up when the model is loaded, which takes minutes.

    Raises:
        InputError: an unknown or missing setting, or a package that is not installed.
    """
    weight = nn.Linear(1, 1)
    with explaining_refusals(f"--optim {training_args.optim.value}, --optim_args {training_args.optim_args}"):
        Trainer.get_optimizer_cls_and_kwargs(training_args, weight)
    schedule = training_args.lr_scheduler_type
    settings = training_args.lr_scheduler_kwargs or {}
    with explaining_refusals(f"--lr_scheduler_type {getattr(schedule, 'value', schedule)}, --lr_scheduler_kwargs"):
        optimizer = torch.optim.SGD(weight.parameters(), lr=1.0)
        scheduler = get_scheduler(
            schedule, optimizer, num_warmup_steps=1, num_training_steps=4, scheduler_specific_kwargs=dict(settings)
        )
        optimizer.step()
        scheduler.step()
    with explaining_refusals("--gradient_checkpointing_kwargs"):
        options = {"use_reentrant": True} | dict(training_args.gradient_checkpointing_kwargs or {})
        checkpoint(weight, torch.zeros(1, requires_grad=True), **options)
    if training_args.torch_compile:
        with explaining_refusals("--torch_compile_backend, --torch_compile_mode"):
            backend, mode = training_args.torch_compile_backend, training_args.torch_compile_mode
            torch.compile(weight, backend=backend or "inductor", mode=mode)
