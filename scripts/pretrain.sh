#!/usr/bin/env bash
# Stage 1: train the projector on captions; everything else is frozen. Writes OUTPUT/mm_projector.bin.
#   bash scripts/pretrain.sh [-- TRAINER FLAGS]
# shellcheck disable=SC2034 # scripts/lib/train.sh reads the variables
# shellcheck source=scripts/lib/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/train.sh"

default reduce_func none # TRIM works here too
default_source MODEL lmsys/vicuna-7b-v1.5
default_source DATA playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
default_source IMAGES playground/data/LLaVA-Pretrain/images
default_output OUTPUT checkpoints/llava-v1.5-7b-pretrain
default_source ZERO scripts/zero2.json
default VERSION plain
default BATCH_SIZE 32
default GLOBAL_BATCH 256
default LEARNING_RATE 1e-3

train_llava --tune_mm_mlp_adapter True ARGUMENTS "$@"
