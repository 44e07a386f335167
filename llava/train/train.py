"""Train LLaVA: `python -m llava.train.train`, with LLaVA's flags.

Stage 1 (`--version plain --tune_mm_mlp_adapter True`) trains the projector on captions; stage 2 (`--version v1`) trains
language model and projector on conversations, with `--mm_vision_token_reduce_func TRIM:-1` on the reduced tokens.
Without a vision tower it trains the language model alone.
"""

from collections.abc import Sequence
from pathlib import Path

from llava.errors import run_command
from llava.train.flags import DataArguments, ModelArguments, check_flags

if __name__ == "__main__":
    # `--help` and mistyped flags are answered before the imports below, which take seconds.
    run_command(check_flags)

from transformers import set_seed

from llava.files import make_folder
from llava.protocols import ImageProcessor
from llava.train.arguments import parse_arguments
from llava.train.checkpoint import find_last_checkpoint
from llava.train.collator import Collator
from llava.train.dataset import ConversationDataset, ImageFormat, TextFormat, check_fit
from llava.train.engine import leave_engine, start_engine
from llava.train.llava_trainer import LlavaTrainer
from llava.train.lora import add_lora
from llava.train.model_setup import (
    add_vision,
    choose_trainable,
    complete_arguments,
    load_language_model,
    load_training_tokenizer,
    read_config,
)
from llava.train.records import Record, check_image_files, read_records
from llava.train.targets import choose_mark, choose_template


def train(arguments: Sequence[str] | None = None, attn_implementation: str = "sdpa") -> LlavaTrainer:
    """Run one training stage, from flags to saved files.

    Args:
        arguments: the flags; None: those of the process.
        attn_implementation: attention to use where no flag says otherwise.

    Returns:
        The trainer, with the trained model in it.

    Raises:
        InputError: flags, files or records that cannot be trained with.
    """
    # 1. Settings. DeepSpeed starts before any weight is loaded, so that ZeRO-3 can partition weights while loading.
    model_args, data_args, training_args = parse_arguments(arguments)
    if training_args.runs_deepspeed:
        start_engine(training_args.compute_dtype)
    model_args.attn_implementation = model_args.attn_implementation or attn_implementation
    # Flags that were not given follow the starting checkpoint's config.json, else LLaVA-1.5.
    config = read_config(model_args)
    model_args, data_args = complete_arguments(model_args, data_args, config)

    # 2. Data. Every record, every image path and the output folder are checked now, before the model is loaded.
    records = load_records(model_args, data_args)
    make_folder(Path(training_args.output_dir))
    num_ranks = training_args.world_size if training_args.runs_deepspeed else None
    last_checkpoint = find_last_checkpoint(training_args.output_dir, num_ranks)

    # 3. Model: language model, then LoRA adapters (before the towers, whose layers have the same names), then vision
    #    tower, projector and token reduction. New weights are drawn from the seed.
    set_seed(training_args.seed)
    tokenizer = load_training_tokenizer(model_args, training_args)
    model = load_language_model(model_args, training_args, config)
    trained = add_lora(model, training_args)  # the same model, or PEFT's wrapper around it
    image_format = None
    if model_args.vision_tower is not None:
        add_vision(model, tokenizer, model_args, data_args, training_args)
        image_format = describe_images(data_args, model.get_vision_tower().image_processor)
    choose_trainable(model, model_args)

    # 4. Training. Samples are built when the loader asks for them; an interrupted run resumes at its last checkpoint.
    trainer = LlavaTrainer(
        model=trained,
        args=training_args,
        train_dataset=ConversationDataset(records, tokenizer, describe_text(model_args), image_format),
        data_collator=Collator(tokenizer.pad_token_id, training_args.model_max_length, image_format is not None),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint)

    # 5. Files, in LLaVA's layout.
    trainer.save_trained(only_projector=model_args.tune_mm_mlp_adapter)
    return trainer


def load_records(model_args: ModelArguments, data_args: DataArguments) -> list[Record]:
    """Read the training records and check them against the flags, before any weight is loaded."""
    records = read_records(data_args.data_path, data_args.skip_broken_records)
    check_fit(records, choose_template(model_args.version), has_vision=model_args.vision_tower is not None)
    return check_image_files(records, data_args.image_folder, data_args.skip_broken_records)


def describe_text(model_args: ModelArguments) -> TextFormat:
    """Collect what the flags say about texts."""
    template = choose_template(model_args.version)
    placeholder = choose_mark(template, model_args.mm_use_im_start_end)
    return TextFormat(template, placeholder, model_args.mm_vision_token_reduce_query)


def describe_images(data_args: DataArguments, processor: ImageProcessor) -> ImageFormat:
    """Collect what the flags and the vision tower say about images."""
    return ImageFormat(data_args.image_folder, processor, data_args.image_aspect_ratio, data_args.image_grid_pinpoints)


def main() -> None:
    """Run training as a command."""
    train()
    leave_engine()


if __name__ == "__main__":
    run_command(main)
