#!/usr/bin/env bash
# Stage 2 with LoRA: adapters in the language model, and the projector. scripts/merge_lora_weights.py merges them.
#   bash scripts/finetune_lora.sh [-- TRAINER FLAGS]
# Its settings are in scripts/recipes/finetune_lora.yaml; every one can be set from the environment (scripts/lib/train.sh).
# shellcheck source=scripts/lib/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/train.sh"

read_recipe scripts/recipes/finetune_lora.yaml
train_llava "$@"
