#!/usr/bin/env bash
# Stage 1: train the projector on captions; everything else is frozen. Writes OUTPUT/mm_projector.bin.
#   bash scripts/pretrain.sh [-- TRAINER FLAGS]
# Its settings are in scripts/recipes/pretrain.yaml; every one can be set from the environment (scripts/lib/train.sh).
# shellcheck source=scripts/lib/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/train.sh"

read_recipe scripts/recipes/pretrain.yaml
train_llava "$@"
