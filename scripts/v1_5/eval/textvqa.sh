#!/usr/bin/env bash
# TextVQA: bash scripts/v1_5/eval/textvqa.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
# shellcheck source=scripts/lib/eval.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/eval.sh"

eval_benchmark textvqa textvqa answers/%s/merge.jsonl "$@"
