"""What a training run is: the settings in OUTPUT/run.json, so that no other run goes on in its place.

Settings that do not decide the result (`NEUTRAL`) may change while a run is interrupted. Every other flag counts, those
of later versions of transformers too; files count by content. The file also tells people where the run came from and
what came of it (`provenance`); of that nothing is compared.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from llava.errors import InputError
from llava.files import read_json, write_json
from llava.model.adapter import ADAPTER_CONFIG_FILE
from llava.model.checkpoint_folder import PROJECTOR_FILE
from llava.model.identity import hash_files, identify_checkpoint, identify_tower
from llava.model.token_reduction import CONFIG_KEY, read_training_reduction
from llava.train.arguments import TrainingArguments
from llava.train.engine import zero_stage
from llava.train.flags import DataArguments, ModelArguments
from llava.train.provenance import describe_start, now, to_json
from llava.train.store import Records

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
FORMAT = 1
RESULT_FILES = (PROJECTOR_FILE, ADAPTER_CONFIG_FILE, "model.safetensors", "model.safetensors.index.json")

# Compared by content instead of by name.
FILE_FLAGS = ("model_name_or_path", "data_path", "vision_tower", "pretrain_mm_mlp_adapter")
# Where results go, how the run is watched, saved and spread over the machine, and flags that are ignored.
NEUTRAL = frozenset(
    [
        "output_dir",
        "cache_dir",
        "image_folder",
        "data_cache",
        "lazy_preprocess",
        "is_multimodal",
        "skip_broken_records",
        "feature_cache",
        "attn_implementation",
        "preflight_only",
        "eval_data_path",
        "eval_command",
        "eval_command_steps",
        "verbose_log",
        "resume_anyway",
        "mpt_attn_impl",
        "lora_weight_path",
        "evaluation_strategy",
        "warmup_ratio",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "dataloader_in_order",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "save_only_model",
        "save_on_each_node",
        "enable_jit_checkpoint",
        "logging_steps",
        "logging_strategy",
        "logging_first_step",
        "logging_nan_inf_filter",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "disable_tqdm",
        "report_to",
        "run_name",
        "project",
        "trackio_bucket_id",
        "trackio_space_id",
        "trackio_static_space_id",
        "include_num_input_tokens_seen",
        "skip_memory_metrics",
        "debug",
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "eval_accumulation_steps",
        "eval_do_concat_batches",
        "eval_use_gather_object",
        "per_device_eval_batch_size",
        "batch_eval_metrics",
        "bf16_full_eval",
        "fp16_full_eval",
        "do_eval",
        "do_predict",
        "do_train",
        "include_for_metrics",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
        "prediction_loss_only",
        "use_cache",
        "push_to_hub",
        "hub_model_id",
        "hub_strategy",
        "hub_token",
        "hub_private_repo",
        "hub_always_push",
        "hub_revision",
        "local_rank",
        "use_cpu",
        "ddp_backend",
        "ddp_broadcast_buffers",
        "ddp_bucket_cap_mb",
        "ddp_find_unused_parameters",
        "ddp_static_graph",
        "ddp_timeout",
        "deepspeed",
        "accelerator_config",
        "parallelism_config",
        "fsdp_config",
        "fsdp_transformer_layer_cls_to_wrap",
        "full_determinism",
        "tf32",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "torch_empty_cache_steps",
        "use_liger_kernel",
        "liger_kernel_config",
        "resume_from_checkpoint",
        "restore_callback_states_from_checkpoint",
        "remove_unused_columns",
        "label_names",
        "length_column_name",
    ]
)


@dataclass(frozen=True)
class Content:
    """A file, folder or hub name among the settings."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class RunSettings:
    """All that decides the result of a run.

    Attributes:
        flags: values of flags as JSON knows them.
        contents: what the flags of `FILE_FLAGS` name.
    """

    flags: Mapping[str, object]
    contents: Mapping[str, Content]

    @classmethod
    def collect(
        cls,
        model_args: ModelArguments,
        data_args: DataArguments,
        training_args: TrainingArguments,
        records: Records,
    ) -> "RunSettings":
        """Collect the settings of a run that is about to start.

        Args:
            model_args: from `complete_arguments`.
            data_args: from `complete_arguments`.
            training_args: as parsed.
            records: what is trained on.

        Raises:
            InputError: the token reduction is not usable. (What cannot be read counts by its name: loading it says what
                is wrong.)
        """
        given = {
            flag.name: to_json(getattr(group, flag.name))
            for group in (model_args, data_args, training_args)
            for flag in fields(group)
            if flag.init and flag.name not in NEUTRAL and flag.name not in FILE_FLAGS
        }
        given[CONFIG_KEY] = read_training_reduction(getattr(model_args, CONFIG_KEY)).spec()
        # Its place does not matter, but features that go through it are rounded.
        given["feature_cache"] = bool(data_args.feature_cache)
        given |= {"world_size": training_args.world_size, "deepspeed": zero_stage(training_args)}
        start = model_args.model_name_or_path
        contents = {
            "model_name_or_path": Content(start, identify_checkpoint(start) or start),
            "data_path": Content(data_args.data_path, records.fingerprint()),
        }
        if (tower := model_args.vision_tower) is not None:
            contents["vision_tower"] = Content(tower, identify_tower(tower, start) or tower)
        if projector := model_args.pretrain_mm_mlp_adapter:
            path = Path(projector)
            contents["pretrain_mm_mlp_adapter"] = Content(projector, hash_files([path], "projector")[path] or projector)
        return cls(given, contents)

    def differences(self, new: "RunSettings") -> list[str]:
        """List what differs in other settings, as `seed 42 -> 7`; a flag that one side does not know is passed over."""
        changed = [
            f"was written by {self.flags[name]} ranks, this run has {new.flags[name]}"
            if name == "world_size"
            else f"{name} {self.flags[name]} -> {new.flags[name]}"
            for name in self.flags
            if name in new.flags and self.flags[name] != new.flags[name]
        ]
        for name in FILE_FLAGS:
            old, now = self.contents.get(name), new.contents.get(name)
            if (old is None and now is None) or (old and now and old.fingerprint == now.fingerprint):
                continue
            if old and now and old.name == now.name:
                changed.append(f"{name} {now.name}, whose content has changed")
            else:
                changed.append(f"{name} {old and old.name} -> {now and now.name}")
        return changed


