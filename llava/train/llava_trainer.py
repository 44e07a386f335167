"""The trainer: transformers' own, plus a learning rate for the projector, grouped batches and LLaVA's file layout."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import Trainer

from llava.model.checkpoint_folder import copy_sentencepiece_model, portable_config, tidy_checkpoint
from llava.model.language_model.llava_llama import TOWER_PREFIX
from llava.train.arguments import TrainingArguments
from llava.train.checkpoint import load_lora_rest, save_lora_rest
from llava.train.sampler import ModalityLengthSampler, SetEpoch

PROJECTOR = "mm_projector"


class LlavaTrainer(Trainer):
    """Trains a LLaVA model, or a plain language model where there is no vision tower."""

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer over trainable parameters; `mm_projector_lr` gives the projector its own groups."""
        if self.optimizer is None:
            super().create_optimizer(model)
            drop_empty_groups(self.optimizer)
            if self.args.mm_projector_lr is not None:
                split_projector(self.optimizer, self.model if model is None else model, self.args.mm_projector_lr)
        return self.optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """Choose the optimizer; states that live in main memory (ZeRO offload) have one of their own."""
        chosen, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if chosen is torch.optim.AdamW and args.runs_deepspeed and args.deepspeed_plugin.hf_ds_config.is_offload():
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            settings.pop("fused", None)
            return DeepSpeedCPUAdam, settings | {"adamw_mode": True}
        return chosen, settings

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)
        records = (self.train_dataset if train_dataset is None else train_dataset).records
        sampler = ModalityLengthSampler(
            lengths=[record.num_words for record in records],
            has_image=[bool(record.images) for record in records],
            group_size=self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            seed=self.args.seed,
        )
        self.add_callback(SetEpoch(sampler))
        return sampler

    def _prepare_input(self, data: Any) -> Any:
        # With DeepSpeed the base class would round pixel values to the run's dtype, before the tower sees them.
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if self.args.lora_enable:
            save_lora_rest(self.model, folder, is_writer=self.args.should_save)
        with portable_config(self.model, folder):
            super()._save(str(folder), state_dict)
        if self.args.should_save:
            tidy_checkpoint(folder)
            if self.processing_class is not None:
                copy_sentencepiece_model(self.processing_class, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.lora_enable:
            load_lora_rest(self.model, Path(resume_from_checkpoint))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A resumed checkpoint holds no towers: they are frozen and already loaded from their own folder.
        missing = [name for name in load_result.missing_keys if not name.startswith(TOWER_PREFIX)]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))


def split_projector(optimizer: torch.optim.Optimizer, model: torch.nn.Module, learning_rate: float) -> None:
    """Move the projector's parameters into groups of their own.

    Args:
        optimizer: fresh, without state; each of its groups that holds projector parameters is split in two.
        model: names the parameters.
        learning_rate: of the projector's groups; everything else stays as in the group they come from.
    """
    projector = {id(parameter) for name, parameter in model.named_parameters() if PROJECTOR in name}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in projector]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in projector]
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})
    drop_empty_groups(optimizer)


def drop_empty_groups(optimizer: torch.optim.Optimizer) -> None:
    """Remove groups without parameters, e.g. of biases where none is trained."""
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
