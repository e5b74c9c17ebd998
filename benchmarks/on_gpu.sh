#!/usr/bin/env bash
# Everything that waits for a GPU, in one command and under nine minutes:
#
#     bash benchmarks/on_gpu.sh
#
# times all kinds of step in bfloat16 at im2txt's batch, the same steps in PyTorch turn by turn, and captioning, checks the
# device's arithmetic, trains to a score, traces where a step's time goes, and prints one summary. Most of that time goes into
# compiling. Every part has a time limit of its own; one that fails or runs out of time does not stop the others, but the exit
# status is 1, and what it had measured is in its .partial file. What no time was left for is named at the end.
#
#     OUT=out               where results go (at most 7 small files, 13 after a second call; what was said and the trace are in
#                           rest.tar.gz); a part that has succeeded is not run again
#     FORCE=1               run it again all the same
#     LIMIT_S=530           seconds for all parts together
#     PARTS="decode ..."    only these parts
#     PARTS=second          what a second call is for: the LSTM by itself beside cuDNN's, the batch that saturates the device, steps in
#                           float32 and with five captions a photo, the cached step under other flags of XLA, and the encoder's
#                           convolutions beside cuDNN's
#     TINY=1                tiny sizes on any machine: tries this script and measures nothing
#     PYTHON=python3        default: .venv/bin/python where there is one
#
# Needs jax, flax, optax, sacrebleu, tqdm and regex; no data, no weights, no network. PyTorch is compared with where it is there.
# A second call on the same machine finds the programs of the first compiled.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-out} LIMIT_S=${LIMIT_S:-530}
FIRST="steps peers decode correctness training profile" SECOND="recurrence steps_large steps_float32 five variants convolutions"
tiny=() decode=(--batch 256 --beam 3 --sources features photos) kinds=(--kinds cached_8 joint frozen eval cached) large=(--batch 256 --kinds joint frozen)
saturated=joint profiled=(cached_8 joint frozen) five=(--kinds frozen_5 joint_5)
peers=(--kinds joint frozen cached beam --forms {joint,frozen}:channels_last+graph+fused {joint,frozen}:channels_last+compile+graph+fused
  cached:graph+fused cached:compile+graph+fused beam:graph)
variants=(--kinds cached_8 --turns 1 --repeats 5 --limit 60) convolutions=(--batch 32 --passes forward input kernel --turns 3) recurrence=(--batch 32 256)
peer=() # of the convolutions, where PyTorch is there
patience=1
if [[ -n ${TINY:-} ]]; then
  tiny=(--tiny) decode=(--batch 2 --beam 3) kinds=() large=(--kinds cached) saturated=cached profiled=(cached) five=(--kinds frozen_5)
  peers=(--kinds cached --forms cached:eager)
  variants=(--tiny --turns 1 --repeats 1 --only "recurrence in one piece") convolutions=(--encoder small_cnn --batch 2 --turns 1)
  recurrence=(--batch 2 --words 3 --units 8 --turns 1 --calls 1)
  patience=10 # for a machine that is busy with other things
  export JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_PLATFORMS=cpu
fi
read -rd '' -a words <<< "${PARTS:-}"
PARTS="${words[*]}"
case $PARTS in
  "") PARTS=$FIRST ;;
  second) PARTS=$SECOND ;;
esac
for word in "${words[@]}"; do
  if [[ $PARTS != "$SECOND" && " $FIRST $SECOND " != *" $word "* ]]; then
    echo "error: PARTS has no \"$word\": name some of $FIRST $SECOND, with spaces between, or second alone" >&2
    exit 2
  fi
done
if [[ ! $LIMIT_S =~ ^[1-9][0-9]*$ ]]; then
  echo "error: LIMIT_S must be a whole number of seconds above 0, not \"$LIMIT_S\"" >&2
  exit 2
fi
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
mkdir -p "$OUT" || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
programs=${TMPDIR:-/tmp}/jaxcap-on-gpu-$UID
[[ -n ${TINY:-} ]] && programs=$scratch/programs
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$programs}
failed=() waiting=()

# part NAME SECONDS MODULE ARGUMENT... writes $OUT/NAME.json and adds what it says to $OUT/log.txt.
part() {
  local name=$1 limit=$(($2 * patience)) module=$3 status start=$SECONDS left=$((LIMIT_S * patience - SECONDS))
  shift 3
  if [[ " $PARTS " != *" $name "* ]]; then return; fi
  if [[ -z ${FORCE:-} ]] && grep -qs '"ok": true' "$OUT/$name.json"; then
    echo "== $name: there already (FORCE=1 runs it again)"
    return
  fi
  if ((left < 20)); then
    waiting+=("$name")
    return
  fi
  echo "== $name"
  rm -f "$OUT/$name.json" "$OUT/$name.json.partial"
  timeout --kill-after=5 $((limit < left ? limit : left)) \
    "$PYTHON" -m "benchmarks.$module" --json "$OUT/$name.json" "$@" 2>&1 | tee -a "$OUT/log.txt"
  status=${PIPESTATUS[0]}
  echo "== $name: exit status $status, $((SECONDS - start)) s" | tee -a "$OUT/log.txt"
  ((status == 0)) || failed+=("$name")
}

# The order is that of worth: if the machine is taken away half way, what matters most is there.
part steps 240 step_time "${kinds[@]}" --dtype bfloat16 "${tiny[@]}"
if "$PYTHON" -c 'import torch' 2> "$scratch/no_torch"; then
  peer=(--peer)
  part peers 300 peers "${peers[@]}" --dtype bfloat16 --limit 120 "${tiny[@]}"
elif [[ " $PARTS " == *" peers "* ]]; then
  echo "== peers: left out, PyTorch is not installed"
fi
part decode 90 decode "${decode[@]}" --dtype bfloat16 "${tiny[@]}"
# Which algorithm is the fastest is no matter for whether it is right, and to find it takes most of the time.
XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_autotune_level=0" part correctness 90 correctness "${tiny[@]}"
part training 40 training "${tiny[@]}"
part profile 45 step_time --kinds "${profiled[@]}" --dtype bfloat16 --repeats 5 --profile "$scratch/trace" "${tiny[@]}"

part recurrence 90 recurrence "${recurrence[@]}" --dtype bfloat16 "${peer[@]}"
part steps_large 330 step_time "${large[@]}" --saturate "$saturated" --dtype bfloat16 "${tiny[@]}"
part steps_float32 240 step_time "${kinds[@]}" "${tiny[@]}"
part five 150 step_time "${five[@]}" --dtype bfloat16 "${tiny[@]}"
part variants 300 variants "${variants[@]}" --dtype bfloat16
part convolutions 160 convolutions "${convolutions[@]}" --dtype bfloat16 "${peer[@]}"

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
if [[ $PARTS == "$FIRST" ]]; then
  echo
  echo "for a second call: PARTS=second"
fi
if ((${#waiting[@]})); then
  echo
  echo "no time was left for these: PARTS=\"${waiting[*]}\" takes them up"
fi
if ((${#failed[@]})); then
  echo
  echo "failed or out of time: ${failed[*]}"
fi
((${#failed[@]} + ${#waiting[@]} == 0))
