"""The trainer: transformers' `Trainer`, changed at its hooks.

    create_accelerator_and_...    FSDP2: over ranks on the CPU too, with inputs as they are (`fsdp`)
    create_optimizer              `--mm_projector_lr`: the projector's parameters get groups of their own
    get_optimizer_cls_and_kwargs  ZeRO offload: DeepSpeed's Adam for states in main memory
    _get_train_sampler            `--group_by_modality_length`, `--group_by_reduced_length`: batches of similar lengths
    get_train_dataloader          batches stay on the host until `_prepare_inputs`; workers survive a signal to all
    _prepare_inputs               ids, mask and labels stay there, as the model splices on the host; no logits
    compute_loss                  its samples and their losses are counted, by modality
    _prepare_input                pixel values reach the frozen tower in float32, whatever the run computes in
    _save                         checkpoints in LLaVA's layout: movable tower path, no towers, what LoRA leaves out
    _load_from_checkpoint         on resuming, also what LoRA leaves out
    _issue_warnings_after_load    no warning about the towers that a checkpoint does not hold
    training_step                 its passes are counted and timed (`figures.Meter`)
    log                           the figures of the steps since the last record
    evaluate                      the loss of the records that are held out
    _evaluate                     before the first step and after a step: held-out loss and scores, where they are due
    _maybe_log_save_evaluate      after each step: stop at a signal, with a checkpoint, or at a loss that is nan
    _run_epoch                    cached features are on disk; no step beyond the last one, when a run resumes there
    get_batch_samples             records that were replaced while their batch was built are noted, not trained on

`save_trained` is LLaVA's own: it writes the result of a finished run.
"""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.modules.module import _IncompatibleKeys
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import TrainOutput

from llava.errors import InputError
from llava.gone import look_up
from llava.model.checkpoint_folder import copy_sentencepiece_model, portable_config, tidy_checkpoint
from llava.model.language_model.causal import TOWER_PREFIX
from llava.model.language_model.label_loss import MOST_LOGITS, LossOutput, take_only_loss
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.multimodal_encoder.tower import ImageFeatures
from llava.protocols import Tokenizer
from llava.train.arguments import TrainingArguments
from llava.train.checkpoint import (
    adds_tokens,
    data_only,
    drop_second_names,
    load_lora_rest,
    save_lora_rest,
    save_projector,
)
from llava.train.checkpoint import get_mm_adapter_state_maybe_zero_3 as get_mm_adapter_state_maybe_zero_3
from llava.train.collator import Batch
from llava.train.console import Console
from llava.train.dataset import ConversationDataset
from llava.train.engine import calls_head_once
from llava.train.feature_cache import FeatureCache
from llava.train.figures import DATA, LANGUAGE_MODEL, OPTIMIZER, OTHER, PAUSE, TOWER, Meter, Sums, gather
from llava.train.fsdp import describe_ranks, ranks_of_any_device, reshard, settle_accelerator, whole
from llava.train.held_out import PlacedSamples, deal_batches, undisturbed
from llava.train.sampler import POOLED_GROUPS, ModalityLengthSampler, SetEpoch
from llava.train.score_command import ScoreCommand
from llava.train.stopping import begin_training, is_requested, keep_worker
from llava.train.store import SHOWN_FAULTS

__getattr__ = look_up(__name__)

logger = logging.getLogger(__name__)

PROJECTOR = "mm_projector"


@dataclass
class Tally:
    """What this process noted while it trained.

    Attributes:
        num_samples: samples whose loss was computed.
        num_unlearnable: of these, those without a token to learn.
        replaced: faults of records that another record stood in for, in order and once each.
    """

    num_samples: int = 0
    num_unlearnable: int = 0
    replaced: dict[str, None] = field(default_factory=dict)


def start_worker(seed_worker: Callable[[int], None] | None, number: int) -> None:
    """Prepare a data loader's worker: signals, then what transformers does."""
    keep_worker()
    if seed_worker is not None:
        seed_worker(number)


