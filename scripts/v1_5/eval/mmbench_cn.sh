#!/usr/bin/env bash
# MMBench-CN: bash scripts/v1_5/eval/mmbench_cn.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
# The table may lie in mmbench (LLaVA's documentation) or in mmbench_cn (its script). The workbook for the server is
# written, too.
# shellcheck source=scripts/lib/eval.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/eval.sh"

split=mmbench_dev_cn_20231003
folders="mmbench_cn mmbench"
if [[ -f $(absolute_path "${LLAVA_EVAL_ROOT:-$REPO_ROOT/playground/data/eval}")/mmbench/$split.tsv ]]; then
    folders=mmbench
fi
eval_benchmark --export "answers_upload/$split/%s" mmbench_cn "$folders" "answers/$split/%s/merge.jsonl" "$@"
