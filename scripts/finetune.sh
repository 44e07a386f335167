#!/usr/bin/env bash
# Stage 2: finetune language model and projector on conversations; plain LLaVA-1.5 unless reduce_func is set.
#   bash scripts/finetune.sh [-- TRAINER FLAGS]
# shellcheck disable=SC2034 # scripts/lib/train.sh reads the variables
# shellcheck source=scripts/lib/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/train.sh"

default reduce_func none
default_source MODEL lmsys/vicuna-7b-v1.5
default_source DATA playground/data/llava_v1_5_mix665k.json
default_source IMAGES playground/data
default_source PROJECTOR checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin
default_output OUTPUT checkpoints/llava-v1.5-7b
default_source ZERO scripts/zero3.json
default LEARNING_RATE 2e-5

train_llava --group_by_modality_length True ARGUMENTS "$@"
