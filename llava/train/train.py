"""Train LLaVA: `python -m llava.train.train`, with LLaVA's flags.

Stage 1 (`--version plain --tune_mm_mlp_adapter True`) trains the projector on captions; stage 2 (`--version v1`) trains
language model and projector on conversations, with `--mm_vision_token_reduce_func TRIM:-1` on the reduced tokens.
Without a vision tower it trains the language model alone.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from llava.errors import InputError, run_command
from llava.train import stopping
from llava.train.flags import DataArguments, ModelArguments, check_flags

if __name__ == "__main__":
    # Signals, `--help` and mistyped flags are answered before the imports below, which take seconds.
    stopping.install()
    run_command(check_flags)

from transformers import set_seed

from llava.conversation import Conversation
from llava.files import make_folder
from llava.gone import look_up
from llava.model.token_reduction import TEXT
from llava.protocols import ImageProcessor, Tokenizer
from llava.train.arguments import TrainingArguments, explaining_refusals, parse_arguments
from llava.train.checkpoint import find_last_checkpoint, list_checkpoints
from llava.train.checkpoint import get_mm_adapter_state_maybe_zero_3 as get_mm_adapter_state_maybe_zero_3
from llava.train.collator import Collator
from llava.train.dataset import ConversationDataset, ImageFormat, TextFormat, check_fit
from llava.train.engine import leave_engine, start_engine
from llava.train.feature_cache import open_cache
from llava.train.llava_trainer import LLaVATrainer
from llava.train.lora import add_lora
from llava.train.lora import find_all_linear_names as find_all_linear_names
from llava.train.model_setup import (
    add_vision,
    check_start,
    choose_trainable,
    complete_arguments,
    load_language_model,
    load_training_tokenizer,
    read_config,
    record_template,
)
from llava.train.preflight import count_image_tokens, find_broken_images, inspect_records
from llava.train.records import Record, check_image_files, read_records, report_faults
from llava.train.run import Run, RunSettings
from llava.train.targets import choose_placeholder, choose_template, settle_version

__getattr__ = look_up(__name__)


def train(arguments: Sequence[str] | None = None, attn_implementation: str = "sdpa") -> LLaVATrainer | None:
    """Run one training stage, from flags to saved files.

    Args:
        arguments: the flags; None: those of the process.
        attn_implementation: attention to use where no flag says otherwise.

    Returns:
        The trainer, with the trained model in it; None if there was nothing to train: the run is finished, or
        `--preflight_only`.

    Raises:
        InputError: flags, files or records that cannot be trained with, or a loss that is nan.
    """
    # 1. Settings. DeepSpeed starts before any weight is loaded, so that ZeRO-3 can partition weights while loading.
    model_args, data_args, training_args = parse_arguments(arguments)
    if training_args.runs_deepspeed:
        start_engine(training_args.compute_dtype)
    model_args.attn_implementation = model_args.attn_implementation or attn_implementation
    # Flags that were not given follow the starting checkpoint's config.json, else LLaVA-1.5.
    config = read_config(model_args)
    model_args, data_args = complete_arguments(model_args, data_args, config)
    check_start(model_args, training_args, config)
    tokenizer = load_training_tokenizer(model_args, training_args)
    model_args.version = settle_version(model_args.version, tokenizer)

    # 2. Data and the output folder are checked now, before the model is loaded. An interrupted run resumes at its last
    #    complete checkpoint, with the same settings; a finished one has nothing to do.
    text_format = describe_text(model_args, tokenizer)
    records = load_records(model_args, data_args, text_format.template)
    if data_args.feature_cache:
        make_folder(Path(data_args.feature_cache))
    run = Run(
        folder=make_folder(Path(training_args.output_dir)),
        settings=RunSettings.collect(model_args, data_args, training_args, records),
        is_writer=training_args.process_index == 0,
    )
    if run.is_finished(bool(list_checkpoints(run.folder)), training_args.resume_anyway):
        say(training_args, f"finished already, nothing to do: {run.folder}")
        return None
    num_ranks = training_args.world_size if training_args.runs_deepspeed else None
    last_checkpoint = find_last_checkpoint(
        run.folder, num_ranks, training_args.lora_enable, training_args.resume_anyway
    )
    run_preflight(records, tokenizer, text_format, model_args, data_args, training_args)
    if training_args.preflight_only:
        say(training_args, f"checked, not trained: {len(records)} records")
        return None
    run.begin()

    # 3. Model: language model, then LoRA adapters (before the towers, whose layers have the same names), then vision
    #    tower, projector and token reduction. New weights are drawn from the seed.
    set_seed(training_args.seed)
    model = load_language_model(model_args, training_args, config)
    trained = add_lora(model, training_args)  # the same model, or PEFT's wrapper around it
    image_format = feature_cache = read_query = None
    if model_args.vision_tower is not None:
        add_vision(model, tokenizer, model_args, data_args, training_args)
        tower = model.get_vision_tower()
        image_format = describe_images(data_args, tower.image_processor)
        feature_cache = open_cache(model_args, data_args, tower, model.needs)
        read_query = tower.text_reader() if TEXT in model.needs else None
    choose_trainable(model, model_args)
    record_template(model, model_args.version, text_format.template, tokenizer)

    # 4. Training. Samples are built when the loader asks for them.
    dataset = ConversationDataset(
        records,
        tokenizer,
        text_format,
        image_format,
        data_args.skip_broken_records,
        feature_files=feature_cache and feature_cache.files,
        read_query=read_query,
    )
    with explaining_refusals("training arguments"):
        trainer = LLaVATrainer(
            model=trained,
            args=training_args,
            train_dataset=dataset,
            data_collator=Collator(tokenizer.pad_token_id, training_args.model_max_length, image_format is not None),
            tokenizer=tokenizer,
            feature_cache=feature_cache,
        )
    trainer.train(resume_from_checkpoint=last_checkpoint)
    trainer.report_tally()
    if trainer.was_stopped:
        return trainer

    # 5. Files, in LLaVA's layout.
    trainer.save_trained(only_projector=model_args.tune_mm_mlp_adapter)
    run.finish()
    say(training_args, f"trained: {run.folder}")
    return trainer


def say(training_args: TrainingArguments, text: str) -> None:
    """Print a line on the first rank."""
    if training_args.process_index == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def load_records(model_args: ModelArguments, data_args: DataArguments, template: Conversation) -> list[Record]:
    """Read the training records and check them against the flags and their images, before any weight is loaded."""
    skip = data_args.skip_broken_records
    records = read_records(data_args.data_path, skip)
    records = check_fit(records, template, has_vision=model_args.vision_tower is not None, skip_broken=skip)
    records = check_image_files(records, data_args.image_folder, skip)
    faults = find_broken_images(records, data_args.image_folder)
    report_faults(list(faults.values()), "images", skip)
    usable = [record for record in records if record.name not in faults]
    if not usable:
        raise InputError(f"{data_args.data_path}: every training record has a broken image")
    return usable


def run_preflight(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    text_format: TextFormat,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> None:
    """Count what the records teach, and print it on the first rank.

    Raises:
        InputError: they teach nothing.
    """
    batch = training_args.per_device_train_batch_size * training_args.world_size
    if training_args.dataloader_drop_last and len(records) < batch:
        raise InputError(f"--dataloader_drop_last True: {len(records)} records make no batch of {batch}; leave it out")
    limit = training_args.model_max_length
    tokens = count_image_tokens(model_args, data_args)
    findings = inspect_records(
        records, tokenizer, text_format, limit, tokens, data_args.image_folder, data_args.skip_broken_records
    )
    say(training_args, findings.describe(limit, tokens))


def describe_text(model_args: ModelArguments, tokenizer: Tokenizer) -> TextFormat:
    """Collect what the flags, and the tokenizer, say about texts."""
    template = choose_template(model_args.version, tokenizer)
    placeholder = choose_placeholder(template, model_args.mm_use_im_start_end)
    return TextFormat(template, placeholder, model_args.mm_vision_token_reduce_query)


def describe_images(data_args: DataArguments, processor: ImageProcessor) -> ImageFormat:
    """Collect what the flags and the vision tower say about images."""
    return ImageFormat(data_args.image_folder, processor, data_args.image_aspect_ratio, data_args.image_grid_pinpoints)


def main(attn_implementation: str = "sdpa") -> None:
    """Run training as a command."""
    trainer = train(attn_implementation=attn_implementation)
    if trainer is not None and trainer.was_stopped:
        trainer.report_stop()
        leave_engine()
        raise SystemExit(stopping.exit_code())
    leave_engine()


if __name__ == "__main__":
    run_command(main)
