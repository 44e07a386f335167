#!/usr/bin/env bash
# MME: bash scripts/v1_5/eval/mme.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
# The files for MME's own eval_tool/calculation.py are written, too.
# shellcheck source=scripts/lib/eval.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/eval.sh"

eval_benchmark --export eval_tool/answers/%s mme MME answers/%s.jsonl "$@"
