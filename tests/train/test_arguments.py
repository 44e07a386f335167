"""The command line: published flags work, mistakes end in one line."""

import pytest

from llava.errors import InputError
from llava.train.arguments import parse_arguments

REQUIRED = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "out"]

# LLaVA-1.5's finetuning script, flag by flag; DeepSpeed has its own tests.
PUBLISHED_TEXT = """
    --model_name_or_path lmsys/vicuna-13b-v1.5 --version v1 --data_path ./playground/data/llava_v1_5_mix665k.json
    --image_folder ./playground/data --vision_tower openai/clip-vit-large-patch14-336
    --pretrain_mm_mlp_adapter ./checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin --mm_projector_type mlp2x_gelu
    --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad
    --group_by_modality_length True --bf16 True --output_dir ./checkpoints/llava-v1.5-13b --num_train_epochs 1
    --per_device_train_batch_size 16 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
    --evaluation_strategy no --save_strategy steps --save_steps 50000 --save_total_limit 1 --learning_rate 2e-5
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True
    --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
    --report_to none --mm_vision_token_reduce_func TRIM:-1
"""
PUBLISHED = PUBLISHED_TEXT.split()


def test_the_published_script_parses_unchanged():
    model_args, data_args, training_args = parse_arguments(PUBLISHED)
    assert model_args.mm_vision_token_reduce_func == "TRIM:-1"
    assert model_args.mm_vision_token_reduce_query is None  # as the checkpoint says, else the user's turns
    assert (model_args.mm_vision_select_layer, data_args.image_aspect_ratio) == (-2, "pad")
    assert training_args.bf16 and training_args.group_by_modality_length
    assert training_args.optim == "adamw_torch"


def test_the_two_renamed_flags_reach_their_new_names():
    _, _, training_args = parse_arguments(PUBLISHED)
    assert training_args.eval_strategy == "no"
    assert training_args.warmup_steps == 0.03
    assert training_args.get_warmup_steps(1000) == 30


def test_without_accelerator_the_run_moves_to_the_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    _, _, training_args = parse_arguments([*REQUIRED, "--tf32", "True", "--bf16", "True"])
    assert training_args.use_cpu
    assert training_args.device.type == "cpu"
    assert training_args.tf32 is None


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--lerning_rate 1", r"--lerning_rate: no such training argument; did you mean --learning_rate\?"),
        ("--version v9", r"--version v9: .*known:"),
        ("--mm_vision_token_reduce_func TRIMM:-1", "TRIMM"),
        ("--mm_vision_token_reduce_query answers", "expected one of questions, conversation, turns"),
        ("--image_aspect_ratio padd", "expected one of square, pad, anyres"),
        ("--warmup_ratio 3", r"--warmup_ratio 3.0: expected a share in \[0, 1\)"),
        ("--evaluation_strategy epoch", "--eval_strategy epoch: expected one of no, steps"),
        ("--tune_mm_mlp_adapter True --freeze_mm_mlp_adapter True", "leave nothing to train"),
        ("--fp16 True --bf16 True", "training arguments: At most one of fp16 and bf16"),
    ],
)
def test_a_mistake_ends_in_one_line(flags: str, line: str):
    with pytest.raises(InputError, match=line):
        parse_arguments([*REQUIRED, *flags.split()])


def test_what_transformers_itself_refuses_is_one_line_too():
    with pytest.raises(InputError, match=r"--lr_scheduler_type.*: invalid choice: 'cosinus'") as caught:
        parse_arguments([*REQUIRED, "--lr_scheduler_type", "cosinus"])
    assert "\n" not in str(caught.value)
