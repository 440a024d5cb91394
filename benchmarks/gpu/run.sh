#!/usr/bin/env bash
# What one GPU does, in at most nine minutes: sampling, the training step, TRL on the same work, calibration, profiles.
#   benchmarks/gpu/run.sh first       the main questions, at most 4 minutes
#   benchmarks/gpu/run.sh rest        everything else, at most 5
#   benchmarks/gpu/run.sh             both
#   benchmarks/gpu/run.sh first --scale tiny --device cpu [--only sampling-first,step-first]     the same in miniature
#   --stretch 10 gives each part ten times as long, for a CPU.
# Each part runs in a process of its own, within a time of its own, and writes OUT/<part>.json at once; a part that
# fails or runs out of time leaves what it had, with the error, and the next one starts. Read them with
#   python benchmarks/gpu/goals.py OUT
# In the environment:
#   OUT       folder of the results; benchmarks/results/gpu by default
#   PYTHON    the Python to run; python3 by default
#   WHEELS    folder of wheels that this Python lacks; they are unpacked beside it, nothing is downloaded
#   MODEL135  a small model (folder or .gguf) for `compare`; left out without it
#   DATA135   folder with harmful.jsonl and general.jsonl for that comparison
#   COMMIT    the commit, where there is no git
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$root/benchmarks/gpu
python=${PYTHON:-python3}
out=${OUT:-$root/benchmarks/results/gpu}
halves=() options=() only='' stretch=1
while (($#)); do
  case $1 in
    first | rest) halves+=("$1") ;;
    --only) only=,$2, && shift ;;
    --stretch) stretch=$2 && shift ;;
    --scale | --device) options+=("$1" "$2") && shift ;;
    *) echo "Expected first, rest, --scale, --device, --only or --stretch, got '$1'." >&2 && exit 2 ;;
  esac
  shift
done
((${#halves[@]})) || halves=(first rest)
mkdir -p "$out"

# Part and the seconds that are kept for it. A part may take longer where those before it left time, never so long that
# a later one gets less than its own.
first=(quickstart:30 tests:30 sampling-first:65 step-first:50 trl-first:65)
rest=(sampling-rest:45 step-rest:30 trl-rest:45 calibration:80 compare:50 profile:50)

if [[ -n ${WHEELS:-} ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
    "$WHEELS"/*.whl || echo "The wheels in $WHEELS could not be unpacked; going on without them." >&2
  PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# What would spoil every part is said before any: versions that don't go together, a wheel that is missing.
if [[ -z $only ]] && ! "$python" -W ignore -c 'import bitsandbytes, nspo_lightning.module.grpo_module'; then
  echo "The project can't be imported with $python, see above: nothing was run." >&2 && exit 1
fi

run_half() { # parts with their seconds
  local deadline=$SECONDS reserved=0 entry part seconds limit code
  for entry in "$@"; do ((reserved += stretch * ${entry#*:})); done
  ((deadline += reserved))
  for entry in "$@"; do
    part=${entry%:*} seconds=${entry#*:}
    ((reserved -= stretch * seconds))
    [[ -z $only || $only == *,$part,* ]] || continue
    limit=$((deadline - SECONDS - reserved))
    ((limit > 0)) || limit=1
    echo "== $part: at most $limit s"
    rm -f "$out/$part.json"
    # The part plans with three seconds less: for starting Python, and for writing its end.
    timeout -k 3 "$limit" "$python" -W ignore "$here/run_part.py" "$part" --out "$out" --seconds $((limit - 3)) \
      "${options[@]}" >"$out/$part.log" 2>&1
    code=$?
    "$python" -S "$here/record.py" "$part" "$code" "$out"
  done
}

for half in "${halves[@]}"; do
  if [[ $half == first ]]; then run_half "${first[@]}"; else run_half "${rest[@]}"; fi
done
"$python" -S "$here/goals.py" "$out"
