#!/usr/bin/env bash
# LoRA of a LLaVA checkpoint on your own data (DATA, IMAGES), with its own projector and token reduction.
#   bash scripts/v1_5/finetune_task_lora.sh [-- TRAINER FLAGS]
# shellcheck disable=SC2034 # the script that it sources reads the variables
# shellcheck source=scripts/lib/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/train.sh"

default_source MODEL liuhaotian/llava-v1.5-13b
default_source PROJECTOR "" # the checkpoint has one
default reduce_func ""      # the checkpoint's; reduce_func=TRIM reduce_func_param=-1 switches it on
default_output OUTPUT checkpoints/llava-v1.5-13b-task-lora

# shellcheck source=scripts/finetune_lora.sh
source "$REPO_ROOT/scripts/finetune_lora.sh"
