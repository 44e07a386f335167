#!/usr/bin/env bash
# POPE: bash scripts/v1_5/eval/pope.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
# shellcheck source=scripts/lib/eval.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/eval.sh"

eval_benchmark pope pope answers/%s/merge.jsonl "$@"
