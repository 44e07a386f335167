#!/usr/bin/env bash
# Stage 2 with QLoRA: finetune_lora.sh with the language model in 4 bits (BITS=8: 8). Needs bitsandbytes.
#   bash scripts/finetune_qlora.sh [-- TRAINER FLAGS]
# Its settings are in scripts/recipes/finetune_qlora.yaml; every one can be set from the environment (scripts/lib/train.sh).
# shellcheck source=scripts/lib/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/train.sh"

read_recipe scripts/recipes/finetune_qlora.yaml
train_llava "$@"
