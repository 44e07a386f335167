#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5-13B; scripts/finetune.sh with the larger model.
#   bash scripts/v1_5/finetune.sh [-- TRAINER FLAGS]
# Its settings are in scripts/recipes/v1_5/finetune.yaml, over those of scripts/recipes/finetune.yaml.
# shellcheck source=scripts/lib/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/train.sh"

read_recipe scripts/recipes/v1_5/finetune.yaml
read_recipe scripts/recipes/finetune.yaml
train_llava "$@"
