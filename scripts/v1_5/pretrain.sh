#!/usr/bin/env bash
# Stage 1 of LLaVA-1.5-13B; scripts/pretrain.sh with the larger model.
#   bash scripts/v1_5/pretrain.sh [-- TRAINER FLAGS]
# Its settings are in scripts/recipes/v1_5/pretrain.yaml, over those of scripts/recipes/pretrain.yaml.
# shellcheck source=scripts/lib/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/train.sh"

read_recipe scripts/recipes/v1_5/pretrain.yaml
read_recipe scripts/recipes/pretrain.yaml
train_llava "$@"
