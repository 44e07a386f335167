#!/usr/bin/env bash
# LoRA of LLaVA-1.5-13B; scripts/finetune_lora.sh with the larger model.
#   bash scripts/v1_5/finetune_lora.sh [-- TRAINER FLAGS]
# Its settings are in scripts/recipes/v1_5/finetune_lora.yaml, over those of scripts/recipes/finetune_lora.yaml.
# shellcheck source=scripts/lib/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/train.sh"

read_recipe scripts/recipes/v1_5/finetune_lora.yaml
read_recipe scripts/recipes/finetune_lora.yaml
train_llava "$@"
