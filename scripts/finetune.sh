#!/usr/bin/env bash
# Stage 2: finetune language model and projector on conversations; plain LLaVA-1.5 unless reduce_func is set.
#   bash scripts/finetune.sh [-- TRAINER FLAGS]
# Its settings are in scripts/recipes/finetune.yaml; every one can be set from the environment (scripts/lib/train.sh).
# shellcheck source=scripts/lib/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/train.sh"

read_recipe scripts/recipes/finetune.yaml
train_llava "$@"
