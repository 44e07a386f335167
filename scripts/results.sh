#!/usr/bin/env bash
# Every method at four budgets on the twelve benchmarks of the shapes world, for the plain checkpoint and for the one that
# was finetuned with TRIM: the figures of docs/results.md. Goes on where it was stopped.
#   bash scripts/results.sh OUT            # OUT/plain and OUT/finetuned: overview.md, table.*, report.html
#   RESULTS_IMAGES=200 BENCHMARKS="pope gqa" bash scripts/results.sh OUT
# LLaVA-Bench and MM-Vet need a language model as judge; here an offline stand-in compares texts.
# shellcheck source=scripts/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
show_help "$@"
use_environment

OUT=$(absolute_path "${1:?use: bash scripts/results.sh OUT}")
IMAGES=${RESULTS_IMAGES:-60} # images per benchmark
BENCHMARKS=${BENCHMARKS:-all}
METHODS=(
    TRIM:-1 TRIM "TRIM,position_ids=original" VisionZip FasterVLM VisPruner DivPrune CDPruner SCOPE "HiPrune,object_layer=2"
    HoloV PruMerge PruMerge+ FastV PyramidDrop SparseVLM DART
)
export LLAVA_EVAL_ROOT=$OUT/data/eval HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [[ ! -d $OUT/data ]]; then # whole or not at all
    rm -rf "$OUT/data.new"
    "$PYTHON" -m playground.shapes.generate --out "$OUT/data.new" --train-images 0 --eval-images "$IMAGES" --seed 7
    mv "$OUT/data.new" "$OUT/data"
fi
compare() { # RUN CHECKPOINT
    # shellcheck disable=SC2086 # benchmarks are names without blanks
    "$PYTHON" -m llava.eval compare --model-path "playground/shapes/checkpoints/$2" --methods "${METHODS[@]}" \
        --budgets 32 24 16 8 --tasks $BENCHMARKS --judge exact --out "$OUT/$1" >"$OUT/$1.log" 2>&1 ||
        { tail -n 5 "$OUT/$1.log" >&2; echo "error: $1: see $OUT/$1.log" >&2; return 1; }
}

pass_signals_on
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two comparisons at a time, one core each
compare plain llava-shapes & first=$!
compare finetuned llava-shapes-trim & second=$!
failed=0
for pid in "$first" "$second"; do wait "$pid" || failed=1; done
[[ $failed == 0 ]] || exit 1
for run in plain finetuned; do
    echo "== $run"
    cat "$OUT/$run/overview.md"
done
