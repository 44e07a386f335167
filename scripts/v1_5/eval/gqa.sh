#!/usr/bin/env bash
# GQA: bash scripts/v1_5/eval/gqa.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
# The predictions for GQA's own eval.py are written beside the answers.
# shellcheck source=scripts/lib/eval.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/eval.sh"

eval_benchmark --export answers/llava_gqa_testdev_balanced/%s \
    gqa gqa answers/llava_gqa_testdev_balanced/%s/merge.jsonl "$@"
