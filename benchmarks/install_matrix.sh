#!/usr/bin/env bash
# Does the package install and run where nobody has a checkout?
#
#   benchmarks/install_matrix.sh python3.10 python3.13     one clean environment for each interpreter
#   LOWEST=1 benchmarks/install_matrix.sh python3.10       the oldest version that each range of pyproject.toml allows
#   NEWEST=1 benchmarks/install_matrix.sh python3.13       the newest, constraints.txt or not
#
# For each: sdist, the wheel built from the sdist, a new environment, the wheel with its dependencies (constraints.txt, or
# their lower bounds), then from an empty folder far away a fit of the shipped quickstart cut to two updates, an export of
# its checkpoint, and that the module is the installed one. One line of JSON an interpreter on standard output, everything
# else in WORK/*.log. Needs uv for LOWEST=1 (`pip install uv`), and uses it where it is there. WORK (default: a new folder)
# keeps the environments, of several gigabytes each where torch brings CUDA.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=${WORK:-$(mktemp -d)}
lowest=${LOWEST:+lowest} newest=${NEWEST:+newest}
(($#)) || { sed -n '2,13p' "$0" >&2; exit 2; }
mkdir -p "$work"

build() {  # the wheel of the sdist of what git holds: neither local files nor links can hide a missing one
  local python=$1
  rm -rf "$work/source" "$work/dist"
  mkdir "$work/source"
  git -C "$root" archive HEAD | tar -x -C "$work/source"
  if command -v uv >/dev/null; then
    uv build -q --python "$python" --out-dir "$work/dist" "$work/source"
  else
    "$python" -m venv "$work/venv-build"
    "$work/venv-build/bin/python" -m pip install -q build
    "$work/venv-build/bin/python" -m build --outdir "$work/dist" "$work/source" >/dev/null
  fi
}

install() {  # $1 interpreter, $2 environment
  if command -v uv >/dev/null; then
    uv venv -q --clear --python "$1" "$2"
    local pinned=(-c "$root/constraints.txt")
    [[ -z $newest ]] || pinned=()
    if [[ -n $lowest ]]; then  # the ranges must be given directly: those of a wheel's metadata resolve to the newest
      uv pip install -q --python "$2/bin/python" --resolution lowest-direct -r "$work/source/pyproject.toml"
      pinned=(--no-deps)
    fi
    uv pip install -q --python "$2/bin/python" "${pinned[@]}" "$(echo "$work"/dist/*.whl)"
  else
    [[ -z $lowest ]] || { echo "LOWEST=1 needs uv: pip install uv" >&2; return 2; }
    "$1" -m venv --clear "$2"
    local pinned=(-c "$root/constraints.txt")
    [[ -z $newest ]] || pinned=()
    "$2/bin/python" -m pip install -q "${pinned[@]}" "$work"/dist/*.whl
  fi
}

run() {  # $1 the environment's python; in an empty folder
  "$1" -m nspo_lightning --help
  "$1" -m nspo_lightning fit -c quickstart --trainer.max_steps 2 --trainer.limit_val_batches 1 \
    --trainer.enable_progress_bar false --data.val_size 8 --data.test_size 8 --data.calibration_size 64
  "$1" -m nspo_lightning export --ckpt runs/quickstart/checkpoints/last.ckpt --out adapter
  test -s adapter/adapter_model.safetensors
  "$1" -c "import nspo_lightning, pathlib; p = pathlib.Path(nspo_lightning.__file__); assert 'site-packages' in p.parts, p"
}

build "$1" >"$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 1; }
failed=0
for python in "$@"; do
  name=$(basename "$python")-${lowest:+lowest-}${newest:+newest-}$("$python" -c 'import platform; print(platform.python_version())')
  env=$work/venv-$name
  far=$(mktemp -d)
  code=0
  # In a shell of its own: inside `if` or `||`, `set -e` would not stop at the first command that fails.
  export -f install run
  root=$root work=$work lowest=$lowest newest=$newest bash -euc 'install "$1" "$2"; cd "$3"; run "$2/bin/python"' _ \
    "$python" "$env" "$far" >"$work/$name.log" 2>&1 || code=$?
  rm -rf "$far"
  ((code == 0)) || { failed=1; tail -n 20 "$work/$name.log" >&2; }
  versions=$("$env/bin/python" - 2>/dev/null <<'P' || echo '{}'
import json
from importlib.metadata import PackageNotFoundError, version

def of(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None

names = "nspo-lightning torch lightning transformers peft bitsandbytes datasets torchmetrics tensorboard".split()
print(json.dumps({n: of(n) for n in [*names, "jsonargparse", "safetensors", "matplotlib", "rich"]}))
P
)
  echo "{\"python\": \"$name\", \"exit\": $code, \"versions\": $versions}"
done
exit $failed
