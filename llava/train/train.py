"""Train LLaVA: `python -m llava.train.train`, with LLaVA's flags.

Stage 1 (`--version plain --tune_mm_mlp_adapter True`) trains the projector on captions; stage 2 (`--version v1`) trains
language model and projector on conversations, with `--mm_vision_token_reduce_func TRIM:-1` on the reduced tokens.
Without a vision tower it trains the language model alone.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from llava.errors import InputError, run_command
from llava.train import stopping
from llava.train.flags import DataArguments, ModelArguments, begin_command

if __name__ == "__main__":
    # Signals, `--help` and mistyped flags are answered before the imports below, which take seconds.
    stopping.install()
    run_command(begin_command)

import numpy as np
from transformers import PreTrainedModel, set_seed
from transformers.utils.logging import disable_progress_bar

from llava.conversation import Conversation
from llava.files import make_folder
from llava.gone import look_up
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.multimodal_encoder.text_reader import TextReader
from llava.model.token_reduction import CONFIG_KEY, TEXT, read_training_reduction
from llava.prompt import JOINED_TURNS, QUERY_KEY
from llava.protocols import ImageProcessor, Tokenizer
from llava.train.arguments import TrainingArguments, explaining_refusals, parse_arguments
from llava.train.checkpoint import DEEPSPEED, FSDP, find_last_checkpoint, list_checkpoints
from llava.train.checkpoint import get_mm_adapter_state_maybe_zero_3 as get_mm_adapter_state_maybe_zero_3
from llava.train.collator import Collator
from llava.train.dataset import ConversationDataset, ImageFormat, TextFormat, check_fit
from llava.train.engine import leave_engine, start_engine
from llava.train.feature_cache import open_cache
from llava.train.held_out import check_held_out
from llava.train.lengths import count_lengths, expect_image_tokens
from llava.train.llava_trainer import LLaVATrainer
from llava.train.lora import add_lora
from llava.train.lora import find_all_linear_names as find_all_linear_names
from llava.train.machines import agree, check_alike, check_shared_folder, once_per_machine
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
from llava.train.provenance import describe_records, list_flags, sum_up
from llava.train.queries import find_cut_queries, find_reader
from llava.train.records import check_image_files, leave_out, read_records
from llava.train.run import Run, RunSettings
from llava.train.score_command import ScoreCommand, check_command
from llava.train.store import Records, find_data_cache
from llava.train.targets import choose_placeholder, choose_template, settle_version
from llava.train.varying import DrawReduction

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
    records, held_out = open_data(model_args, data_args, training_args, text_format.template)
    run = describe_run(model_args, data_args, training_args, records, held_out)
    check_shared_folder(run.folder, training_args)
    if agree(lambda: describe_end(run, training_args)):
        say(training_args, f"finished already, nothing to do: {run.folder}")
        return None
    last_checkpoint = agree(lambda: find_start(run, training_args))
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
        image_format = describe_images(data_args, model.get_vision_tower().image_processor)
        feature_cache = open_cache(model_args, data_args, model.get_vision_tower(), model.needs)
        read_query = choose_reader(model)
    choose_trainable(model, model_args)
    record_template(model, model_args.version, text_format.template, tokenizer)

    # 4. Training. Samples are built when the loader asks for them.
    make_dataset = partial(
        ConversationDataset, tokenizer=tokenizer, text_format=text_format, image_format=image_format,
        skip_broken=data_args.skip_broken_records, feature_files=feature_cache and feature_cache.files,
        read_query=read_query,
    )  # fmt: skip
    lengths = find_lengths(model, records, tokenizer, text_format, data_args, training_args)
    # What is asked of the model while it trains; the trainer knows when it is due, also at the step it resumes at.
    score = choose_score(training_args, run.folder, model_args.tune_mm_mlp_adapter)
    training_args.eval_on_start = bool(held_out) or score is not None
    with explaining_refusals("training arguments"):
        trainer = LLaVATrainer(
            model=trained,
            args=training_args,
            train_dataset=make_dataset(records),
            eval_dataset=make_dataset(held_out) if held_out else None,
            data_collator=Collator(tokenizer.pad_token_id, training_args.model_max_length, image_format is not None),
            tokenizer=tokenizer,
            lengths=lengths,
            feature_cache=feature_cache,
            score=score,
        )
    vary_reduction(trainer, model, model_args)
    trainer.train(resume_from_checkpoint=last_checkpoint)
    trainer.report_tally()
    figures = sum_up(trainer.state.log_history)
    if trainer.was_stopped:
        run.end(figures, finished=False)
        return trainer

    # 5. Files, in LLaVA's layout.
    trainer.save_trained(only_projector=model_args.tune_mm_mlp_adapter)
    run.end(figures, finished=True)
    say(training_args, f"trained: {run.folder}")
    return trainer


def describe_end(run: Run, training_args: TrainingArguments) -> str | None:
    """Say that the run is finished; None if it is not."""
    has_checkpoint = bool(list_checkpoints(run.folder))
    return "a finished run" if run.is_finished(has_checkpoint, training_args.resume_anyway) else None


def find_start(run: Run, training_args: TrainingArguments) -> str | None:
    """Find the checkpoint that the run goes on from; None if it starts anew."""
    has_engine = training_args.runs_deepspeed or training_args.runs_fsdp
    return find_last_checkpoint(
        run.folder,
        training_args.world_size if has_engine else None,
        training_args.lora_enable,
        training_args.resume_anyway,
        FSDP if training_args.runs_fsdp else DEEPSPEED,
    )


def say(training_args: TrainingArguments, text: str) -> None:
    """Print a line on the first rank of each machine."""
    if training_args.local_process_index == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def open_data(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments, template: Conversation
) -> tuple[Records, Records | None]:
    """Open what is trained on and what is held out; one rank of each machine reads and checks.

    Raises:
        InputError: on every rank, if the data cannot be used, or machines have other data.
    """
    records = once_per_machine(lambda: load_records(model_args, data_args, template), training_args)
    check_alike(records.fingerprint(), f"--data_path {data_args.data_path}: other records")
    held_out = once_per_machine(lambda: load_held_out(model_args, data_args, template, records), training_args)
    return records, held_out


def describe_run(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    records: Records,
    held_out: Records | None,
) -> Run:
    """Say which run this is, and what its run.json tells besides; make its folders."""
    if data_args.feature_cache:
        make_folder(Path(data_args.feature_cache))
    return Run(
        folder=make_folder(Path(training_args.output_dir)),
        settings=RunSettings.collect(model_args, data_args, training_args, records),
        is_writer=training_args.process_index == 0,
        notes={
            "flags": list_flags(model_args, data_args, training_args),
            "data": describe_records(data_args.data_path, records),
            "held_out": None if held_out is None else describe_records(data_args.eval_data_path, held_out),
        },
    )


def find_lengths(
    model: PreTrainedModel,
    records: Records,
    tokenizer: Tokenizer,
    text_format: TextFormat,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> np.ndarray | None:
    """Find the positions of each record, int32[S], where `--group_by_reduced_length` groups by them."""
    if not training_args.group_by_reduced_length:
        return None
    has_vision = isinstance(model, LlavaMetaForCausalLM)
    tokens = expect_image_tokens(model, data_args) if has_vision else None
    limit = training_args.model_max_length
    folder = data_args.image_folder
    return once_per_machine(
        lambda: count_lengths(records, tokenizer, text_format, limit, tokens, folder), training_args
    )


def choose_reader(model: LlavaMetaForCausalLM) -> TextReader | None:
    """Return what reads queries in the loader's workers; None where nobody does, or the tower reads them in pieces."""
    tower = model.get_vision_tower()
    return tower.text_reader if TEXT in model.needs and not tower.pools_queries else None


