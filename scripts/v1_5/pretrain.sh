#!/usr/bin/env bash
# Stage 1 of LLaVA-1.5-13B; scripts/pretrain.sh with the larger model.
#   bash scripts/v1_5/pretrain.sh [-- TRAINER FLAGS]
# shellcheck disable=SC2034 # the script that it sources reads the variables
# shellcheck source=scripts/lib/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/train.sh"

default_source MODEL lmsys/vicuna-13b-v1.5
default_output OUTPUT checkpoints/llava-v1.5-13b-pretrain

# shellcheck source=scripts/pretrain.sh
source "$REPO_ROOT/scripts/pretrain.sh"
