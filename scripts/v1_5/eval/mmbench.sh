#!/usr/bin/env bash
# MMBench: bash scripts/v1_5/eval/mmbench.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
# Of the two versions of the table the one that is there, of both LLaVA's; -- --split NAME takes another. The workbook for
# the server is written, too.
# shellcheck source=scripts/lib/eval.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/eval.sh"

split=mmbench_dev_20230712
root=$(absolute_path "${LLAVA_EVAL_ROOT:-$REPO_ROOT/playground/data/eval}")/mmbench
if [[ ! -f $root/$split.tsv && -f $root/mmbench_dev_en_20231003.tsv ]]; then
    split=mmbench_dev_en_20231003
fi
eval_benchmark --export "answers_upload/$split/%s" mmbench mmbench "answers/$split/%s/merge.jsonl" "$@"
