#!/usr/bin/env bash
# MM-Vet: bash scripts/v1_5/eval/mmvet.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
# A language model judges the answers: OPENAI_API_KEY, OPENAI_BASE_URL, -- --judge-model MODEL; or -- --judge exact.
# shellcheck source=scripts/lib/eval.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/eval.sh"

eval_benchmark --export results/%s mmvet "mm-vet mmvet" answers/%s.jsonl "$@"
