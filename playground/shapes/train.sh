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
    "$PYTHON" -m llava.train.train --output_dir "$output" --bf16 True --num_train_epochs 1 \
        --lr_scheduler_type cosine --warmup_ratio 0.03 --weight_decay 0. --save_strategy no --logging_steps 50 \
        --model_max_length 512 --report_to none --disable_tqdm True "$@"
    # A pickle of the flags, with this machine's paths in it; the log has the flags as well.
    rm -f "$output/training_args.bin"
    find "$output" -maxdepth 1 -name '*.safetensors' -exec chmod 644 {} +
}

VISION=(--vision_tower "$CLIP" --mm_vision_select_layer -2 --mm_projector_type mlp2x_gelu --image_aspect_ratio pad
    --image_folder "$WORK/train/images")
VICUNA=$WORK/vicuna-shapes
PRETRAINED=$WORK/llava-shapes-pretrain
FIRST=$WORK/llava-shapes-first
WARM=$WORK/llava-shapes-warm
FOCUS=$WORK/llava-shapes-focus
PLAIN=$CHECKPOINTS/llava-shapes
TRIMMED=$CHECKPOINTS/llava-shapes-trim

step "$WORK/train/finetune.json" "$PYTHON" -m playground.shapes.generate --out "$WORK" \
    --train-images "${TRAIN_IMAGES:-20000}" --samples-per-image 5 --eval-images 200
step "$CLIP/model.safetensors" "$PYTHON" -m playground.shapes.train_clip --out "$CLIP"
step "$WORK/base/model.safetensors" "$PYTHON" -m playground.shapes.base_llm --out "$WORK/base"
# A fresh language model first learns words and answers from pictures told in words.
step "$VICUNA/config.json" train "$VICUNA" --model_name_or_path "$WORK/base" --version v1 \
    --data_path "$WORK/train/text.json" --per_device_train_batch_size 32 --learning_rate 1.5e-3 --max_steps "${TEXT_STEPS:-400}"
step "$PRETRAINED/mm_projector.bin" train "$PRETRAINED" --model_name_or_path "$VICUNA" --version plain \
    --tune_mm_mlp_adapter True --data_path "$WORK/train/pretrain.json" --per_device_train_batch_size 64 \
    --learning_rate 2e-3 --max_steps "${PRETRAIN_STEPS:-150}" "${VISION[@]}"
# All kinds of conversations first, on all patches; then single questions on the kept ones, from which shapes are learned
# in far fewer steps. Both kept models go on from there, one on all patches, one on the kept ones.
step "$FIRST/config.json" train "$FIRST" --model_name_or_path "$VICUNA" --version v1 \
    --pretrain_mm_mlp_adapter "$PRETRAINED/mm_projector.bin" --data_path "$WORK/train/finetune.json" \
    --per_device_train_batch_size 32 --learning_rate 1.5e-3 --max_steps "${FIRST_STEPS:-2400}" "${VISION[@]}"
finetune() { # OUTPUT_DIR FROM REDUCTION LEARNING_RATE STEPS [SEED]
    train "$1" --model_name_or_path "$2" --version v1 --mm_vision_token_reduce_func "$3" --learning_rate "$4" \
        --data_path "$WORK/train/single.json" --per_device_train_batch_size 64 --max_steps "$5" --seed "${6:-42}" \
        "${VISION[@]}"
}
step "$WARM/config.json" finetune "$WARM" "$FIRST" TRIM:-1 5e-4 "${WARM_STEPS:-1000}"
step "$PLAIN/config.json" finetune "$PLAIN" "$WARM" none 1e-3 "${PLAIN_STEPS:-800}"
step "$FOCUS/config.json" finetune "$FOCUS" "$WARM" TRIM:-1 1e-3 "${FOCUS_STEPS:-1560}"
step "$TRIMMED/config.json" finetune "$TRIMMED" "$FOCUS" TRIM:-1 8e-4 "${TRIM_STEPS:-1200}" 2