def vary_reduction(trainer: LLaVATrainer, model: PreTrainedModel, model_args: ModelArguments) -> None:
    """Let each step draw its token reduction, where the spec string has ranges."""
    reduction = read_training_reduction(getattr(model_args, CONFIG_KEY))
    if reduction.varies:
        trainer.add_callback(DrawReduction(model, reduction, trainer.args.seed))
        say(trainer.args, f"each step draws from {reduction.spec()}; the result is saved at {reduction.middle.spec()}")


def load_records(model_args: ModelArguments, data_args: DataArguments, template: Conversation) -> Records:
    """Open the training records and check them against the flags and their images, before any weight is loaded."""
    skip, folder = data_args.skip_broken_records, data_args.image_folder
    records = read_records(data_args.data_path, skip, data_args.data_cache)
    records = check_fit(records, template, has_vision=model_args.vision_tower is not None, skip_broken=skip)
    records = check_image_files(records, folder, skip)
    faults = find_broken_images(records, folder, find_data_cache(data_args.data_cache))
    is_broken = np.zeros(len(records), bool)
    is_broken[list(faults)] = True
    records = leave_out(records, is_broken, lambda position: faults[position], "images", skip)
    if not records:
        raise InputError(f"{data_args.data_path}: every training record has a broken image")
    return records.repeated()


def load_held_out(
    model_args: ModelArguments, data_args: DataArguments, template: Conversation, records: Records
) -> Records | None:
    """Open and check the records that are held out, as those that are trained on; None where none are asked for.

    Raises:
        InputError: they cannot be used, or are the training records.
    """
    path = data_args.eval_data_path
    if path is None:
        return None
    held_out = load_records(model_args, replace(data_args, data_path=path), template)
    check_held_out(held_out, records, (path, data_args.data_path))
    return held_out


def choose_score(training_args: TrainingArguments, folder: Path, only_projector: bool) -> ScoreCommand | None:
    """Return what scores the model while it trains, if anything does."""
    if not training_args.eval_command:
        return None
    return ScoreCommand(check_command(training_args.eval_command), folder, only_projector)


def run_preflight(
    records: Records,
    tokenizer: Tokenizer,
    text_format: TextFormat,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> None:
    """Count what the records teach, and print it on the first rank of each machine.

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
    if (reader := find_reader(model_args)) is not None:
        say(training_args, find_cut_queries(records, text_format, reader).describe())


def describe_text(model_args: ModelArguments, tokenizer: Tokenizer) -> TextFormat:
    """Collect what the flags, and the tokenizer, say about texts."""
    template = choose_template(model_args.version, tokenizer)
    placeholder = choose_placeholder(template, model_args.mm_use_im_start_end)
    return TextFormat(template, placeholder, getattr(model_args, QUERY_KEY) or JOINED_TURNS)


def describe_images(data_args: DataArguments, processor: ImageProcessor) -> ImageFormat:
    """Collect what the flags and the vision tower say about images."""
    return ImageFormat(data_args.image_folder, processor, data_args.image_aspect_ratio, data_args.image_grid_pinpoints)


def main(attn_implementation: str = "sdpa") -> None:
    """Run training as a command."""
    disable_progress_bar()  # the log has a line for everything that takes long
    trainer = train(attn_implementation=attn_implementation)
    if trainer is not None and trainer.was_stopped:
        trainer.report_stop()
        leave_engine()
        raise SystemExit(stopping.exit_code())
    leave_engine()


if __name__ == "__main__":
    run_command(main)
