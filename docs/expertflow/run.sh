#!/bin/sh
# ExpertFlow's claims beside what is built here, simulated: every table and figure of
# docs/expertflow.md. Half an hour to an hour on one core; OUT gets JSON and PNG:
#
#     docs/expertflow/run.sh OUT [GPT_OSS [SEQUENCES]]
#
# Forecasts are those of the predictors that ship. GPT_OSS is a recording of gpt-oss-20b's routing
# that simctl trace import reads, of which the first SEQUENCES (16) are run; without it
# OUT/gaps-gpt-oss.json stays as it is. Tables are printed; where OUT is docs/expertflow they go
# into the page. ONLY=hits,speeds runs these parts alone. Leaves with 1 where predictive is slower
# than lru by more than 2 %.
set -eu
out=${1:?OUT is missing: docs/expertflow/run.sh OUT [GPT_OSS [SEQUENCES]]}
recording=${2:-} sequences=${3:-16}
python=${PYTHON:-python3}
export PYTHONPATH=.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

for name in coarse-8x2 granular-64x8; do
    "$python" -m simctl predictor forecast --trace "traces/samples/$name.parquet" \
        --predictor "traces/predictors/$name.safetensors" --out "$work/$name.npz" --device cpu
done
set -- "$out" --forecasts "$work"
if [ -n "$recording" ]; then
    "$python" -m simctl trace import "$recording" "$work/all.parquet" --sizes gpt-oss-20b
    "$python" -m simctl trace split "$work/all.parquet" "$work/gpt-oss-20b.parquet" \
        --sequences "$sequences"
    set -- "$@" --gpt-oss "$work/gpt-oss-20b.parquet"
fi
if [ -n "${ONLY:-}" ]; then set -- "$@" --only "$ONLY"; fi
case ${out%/} in docs/expertflow) set -- "$@" --page docs/expertflow.md ;; esac
"$python" -m benchmarks.expertflow "$@"
