#!/usr/bin/env bash
# Finetune a LLaVA checkpoint on your own data (DATA, IMAGES), with its own projector and token reduction.
#   bash scripts/v1_5/finetune_task.sh [-- TRAINER FLAGS]
# Its settings are in scripts/recipes/v1_5/finetune_task.yaml, over those of scripts/recipes/finetune.yaml.
# shellcheck source=scripts/lib/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/train.sh"

read_recipe scripts/recipes/v1_5/finetune_task.yaml
read_recipe scripts/recipes/finetune.yaml
train_llava "$@"
