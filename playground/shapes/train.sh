#!/usr/bin/env bash
# The whole recipe of the pocket models: pictures, CLIP, language model, projector, and LLaVA plain and with TRIM. The
# training steps are the repository's own scripts on two CPU ranks.
#   bash playground/shapes/train.sh             all steps; a step whose result is there is not repeated
#   WORK=elsewhere bash playground/shapes/train.sh    pictures and intermediate models go there (default: playground/shapes/data)
#   CHECKPOINTS=elsewhere ...                   where the three kept checkpoints go (default: playground/shapes/checkpoints)
#   NUM_GPUS=8 ...                              ranks (default: 2, on the CPU where there is no GPU)
# shellcheck source=scripts/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib/environment.sh"
use_environment

WORK=${WORK:-playground/shapes/data}
CHECKPOINTS=${CHECKPOINTS:-playground/shapes/checkpoints}
CLIP=$CHECKPOINTS/shapes-clip
LOGS=$WORK/logs
mkdir -p "$WORK" "$CHECKPOINTS" "$LOGS"
pass_signals_on
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
    "$@" >"$LOG.out" 2>&1 &
    wait $! || { tail -n 20 "$LOG.out" >&2; exit 1; }
    echo "   $((SECONDS - started)) s"
}

train() { # SCRIPT STEPS NAME=VALUE...: one of the training scripts, for a number of steps
    local script=$1 steps=$2
    shift 2
    env "$@" bash "scripts/$script.sh" -- --max_steps "$steps" --save_strategy no --disable_tqdm True
}

LETTERS=$WORK/vicuna-shapes-letters
VICUNA=$WORK/vicuna-shapes
PRETRAINED=$WORK/llava-shapes-pretrain
FIRST=$WORK/llava-shapes-first
COMMON=$WORK/llava-shapes-common
AGAIN=$WORK/llava-shapes-again
PLAIN=$CHECKPOINTS/llava-shapes
TRIMMED=$CHECKPOINTS/llava-shapes-trim
TRIM=finetune_8gpu_TRIM

learn() { # SCRIPT STEPS MODEL OUTPUT LEARNING_RATE SEED DATA NAME=VALUE...: go on from a model, 32 samples a step
    train "$1" "$2" MODEL="$3" OUTPUT="$4" LEARNING_RATE="$5" SEED="$6" DATA="$WORK/train/$7.json" \
        BATCH_SIZE=$((32 / NUM_GPUS)) GLOBAL_BATCH=32 "${@:8}"
}
WORDS=(VISION_TOWER="" IMAGES="" PROJECTOR="")
SEES=(VISION_TOWER="$CLIP" IMAGES="$WORK/train/images" PROJECTOR="")

step "$WORK/train/finetune.json" "$PYTHON" -m playground.shapes.generate --out "$WORK" \
    --train-images "${TRAIN_IMAGES:-20000}" --samples-per-image 5 --eval-images 200
step "$CLIP/model.safetensors" "$PYTHON" -m playground.shapes.train_clip --out "$CLIP"
step "$WORK/base/model.safetensors" "$PYTHON" -m playground.shapes.base_llm --out "$WORK/base"
# A fresh language model first learns what a letter before an option is for, then answers about pictures told in words.
step "$LETTERS/config.json" learn finetune "${LETTERS_STEPS:-400}" "$WORK/base" "$LETTERS" 1e-3 1 letters "${WORDS[@]}"
step "$VICUNA/config.json" learn finetune "${TEXT_STEPS:-1400}" "$LETTERS" "$VICUNA" 1e-3 2 text "${WORDS[@]}"
step "$PRETRAINED/mm_projector.bin" learn pretrain "${PRETRAIN_STEPS:-150}" "$VICUNA" "$PRETRAINED" 2e-3 3 pretrain "${SEES[@]}"
# Conversations that ask for what is easy to tell apart.
step "$FIRST/config.json" learn $TRIM "${FIRST_STEPS:-900}" "$VICUNA" "$FIRST" 1e-3 4 finetune \
    "${SEES[@]}" PROJECTOR="$PRETRAINED/mm_projector.bin"
# All forms of the twelve benchmarks, with many questions that only a shape answers, twice in another order. Both kept
# models go on from there for the same number of steps, one on the kept patches, one on all of them.
step "$COMMON/config.json" learn $TRIM "${COMMON_STEPS:-2600}" "$FIRST" "$COMMON" 1e-3 5 exam "${SEES[@]}"
step "$AGAIN/config.json" learn $TRIM "${AGAIN_STEPS:-2600}" "$COMMON" "$AGAIN" 1e-3 7 exam "${SEES[@]}"
step "$WORK/last-trim/config.json" learn $TRIM "${LAST_STEPS:-500}" "$AGAIN" "$WORK/last-trim" 4e-4 6 exam "${SEES[@]}"
step "$WORK/last/config.json" learn finetune "${LAST_STEPS:-500}" "$AGAIN" "$WORK/last" 4e-4 6 exam "${SEES[@]}"
# They are kept in bfloat16, at half the size.
keep() { # FROM TO
    "$PYTHON" -m llava.model.consolidate --src "$1" --dst "$2" --dtype bfloat16
}
step "$TRIMMED/config.json" keep "$WORK/last-trim" "$TRIMMED"
step "$PLAIN/config.json" keep "$WORK/last" "$PLAIN"
