#!/usr/bin/env bash
# ScienceQA: bash scripts/v1_5/eval/sqa.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
# shellcheck source=scripts/lib/eval.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/eval.sh"

eval_benchmark sqa scienceqa answers/%s/merge.jsonl "$@"
