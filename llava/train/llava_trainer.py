"""The trainer: transformers' `Trainer`, changed at nine of its hooks.

    create_optimizer              `--mm_projector_lr`: the projector's parameters get groups of their own
    get_optimizer_cls_and_kwargs  ZeRO offload: DeepSpeed's Adam for states in main memory
    _get_train_sampler            `--group_by_modality_length`: batches of one modality and similar lengths
    get_train_dataloader          batches stay on the host until `_prepare_inputs`
    _prepare_inputs               ids, mask and labels stay there: the model splices on the host
    _prepare_input                pixel values reach the frozen tower in float32, whatever the run computes in
    _save                         checkpoints in LLaVA's layout: movable tower path, no towers, what LoRA leaves out
    _load_from_checkpoint         on resuming, also what LoRA leaves out
    _issue_warnings_after_load    no warning about the towers that a checkpoint does not hold

`save_trained` is LLaVA's own: it writes the result of a finished run.
"""

from pathlib import Path

import torch
from torch.nn.modules.module import _IncompatibleKeys
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer

from llava.model.checkpoint_folder import copy_sentencepiece_model, portable_config, tidy_checkpoint
from llava.model.language_model.llava_llama import TOWER_PREFIX
from llava.train.arguments import TrainingArguments
from llava.train.checkpoint import load_lora_rest, save_lora_rest, save_projector
from llava.train.collator import Batch
from llava.train.sampler import ModalityLengthSampler, SetEpoch

PROJECTOR = "mm_projector"


class LlavaTrainer(Trainer):
    """Trains a LLaVA model, or a plain language model if there is no vision tower."""

    def save_trained(self, only_projector: bool) -> None:
        """Save the result of a finished run in LLaVA's layout.

        Args:
            only_projector: stage 1: `mm_projector.bin` and config.json; else the full checkpoint, in the dtype that
                the run computed in, or with LoRA the adapter and the other weights that were trained.
        """
        self.save_state()
        folder = Path(self.args.output_dir)
        if only_projector:
            save_projector(self.model, folder, is_writer=self.args.should_save)
            return
        if not (self.args.runs_deepspeed or self.args.lora_enable):
            # The weights here are float32 masters; with DeepSpeed and LoRA they have the run's dtype already.
            self.model.to(self.args.compute_dtype)
        self.save_model(str(folder))

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer over trainable parameters; `mm_projector_lr` gives the projector its own groups."""
        if self.optimizer is None:
            super().create_optimizer(model)
            drop_empty_groups(self.optimizer)
            if self.args.mm_projector_lr is not None:
                split_projector(self.optimizer, self.model if model is None else model, self.args.mm_projector_lr)
        return self.optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: torch.nn.Module | None = None
    ) -> tuple[type[torch.optim.Optimizer], dict[str, object]]:
        """Choose the optimizer; states in main memory (ZeRO offload) need DeepSpeed's own."""
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

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        loader.device = None  # else accelerate moves whole batches to the device
        return loader

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        if "images" not in inputs:
            return super()._prepare_inputs(inputs)  # a plain language model
        # Ids on the device would be fetched back, for which the host would wait until the last step is done.
        return {**inputs, "images": self._prepare_input(inputs["images"])}

    def _prepare_input(self, data: object) -> object:
        # With DeepSpeed the base class would round pixel values to the run's dtype before the tower gets them.
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

    def _issue_warnings_after_load(self, load_result: _IncompatibleKeys) -> None:
        # A checkpoint holds no towers: they are frozen, and loaded from their own folder.
        missing = [name for name in load_result.missing_keys if not name.startswith(TOWER_PREFIX)]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))


def split_projector(optimizer: torch.optim.Optimizer, model: torch.nn.Module, learning_rate: float) -> None:
    """Move the projector's parameters into groups of their own.

    Args:
        optimizer: new, without state; each of its groups that holds projector parameters is split in two.
        model: has the parameters' names.
        learning_rate: of the projector's groups; their other settings are those of the group they come from.
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
