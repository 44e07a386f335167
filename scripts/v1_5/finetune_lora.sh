#!/usr/bin/env bash
# LoRA of LLaVA-1.5-13B; scripts/finetune_lora.sh with the larger model.
#   bash scripts/v1_5/finetune_lora.sh [-- TRAINER FLAGS]
# shellcheck disable=SC2034 # the script that it sources reads the variables
# shellcheck source=scripts/lib/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/train.sh"

default_source MODEL lmsys/vicuna-13b-v1.5
default_source PROJECTOR checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin
default_output OUTPUT checkpoints/llava-v1.5-13b-lora

# shellcheck source=scripts/finetune_lora.sh
source "$REPO_ROOT/scripts/finetune_lora.sh"
