#!/usr/bin/env bash
# Stage 2 with QLoRA: finetune_lora.sh with the language model in 4 bits (BITS=8: 8). Needs bitsandbytes.
#   bash scripts/finetune_qlora.sh [-- TRAINER FLAGS]
# shellcheck disable=SC2034 # scripts/lib/train.sh reads the variables
# shellcheck source=scripts/lib/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/train.sh"

default reduce_func none
default_source MODEL lmsys/vicuna-7b-v1.5
default_source DATA playground/data/llava_v1_5_mix665k.json
default_source IMAGES playground/data
default_source PROJECTOR checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin
default_output OUTPUT checkpoints/llava-v1.5-7b-qlora
default_source ZERO scripts/zero2.json
default LEARNING_RATE 2e-4 # of the adapters
default PROJECTOR_LEARNING_RATE 2e-5
default LORA_RANK 64
default LORA_ALPHA 16
default BITS 4

train_llava --lora_enable True --bits "$BITS" --lora_r "$LORA_RANK" --lora_alpha "$LORA_ALPHA" \
    --mm_projector_lr "$PROJECTOR_LEARNING_RATE" --group_by_modality_length True ARGUMENTS "$@"
