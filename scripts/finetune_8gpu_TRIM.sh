#!/usr/bin/env bash
# Stage 2 with TRIM: finetune language model and projector on the patches that TRIM keeps.
#   bash scripts/finetune_8gpu_TRIM.sh [-- TRAINER FLAGS]
#   NUM_GPUS=4 reduce_func_param=0.25 bash scripts/finetune_8gpu_TRIM.sh
# Its settings are in scripts/recipes/finetune_8gpu_TRIM.yaml; every one can be set from the environment (scripts/lib/train.sh).
# shellcheck source=scripts/lib/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/train.sh"

read_recipe scripts/recipes/finetune_8gpu_TRIM.yaml
train_llava "$@"
