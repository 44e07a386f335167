#!/usr/bin/env bash
# LLaVA-Bench (in the wild): bash scripts/v1_5/eval/llavabench.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
# A language model judges the answers: OPENAI_API_KEY, OPENAI_BASE_URL, -- --judge-model MODEL; or -- --judge exact.
# shellcheck source=scripts/lib/eval.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/eval.sh"

eval_benchmark llavabench llava-bench-in-the-wild answers/%s.jsonl "$@"
