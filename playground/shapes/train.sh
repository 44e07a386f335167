#!/usr/bin/env bash
# The whole recipe of the pocket models: pictures, CLIP, language model, projector, and LLaVA plain and with TRIM. The
# training steps are the repository's own scripts on two CPU ranks.
#   bash playground/shapes/train.sh             all steps; a step whose result is there is not repeated
#   WORK=elsewhere bash playground/shapes/train.sh    pictures and intermediate models go there (default: playground/shapes/data)
#   CHECKPOINTS=elsewhere ...                   where the three kept checkpoints go (default: playground/shapes/checkpoints)
#   NUM_GPUS=8 ...                              ranks (default: 2, on the CPU where there is no GPU)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/lib/environment.sh
source scripts/lib/environment.sh
use_environment

WORK=${WORK:-playground/shapes/data}
CHECKPOINTS=${CHECKPOINTS:-playground/shapes/checkpoints}
CLIP=$CHECKPOINTS/shapes-clip
LOGS=$WORK/logs
mkdir -p "$WORK" "$CHECKPOINTS" "$LOGS"
export NUM_GPUS=${NUM_GPUS:-2} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Small models: float32 (bfloat16 is slower on processors without AMX), ZeRO-2, nothing recomputed, pictures read in place.
export PRECISION=fp32 ZERO=scripts/zero2.json GRADIENT_CHECKPOINTING=False NUM_WORKERS=0 MAX_LENGTH=512 LOGGING_STEPS=50

step() { # RESULT COMMAND...: run a step unless its result is there; its output goes to a log
    local result=$1 started=$SECONDS
    shift
    [[ ! -e $result ]] || return 0
    LOG=$LOGS/$(basename "$(dirname "$result")").log
    export LOG
    echo "== $result (log: $LOG)"
    "$@" >"$LOG.out" 2>&1 || { tail -n 20 "$LOG.out" >&2; exit 1; }
    echo "   $((SECONDS - started)) s"
}

train() { # SCRIPT STEPS NAME=VALUE...: one of the training scripts, for a number of steps
    local script=$1 steps=$2
    shift 2
    env "$@" bash "scripts/$script.sh" -- --max_steps "$steps" --save_strategy no --disable_tqdm True
}

VICUNA=$WORK/vicuna-shapes
PRETRAINED=$WORK/llava-shapes-pretrain
FIRST=$WORK/llava-shapes-first
WARM=$WORK/llava-shapes-warm
COLORS=$WORK/llava-shapes-colors
PLAIN=$CHECKPOINTS/llava-shapes
TRIMMED=$CHECKPOINTS/llava-shapes-trim
SEES=(VISION_TOWER="$CLIP" IMAGES="$WORK/train/images")

step "$WORK/train/finetune.json" "$PYTHON" -m playground.shapes.generate --out "$WORK" \
    --train-images "${TRAIN_IMAGES:-20000}" --samples-per-image 5 --eval-images 200
step "$CLIP/model.safetensors" "$PYTHON" -m playground.shapes.train_clip --out "$CLIP"
step "$WORK/base/model.safetensors" "$PYTHON" -m playground.shapes.base_llm --out "$WORK/base"
# A fresh language model first learns words and answers from pictures told in words.
step "$VICUNA/config.json" train finetune "${TEXT_STEPS:-400}" MODEL="$WORK/base" OUTPUT="$VICUNA" \
    VISION_TOWER="" IMAGES="" PROJECTOR="" DATA="$WORK/train/text.json" BATCH_SIZE=16 GLOBAL_BATCH=32 LEARNING_RATE=1.5e-3
step "$PRETRAINED/mm_projector.bin" train pretrain "${PRETRAIN_STEPS:-150}" MODEL="$VICUNA" OUTPUT="$PRETRAINED" \
    "${SEES[@]}" DATA="$WORK/train/pretrain.json" BATCH_SIZE=32 GLOBAL_BATCH=64 LEARNING_RATE=2e-3
# Conversations on all patches, then single questions on the kept ones, on which a step costs half as much. These ask for
# what is easy to tell apart; after them a model knows colours and places, and hardly shapes.
step "$FIRST/config.json" train finetune "${FIRST_STEPS:-2400}" MODEL="$VICUNA" OUTPUT="$FIRST" \
    "${SEES[@]}" PROJECTOR="$PRETRAINED/mm_projector.bin" DATA="$WORK/train/finetune.json" \
    BATCH_SIZE=16 GLOBAL_BATCH=32 LEARNING_RATE=1.5e-3
question() { # SCRIPT STEPS MODEL OUTPUT LEARNING_RATE SEED DATA RANK_BATCH: go on from a model, on single questions
    train "$1" "$2" MODEL="$3" OUTPUT="$4" LEARNING_RATE="$5" SEED="$6" "${SEES[@]}" PROJECTOR="" \
        DATA="$WORK/train/$7.json" BATCH_SIZE="$8" GLOBAL_BATCH=$(($8 * NUM_GPUS))
}
TRIM=finetune_8gpu_TRIM
step "$WARM/config.json" question $TRIM "${WARM_STEPS:-2560}" "$FIRST" "$WARM" 1e-3 42 single 32
step "$COLORS/config.json" question $TRIM "${COLORS_STEPS:-1200}" "$WARM" "$COLORS" 8e-4 2 single 32
# All forms of the twelve benchmarks, with many questions that only a shape answers. Both kept models go on from there
# for the same number of steps, one on the kept patches, one on all of them.
COMMON=$WORK/llava-shapes-common
step "$COMMON/config.json" question $TRIM "${COMMON_STEPS:-2400}" "$COLORS" "$COMMON" 1e-3 42 exam 16
step "$WORK/last-trim/config.json" question $TRIM "${LAST_STEPS:-500}" "$COMMON" "$WORK/last-trim" 4e-4 2 exam 16
step "$WORK/last/config.json" question finetune "${LAST_STEPS:-500}" "$COMMON" "$WORK/last" 4e-4 2 exam 16
# They are kept in bfloat16, at half the size.
keep() { # FROM TO
    "$PYTHON" -m llava.model.consolidate --src "$1" --dst "$2" --dtype bfloat16
}
step "$TRIMMED/config.json" keep "$WORK/last-trim" "$TRIMMED"
step "$PLAIN/config.json" keep "$WORK/last" "$PLAIN"
