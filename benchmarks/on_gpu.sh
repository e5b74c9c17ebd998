#!/usr/bin/env bash
# Everything that waits for a GPU, in one command and under nine minutes:
#
#     bash benchmarks/on_gpu.sh
#
# checks the device's arithmetic, times all kinds of step in float32 and bfloat16, at im2txt's batch and at the one that saturates
# the device, the same step in PyTorch turn by turn, and captioning, traces where a step's time goes, trains to a score, and prints
# one summary. Every part has a time limit of its own; one that fails or runs out of time does not stop the others, but the exit
# status is 1, and what it had measured is in its .partial file.
#
#     OUT=out               where results go (at most 8 small files; what was said and the trace are in rest.tar.gz); a part that
#                           has succeeded is not run again
#     FORCE=1               run it again all the same
#     PARTS="decode ..."    only these parts
#     PARTS=second          what a second call of nine minutes is for: the encoder's convolutions one by one beside cuDNN's, steps
#                           with five captions a photo, and the cached step under other flags of XLA
#     TINY=1                tiny sizes on any machine: tries this script and measures nothing
#     PYTHON=python3        default: .venv/bin/python where there is one
#
# Needs jax, flax, optax, sacrebleu, tqdm and regex; no data, no weights, no network. PyTorch is compared with where it is there.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-out}
tiny=() steps=(--batch 32 256) decode=(--batch 256 32 1 --beam 3 1) fewer_kinds=() profiled=(cached_8 frozen joint) saturated=(joint)
peers=(--kinds frozen joint cached beam
  --forms channels_last+graph+fused channels_last+compile+graph+fused graph+fused compile+graph+fused beam:graph)
variants=(--kinds cached_8 --turns 2 --repeats 5 --limit 90) convolutions=(--batch 32 --passes forward input kernel --turns 3)
peer=() # of the convolutions, where PyTorch is there
[[ ${PARTS:-} == second ]] && PARTS="convolutions five variants"
patience=1
if [[ -n ${TINY:-} ]]; then
  tiny=(--tiny) steps=() decode=(--batch 2 --beam 3) fewer_kinds=(--kinds cached) profiled=(cached) saturated=(cached)
  peers=(--kinds cached --forms cached:eager)
  variants=(--tiny --turns 1 --repeats 1 --only "recurrence in one piece") convolutions=(--encoder small_cnn --batch 2 --turns 1)
  patience=10 # for a machine that is busy with other things
  export JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_PLATFORMS=cpu
fi
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
mkdir -p "$OUT" || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$scratch/cache}  # the trace's steps were compiled by then
failed=()

# part NAME SECONDS MODULE ARGUMENT... writes $OUT/NAME.json and adds what it says to $OUT/log.txt.
part() {
  local name=$1 limit=$2 module=$3 status start=$SECONDS
  shift 3
  if [[ -n ${PARTS:-} && " $PARTS " != *" $name "* ]]; then return; fi
  if [[ -z ${FORCE:-} ]] && grep -qs '"ok": true' "$OUT/$name.json"; then
    echo "== $name: there already (FORCE=1 runs it again)"
    return
  fi
  echo "== $name"
  rm -f "$OUT/$name.json" "$OUT/$name.json.partial"
  timeout --kill-after=5 $((limit * patience)) "$PYTHON" -m "benchmarks.$module" --json "$OUT/$name.json" "$@" 2>&1 | tee -a "$OUT/log.txt"
  status=${PIPESTATUS[0]}
  echo "== $name: exit status $status, $((SECONDS - start)) s" | tee -a "$OUT/log.txt"
  ((status == 0)) || failed+=("$name")
}

# The order is that of worth: if the machine is taken away half way, what matters most is there.
part correctness 100 correctness "${tiny[@]}"
part steps_float32 75 step_time "${tiny[@]}"
part steps_bfloat16 160 step_time "${steps[@]}" --dtype bfloat16 "${fewer_kinds[@]}" --saturate "${saturated[@]}" "${tiny[@]}"
if "$PYTHON" -c 'import torch' 2> "$scratch/no_torch"; then
  peer=(--peer)
  part peers 90 peers "${peers[@]}" --dtype bfloat16 --limit 45 "${tiny[@]}"
else
  echo "== peers: left out, PyTorch is not installed"
fi
part decode 50 decode "${decode[@]}" "${tiny[@]}"
part training 25 training "${tiny[@]}"
part profile 35 step_time --kinds "${profiled[@]}" --dtype bfloat16 --repeats 5 --profile "$scratch/trace" "${tiny[@]}"
if [[ -n ${PARTS:-} ]]; then
  part convolutions 160 convolutions "${convolutions[@]}" --dtype bfloat16 "${peer[@]}"
  part five 70 step_time --kinds frozen_5 joint_5 --dtype bfloat16 "${tiny[@]}"
  part variants 300 variants "${variants[@]}" --dtype bfloat16
else
  echo "== for a second call: PARTS=second"
fi

echo
echo "== summary, $SECONDS s"
"$PYTHON" -m benchmarks.summary "$OUT" | tee -a "$OUT/log.txt"
# One file of what was said and of the trace that TensorBoard and Perfetto read, without a trace that is larger than 15 MiB.
kept=$(mktemp -d -p "$scratch")
[[ -f $OUT/rest.tar.gz ]] && tar -xzf "$OUT/rest.tar.gz" -C "$kept"
cat "$OUT/log.txt" >> "$kept/log.txt" && rm "$OUT/log.txt"
[[ -d $scratch/trace ]] && rm -rf "$kept/trace" && mv "$scratch/trace" "$kept/trace"
tar -czf "$scratch/rest.tar.gz" -C "$kept" .
(($(stat -c %s "$scratch/rest.tar.gz") < 15 * 2**20)) || tar -czf "$scratch/rest.tar.gz" -C "$kept" log.txt
mv "$scratch/rest.tar.gz" "$OUT/rest.tar.gz"
if ((${#failed[@]})); then
  echo
  echo "failed or out of time: ${failed[*]}"
  exit 1
fi
