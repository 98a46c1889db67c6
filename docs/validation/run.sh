#!/bin/sh
# All cells of cells.json, on a machine with a GPU, about ten minutes:
#
#     docs/validation/run.sh PROFILE GPT_OSS_TRACE OUT
#
# PROFILE is what `simctl calibrate` wrote there, GPT_OSS_TRACE the recorded trace of gpt-oss-20b
# (`simctl trace import`), OUT the folder for cells.json, reports and timelines. ONLY="olmoe" runs
# some of the models, ATTEMPTS=1 every cell once however disturbed, RECORD=1 Mixtral-8x7B at all 32
# layers as well; cells are merged.
set -u
python=${PYTHON:-python3}
profile=$1 gptoss=$2 out=$3
granular=traces/samples/granular-64x8.parquet
coarse=traces/samples/coarse-8x2.parquet
failed=0
mkdir -p "$out"

validate() {
    name=$1
    shift
    case " ${ONLY:-$name} " in *" $name "*) ;; *) return ;; esac
    "$python" -m simctl validate --hardware "$profile" --device cuda --cells "$out/cells.json" \
        --cache 25% --cache 50% --batch 1 --batch 8 --sequences 8 --max-tokens 24 \
        --attempts "${ATTEMPTS:-3}" --timeline "$out/$name.json.gz" "$@" || failed=1
}

exact="--policy lru --policy lfru --policy predictive"
# The recorded trace has no gate weights, which mixed needs.
validate gpt-oss-20b --trace "$gptoss" $exact --policy lfu
validate mixtral-8x7b --trace "$coarse" --sizes mixtral-8x7b $exact --policy mixed
validate qwen3-30b --trace "$granular" --sizes qwen3-30b $exact --policy mixed
validate olmoe --trace "$granular" --sizes olmoe $exact --policy mixed

# For the record: Mixtral-8x7B at all 32 layers, 90 GB of experts, with as many slots as a token needs.
if [ "${RECORD:-}" ]; then
    "$python" -m simctl trace synth --layers 32 --experts 8 --top-k 2 --sizes mixtral-8x7b \
        --sequences 1 --prompt 16 --decode 16 "$out/mixtral-32.parquet"
    "$python" -m simctl validate --hardware "$profile" --device cuda --cells "$out/cells.json" \
        --trace "$out/mixtral-32.parquet" --policy lru --slots 2 || failed=1
    rm "$out/mixtral-32.parquet"
fi
"$python" -m simctl validate --from-cells "$out/cells.json" --report "$out/report" || failed=1
exit $failed
