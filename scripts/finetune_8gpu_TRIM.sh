#!/usr/bin/env bash
# Stage 2 with TRIM: finetune language model and projector on the patches that TRIM keeps.
#   bash scripts/finetune_8gpu_TRIM.sh [-- TRAINER FLAGS]
# Every variable can be set from the environment; scripts/lib/train.sh lists those that all scripts share.
#   NUM_GPUS=4 reduce_func_param=0.25 bash scripts/finetune_8gpu_TRIM.sh
# shellcheck disable=SC2034 # scripts/lib/train.sh reads the variables
# shellcheck source=scripts/lib/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/train.sh"

default reduce_func TRIM     # none for plain LLaVA
default reduce_func_param -1 # -1 automatic (IQR), 0.25 a share of the patches, 144 a number, 0.1-0.4 or 6-26 drawn anew for each step
default_source MODEL lmsys/vicuna-7b-v1.5
default_source DATA playground/data/llava_v1_5_mix665k.json
default_source IMAGES playground/data
default_source VISION_TOWER openai/clip-vit-large-patch14-336
default_source PROJECTOR checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin
default_output OUTPUT checkpoints/llava-v1.5-7b-TRIM
default_source ZERO scripts/zero3.json
default BATCH_SIZE 4     # per GPU
default GLOBAL_BATCH 128 # accumulation follows from it
default LEARNING_RATE 2e-5

train_llava --group_by_modality_length True ARGUMENTS "$@"