def unwrap(model: torch.nn.Module) -> PreTrainedModel:
    """The model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class LLaVATrainer(Trainer):
    """Trains a LLaVA model, or a plain language model if there is no vision tower.

    Attributes:
        was_stopped: whether a signal ended the training before its last step.
        tally: samples that taught nothing, and records that were replaced.
        meter: what the log says beyond the loss.
    """

    was_stopped = False

    def __init__(
        self,
        *arguments: object,
        tokenizer: Tokenizer | None = None,
        lengths: np.ndarray | None = None,
        feature_cache: FeatureCache | None = None,
        score: ScoreCommand | None = None,
        **options: object,
    ) -> None:
        """As transformers' `Trainer`; the dataset that is held out is an `eval_dataset` of the same class.

        Args:
            *arguments: of the base class.
            tokenizer: what LLaVA's scripts call its `processing_class`.
            lengths: int[number of records], positions of each, for `--group_by_reduced_length`.
            feature_cache: completes images of which a batch has keys.
            score: called every `--eval_command_steps` steps.
            **options: of the base class.
        """
        super().__init__(*arguments, **{"processing_class": tokenizer, **options})
        self.lengths = lengths
        self.feature_cache = feature_cache
        self.tally = Tally()
        self.meter = Meter(self.args.device)
        self.score = score
        self._looked_at: int | None = None
        if not isinstance(unwrap(self.model), LlavaMetaForCausalLM):
            take_only_loss(unwrap(self.model), None if calls_head_once(self.args) else MOST_LOGITS)
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(Console())

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; with `--fsdp` one that shards, on any device.

        Raises:
            InputError: it would not.
        """
        if not self.args.runs_fsdp:
            super().create_accelerator_and_postprocess()
            return
        with ranks_of_any_device():
            super().create_accelerator_and_postprocess()
        settle_accelerator(self.accelerator, self.args.compute_dtype)

    def _build_accelerator_args(self, **options: object) -> dict[str, object]:
        ranks = describe_ranks(self.args) if self.args.runs_fsdp else {}
        return super()._build_accelerator_args(**options) | ranks

    def train(self, resume_from_checkpoint: str | None = None, **options: object) -> TrainOutput:
        """Train; files of a checkpoint that hold code are refused.

        Raises:
            InputError: a checkpoint holds code, or the loss is nan.
        """
        begin_training()
        with data_only(), self.meter.watching(unwrap(self.model)):
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **options)
        if self.feature_cache is not None:
            self.feature_cache.flush()
        return output

    def save_trained(self, only_projector: bool) -> None:
        """Save the result of a finished run in LLaVA's layout.

        Args:
            only_projector: stage 1: `mm_projector.bin` and config.json; else the full checkpoint, in the dtype that
                the run computed in, or with LoRA the adapter and the other weights that were trained.
        """
        self.save_state()
        if not (only_projector or self.args.runs_deepspeed or self.args.runs_fsdp or self.args.lora_enable):
            # The weights here are float32 masters; with an engine and LoRA what is saved has its dtype already.
            self.model.to(self.args.compute_dtype)
        self._write_weights(Path(self.args.output_dir), only_projector)

    def _write_weights(self, folder: Path, only_projector: bool) -> None:
        """Write what this run trains, as it is now; all ranks have to call."""
        if not only_projector:
            self.save_model(str(folder), _internal_call=folder != Path(self.args.output_dir))
            return
        save_projector(self.model, folder, is_writer=self.args.should_save)
        if self.args.should_save and adds_tokens(self.model):
            self.processing_class.save_pretrained(str(folder))
            copy_sentencepiece_model(self.processing_class, folder)

    def report_tally(self) -> None:
        """Log what taught nothing, and what was replaced; each process speaks of its own samples."""
        if self.tally.num_unlearnable:
            counts = self.tally.num_unlearnable, self.tally.num_samples
            logger.warning("%d of %d samples had no token to learn", *counts)
        if self.tally.replaced:
            names = list(self.tally.replaced)
            shown = "; ".join(names[:SHOWN_FAULTS]) + ("; ..." if len(names) > SHOWN_FAULTS else "")
            logger.warning("%d broken records were replaced by the next good ones: %s", len(names), shown)

    def report_stop(self) -> None:
        """Print where the same command goes on, on the first rank of each machine."""
        if self.args.local_process_index == 0:
            place = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            sys.stderr.write(f"stopped at step {self.state.global_step}: the same command goes on from {place}\n")
            sys.stderr.flush()

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
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.group_by_reduced_length:
            lengths, has_image, num_pooled = self.lengths, np.ones(len(dataset), bool), POOLED_GROUPS
        elif self.args.group_by_modality_length:
            lengths, has_image, num_pooled = dataset.records.num_words, dataset.records.num_images > 0, 1
        else:
            return super()._get_train_sampler(train_dataset)
        group_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        sampler = ModalityLengthSampler(lengths, has_image, group_size, self.args.seed, num_pooled)
        self.add_callback(SetEpoch(sampler))
        return sampler

    def get_train_dataloader(self) -> DataLoader:
        """Build the loader; its workers ignore signals that are meant for the whole process group."""
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = partial(start_worker, inner.worker_init_fn)
        loader.device = None  # else accelerate moves whole batches to the device
        return loader

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        # Labels, and ids of a LLaVA, on the device would be fetched back, for which the host would wait until the last
        # step is done.
        if "images" in inputs:
            moved = {"images": self._prepare_images(inputs), "packing": self.args.packing}
        else:  # a plain language model
            self.meter.count_texts(inputs["attention_mask"])
            moved = super()._prepare_inputs({name: value for name, value in inputs.items() if name != "labels"})
        kept = {name: value for name, value in inputs.items() if name != "image_keys"}
        return {**kept, **moved, "only_loss": True}

    def _prepare_images(self, batch: Batch) -> torch.Tensor | list[torch.Tensor] | list[ImageFeatures] | None:
        """Bring pixels to the device, or to features where there is a cache of them."""
        images = batch["images"]
        if "image_keys" not in batch:
            return self._prepare_input(images)
        complete = self.meter.timed(TOWER, self.feature_cache.complete)
        return complete(images, batch["image_keys"], batch["image_sizes"])

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, LossOutput]:
        """Compute the loss of a prepared batch, and count its samples, their losses, and those without a label."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.meter.count_losses(outputs["loss_sums"], outputs["num_targets"])
        self.tally.num_samples += len(outputs["num_targets"])
        self.tally.num_unlearnable += int((outputs["num_targets"] == 0).sum())
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | int | None]:
        """Fetch the batches of one step, and note the records that were replaced while they were built."""
        with self.meter.timeline.during(DATA):
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self.tally.replaced.update(dict.fromkeys(batch.pop("replaced", ())))
        return batches, num_items

    def _prepare_for_training(self, *arguments: object, **options: object) -> tuple[torch.nn.Module, DataLoader]:
        model, loader = super()._prepare_for_training(*arguments, **options)
        if self.args.runs_deepspeed:
            model.step = self.meter.timed(OPTIMIZER, model.step)  # the engine's, called at the end of a backward pass
        return model, loader

    def training_step(self, *arguments: object, **options: object) -> torch.Tensor:
        """One forward and backward pass, counted and timed; what follows it belongs to the optimizer."""
        self.meter.timeline.enter(LANGUAGE_MODEL)
        with self.meter.on():
            loss = super().training_step(*arguments, **options)
        self.meter.timeline.enter(OPTIMIZER)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures since the last record to a record of the loss; every rank has to call."""
        if "loss" in logs:
            logs |= self.meter.record(self.state.global_step, self.state.max_steps)
        super().log(logs, start_time)

    def _run_epoch(self, **arguments: object) -> None:
        if self.state.global_step >= self.state.max_steps:
            # The base class would take one more step before it looks.
            self.control.should_training_stop = True
            return
        if self.feature_cache is not None:
            self.feature_cache.flush()  # this epoch finds all that the last one made
        self.meter.begin(self.state.global_step)  # what comes before, such as a tracker's log-in, is no step's
        super()._run_epoch(**arguments)

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: torch.Tensor | float | None, *rest: object, **options: object
    ) -> None:
        self.meter.timeline.enter(OTHER)
        grad_norm = whole(grad_norm)
        self._agree_to_go_on(tr_loss, grad_norm)
        self.meter.end_step(self.state.global_step)
        # Where a signal asks for a checkpoint, nothing may delay it: what is due is done when the run goes on.
        self.control.should_evaluate = not self.was_stopped
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *rest, **options)

    # ---------------------------------------------------------------------------------------------- held-out, scores
    def _evaluate(self, *rest: object, **options: object) -> dict[str, float]:
        """Measure the held-out loss and run `--eval_command`, each where it is due and not done at this step."""
        metrics: dict[str, float] = {}
        if self._looked_at == self.state.global_step:
            return metrics  # asked once more, at the end of an epoch
        self._looked_at = self.state.global_step
        with self.meter.timeline.during(PAUSE):
            if self._is_held_out_due() and not self._is_logged("eval_loss"):
                metrics |= super()._evaluate(*rest, **options)
            if self._is_score_due() and not self._is_logged("score_"):
                self._score()
        return metrics

    def _is_held_out_due(self) -> bool:
        step, last, every = self.state.global_step, self.state.max_steps, self.args.eval_steps
        if every is not None and every < 1:
            every = math.ceil(last * every)
        return self.eval_dataset is not None and (step in (0, last) or (every is not None and step % every == 0))

    def _is_score_due(self) -> bool:
        step = self.state.global_step
        return self.score is not None and step > 0 and step % self.args.eval_command_steps == 0

    def _is_logged(self, prefix: str) -> bool:
        entries = (entry for entry in self.state.log_history if entry["step"] == self.state.global_step)
        return any(key.startswith(prefix) for entry in entries for key in entry)

    def evaluate(
        self,
        eval_dataset: ConversationDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the mean loss of a learned token of held-out records, and log it; every rank has to call.

        Nothing is drawn and no gradient is kept. A record counts once, whatever the ranks and the batch size.

        Args:
            eval_dataset: None: the trainer's own.
            ignore_keys: transformers' own, of no meaning here.
            metric_key_prefix: of the names.

        Returns:
            `eval_loss`, `eval_loss_image` and `eval_loss_text` (a modality without records is left out),
            `eval_samples`, `eval_runtime` in seconds.

        Raises:
            InputError: no record has a token to learn.
        """
        samples = self.eval_dataset if eval_dataset is None else eval_dataset
        begin = time.monotonic()
        watching = self.meter.watching(unwrap(self.model))
        with undisturbed(self.model), watching, self.meter.apart() as totals, torch.no_grad():
            self.model_wrapped.eval()
            for batch in self._held_out_loader(samples):
                self.tally.replaced.update(dict.fromkeys(batch.pop("replaced", ())))
                outputs = self.model_wrapped(**self._prepare_inputs(batch))
                self.meter.count_losses(outputs["loss_sums"], outputs["num_targets"])
            reshard(self.model_wrapped)
            sums = Sums(*map(sum, zip(*gather(totals.read(), self.args.device), strict=True)))
        tokens = sums.image_tokens + sums.text_tokens
        if not tokens:
            raise InputError("--eval_data_path: no held-out record has a token to learn within --model_max_length")
        metrics = {"loss": (sums.image_loss + sums.text_loss) / tokens, **sums.losses(), "samples": len(samples)}
        metrics["runtime"] = time.monotonic() - begin
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out_loader(self, samples: ConversationDataset) -> DataLoader:
        places = deal_batches(samples.records, self.args.eval_batch_size, self.args.process_index, self.args.world_size)
        return DataLoader(
            PlacedSamples(samples),
            batch_sampler=places,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=partial(start_worker, None),
            generator=torch.Generator(),  # else a number would be drawn from the training's
        )

    def _score(self) -> None:
        """Let `--eval_command` score the weights as they are now; the other ranks wait for the first."""
        answer: list[dict[str, float]] = [{}]
        with undisturbed(self.model):
            with self.score.room() if self.args.process_index == 0 else nullcontext():
                self._write_weights(self.score.checkpoint, self.score.only_projector)
                if self.args.process_index == 0:
                    answer = [self.score.run(self.state.global_step)]
            if self.args.world_size > 1:
                torch.distributed.broadcast_object_list(answer, src=0)
        if answer[0]:
            self.log(answer[0])

    def _determine_best_metric(self, metrics: dict[str, float], trial: object) -> bool:
        return False  # no checkpoint is chosen by its held-out loss

    def _save_checkpoint(self, *arguments: object, **options: object) -> None:
        with self.meter.timeline.during(PAUSE):
            super()._save_checkpoint(*arguments, **options)

    def _agree_to_go_on(self, tr_loss: torch.Tensor, grad_norm: torch.Tensor | float | None) -> None:
        """Stop all ranks at the same step: with a checkpoint if one was asked to stop, with an error at a nan loss.

        One small collective and one wait for the device per step, in which the base class waits anyway.
        """
        norm = torch.as_tensor(0.0 if grad_norm is None or self.args.fp16 else grad_norm)
        # With fp16 an infinite gradient is the loss scaler's business: it skips the step.
        is_bad = ~(torch.isfinite(tr_loss) & torch.isfinite(norm).to(tr_loss.device))
        signs = torch.stack([is_bad.float().reshape(()), torch.full_like(tr_loss, is_requested()).float().reshape(())])
        if torch.distributed.is_initialized() and self.args.world_size > 1:
            torch.distributed.all_reduce(signs, op=torch.distributed.ReduceOp.MAX)
        any_bad, any_stopped = signs.tolist()
        if any_bad:
            raise InputError(
                f"the loss or its gradient is nan at step {self.state.global_step}: nothing of this step was saved; "
                "lower --learning_rate, use bf16 instead of fp16, or look for broken weights in the starting checkpoint"
            )
        if any_stopped and not self.was_stopped and self.state.global_step < self.state.max_steps:
            self.was_stopped = True
            self.control.should_save = self.control.should_training_stop = True

    def _prepare_input(self, data: object) -> object:
        # With DeepSpeed the base class would round pixel values to the run's dtype before the tower gets them.
        # From pinned memory the host does not wait for the copy.
        if isinstance(data, torch.Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if self.args.lora_enable:
            gathered_state = state_dict if self.args.runs_fsdp else None
            save_lora_rest(self.model, folder, self.args.should_save, gathered_state)
        elif self.args.runs_fsdp:
            state_dict = {name: value.to(self.args.compute_dtype) for name, value in state_dict.items()}
        # A LLaVA does it itself, and a plain language model or an adapter does not.
        is_llava = isinstance(self.model, LlavaMetaForCausalLM)
        with nullcontext() if is_llava else portable_config(self.model, folder):
            super()._save(str(folder), None if state_dict is None else drop_second_names(self.model, state_dict))
        if self.args.should_save:
            tidy_checkpoint(folder)
            if self.processing_class is not None:
                copy_sentencepiece_model(self.processing_class, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.lora_enable and not self.args.runs_fsdp:  # whose own file has all that is trained
            load_lora_rest(self.model, Path(resume_from_checkpoint))

    def _issue_warnings_after_load(self, load_result: _IncompatibleKeys) -> None:
        # Towers are frozen, and loaded from their own folder or from the checkpoint that the training started from.
        missing, unexpected = (
            [name for name in names if not name.startswith(TOWER_PREFIX)]
            for names in (load_result.missing_keys, load_result.unexpected_keys)
        )
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing, unexpected_keys=unexpected))


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
