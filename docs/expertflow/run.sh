#!/bin/sh
# How much the parts of ExpertFlow win, simulated, on the sample traces; about four minutes:
#
#     docs/expertflow/run.sh OUT
#
# Forecasts are those of the predictors that ship. OUT gets gaps-*.json; tables are printed.
set -eu
out=$1
mkdir -p "$out"

gaps() {
    name=$1 sizes=$2
    PYTHONPATH=. python3 -m simctl predictor forecast --trace "traces/samples/$name.parquet" \
        --predictor "traces/predictors/$name.safetensors" --out "$out/$name.npz" --device cpu
    PYTHONPATH=. python3 benchmarks/expertflow_gaps.py --json "$out/gaps-${name%%-*}.json" \
        --trace "traces/samples/$name.parquet:$sizes:$out/$name.npz"
}

gaps coarse-8x2 mixtral-8x7b
gaps granular-64x8 qwen3-30b