@dataclass(frozen=True)
class Run:
    """A run in its output folder.

    Attributes:
        folder: of `--output_dir`.
        settings: of this start of the run.
        is_writer: whether this rank writes.
        notes: what else the file says: flags and data.
    """

    folder: Path
    settings: RunSettings
    is_writer: bool
    notes: Mapping[str, object] = field(default_factory=dict)

    def is_finished(self, has_checkpoint: bool, resume_anyway: bool) -> bool:
        """Compare with what the folder holds.

        Args:
            has_checkpoint: whether there is something to go on from.
            resume_anyway: go on also with other settings.

        Returns:
            Whether this very run has ended already and its result is there.

        Raises:
            InputError: a run with other settings is in this folder.
        """
        stored = self._read()
        if stored is None:
            if has_checkpoint:
                logger.warning("%s has no %s: the settings cannot be compared", self.folder, RUN_FILE)
            return False
        settings, finished = stored
        has_result = finished and any((self.folder / name).is_file() for name in RESULT_FILES)
        if not (has_result or has_checkpoint):
            return False
        changed = settings.differences(self.settings)
        if not changed:
            return has_result
        line = f"{self.folder} holds a run with other settings: {', '.join(changed)}"
        if not resume_anyway:
            raise InputError(
                f"{line}; start with the same settings or another --output_dir, or go on with --resume_anyway True"
            )
        logger.warning("%s; goes on all the same", line)
        return False

    def begin(self) -> None:
        """Write the settings into the folder, and when, where and with what this start of the run began."""
        if self.is_writer:
            path = self.folder / RUN_FILE
            earlier = read_json(path).get("starts", []) if path.exists() else []
            start = describe_start(int(self.settings.flags["world_size"]))
            self._write(finished=False, starts=[*earlier, start], figures=None)

    def end(self, figures: Mapping[str, object], finished: bool) -> None:
        """Note that this start of the run has ended.

        Args:
            figures: final ones.
            finished: whether the result is there.
        """
        if self.is_writer:
            *earlier, start = read_json(self.folder / RUN_FILE)["starts"]
            self._write(finished, [*earlier, start | {"ended": now()}], figures)

    def _read(self) -> tuple[RunSettings, bool] | None:
        path = self.folder / RUN_FILE
        if not path.exists():
            return None
        stored = read_json(path)
        try:
            contents = {name: Content(**content) for name, content in stored["contents"].items()}
            return RunSettings(dict(stored["settings"]), contents), stored["finished"] is True
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(f"{path} is not the file that training writes; remove it to start without it") from None

    def _write(self, finished: bool, starts: list[object], figures: Mapping[str, object] | None) -> None:
        contents = {name: vars(content) for name, content in self.settings.contents.items()}
        content = {
            "format": FORMAT, "finished": finished, "settings": dict(self.settings.flags), "contents": contents,
            **self.notes, "starts": starts, "figures": figures,
        }  # fmt: skip
        write_json(self.folder / RUN_FILE, content)
