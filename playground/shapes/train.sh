#!/usr/bin/env bash
# The whole recipe of the pocket models: pictures, CLIP, language model, projector, and LLaVA plain and with TRIM.
#   bash playground/shapes/train.sh             all steps; a step whose result is there is not repeated
#   WORK=elsewhere bash playground/shapes/train.sh    pictures and intermediate models go there (default: playground/shapes/data)
#   CHECKPOINTS=elsewhere ...                   where the three kept checkpoints go (default: playground/shapes/checkpoints)
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
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

step() { # RESULT COMMAND...: run a step unless its result is there; its output goes to a log
    local result=$1 log started=$SECONDS
    shift
    [[ ! -e $result ]] || return 0
    log=$LOGS/$(basename "$(dirname "$result")").log
    echo "== $result (log: $log)"
    "$@" >"$log" 2>&1 || { tail -n 20 "$log" >&2; exit 1; }
    echo "   $((SECONDS - started)) s"
}

train() { # OUTPUT_DIR FLAGS...
    local output=$1
    shift
    "$PYTHON" -m llava.train.train --output_dir "$output" --bf16 True --num_train_epochs 1 --per_device_train_batch_size 64 \
        --lr_scheduler_type cosine --warmup_ratio 0.03 --weight_decay 0. --save_strategy no --logging_steps 50 \
        --model_max_length 512 --report_to none "$@"
}

VISION=(--vision_tower "$CLIP" --mm_vision_select_layer -2 --mm_projector_type mlp2x_gelu --image_aspect_ratio pad
    --image_folder "$WORK/train/images")

step "$WORK/train/finetune.json" "$PYTHON" -m playground.shapes.generate --out "$WORK" \
    --train-images "${TRAIN_IMAGES:-20000}" --samples-per-image "${SAMPLES_PER_IMAGE:-6}" --eval-images 200
step "$CLIP/model.safetensors" "$PYTHON" -m playground.shapes.train_clip --out "$CLIP"
step "$WORK/base/model.safetensors" "$PYTHON" -m playground.shapes.base_llm --out "$WORK/base"
# A fresh language model first learns words and answers from pictures told in words.
step "$WORK/vicuna-shapes/config.json" train "$WORK/vicuna-shapes" --model_name_or_path "$WORK/base" --version v1 \
    --data_path "$WORK/train/text.json" --learning_rate 2e-3 --max_steps "${TEXT_STEPS:-600}"
step "$WORK/llava-shapes-pretrain/mm_projector.bin" train "$WORK/llava-shapes-pretrain" \
    --model_name_or_path "$WORK/vicuna-shapes" --version plain --tune_mm_mlp_adapter True \
    --data_path "$WORK/train/pretrain.json" --learning_rate 2e-3 "${VISION[@]}"
FINETUNE=(--model_name_or_path "$WORK/vicuna-shapes" --version v1 --data_path "$WORK/train/finetune.json"
    --pretrain_mm_mlp_adapter "$WORK/llava-shapes-pretrain/mm_projector.bin" --learning_rate 1e-3 "${VISION[@]}")
step "$CHECKPOINTS/llava-shapes-trim/config.json" train "$CHECKPOINTS/llava-shapes-trim" "${FINETUNE[@]}" \
    --mm_vision_token_reduce_func TRIM:-1
step "$CHECKPOINTS/llava-shapes-plain/config.json" train "$CHECKPOINTS/llava-shapes-plain" "${FINETUNE[@]}"
