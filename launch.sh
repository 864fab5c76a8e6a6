#!/usr/bin/env bash
# Sets the project up where that is needed and runs a config's job.
#
#   ./launch.sh CONFIG [--processes N] [--dry-run] [--key value]...
#   ./launch.sh test [pytest arguments]
#
# The environment is the active one ($VIRTUAL_ENV, or $CONDA_PREFIX unless that is conda's base), and .venv beside
# this file where none is active. Installation is skipped while a stamp in the environment says that
# pyproject.toml, constraints.txt and the extras are as they were when it last succeeded.
#
# constraints.txt pins what the suite last passed with. torch alone is left as it is found when it lies in the
# project's range: builds of torch are for a machine, not for a project. Where there is none, a machine without
# an accelerator gets a CPU build from PyTorch's index if that can be reached, else whatever pip's own
# configuration offers. (An AMD GPU needs a ROCm build: install it first, it is kept.)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cpu_index="https://download.pytorch.org/whl/cpu"

say() { printf '%s\n' "$*" >&2; }
usage_error() { say "error: $*"; exit 2; }
fail() { say "error: $*"; exit 1; }

usage() {
  cat <<'TEXT'
usage: ./launch.sh CONFIG [--processes N] [--dry-run] [--key value]...
       ./launch.sh test [pytest arguments]

CONFIG            a YAML file whose `job:` line names the command, as `job: train finetune`
--processes N     processes of a training job; by default one per accelerator
--dry-run         print the command and stop; nothing is installed
--key value       overrides a key of the config
TEXT
}

# ------------------------------------------------------------------------------------------- the environment

# Sets `prefix` (the environment's folder) and `python` (its interpreter, which may not exist yet).
find_environment() {
  if [[ -n "${VIRTUAL_ENV:-}" ]]; then
    prefix="$VIRTUAL_ENV"
  elif [[ -n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-}" != base ]]; then
    prefix="$CONDA_PREFIX"
  else
    prefix="$root/.venv"
  fi
  python="$prefix/bin/python"
}

right_version() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }

make_environment() {
  if [[ ! -x "$python" ]]; then
    [[ "$prefix" == "$root/.venv" ]] || fail "$prefix is active, but there is no $python: deactivate or remake it"
    local candidate base=""
    for candidate in python3 python3.12 python3.13 python3.11 python; do
      if right_version "$candidate"; then base="$candidate"; break; fi
    done
    [[ -n "$base" ]] || fail "no Python 3.11, 3.12 or 3.13 on the PATH: install one and run this again"
    say "making $prefix"
    "$base" -m venv "$prefix" || fail "$base -m venv failed (on Debian and Ubuntu: apt install python3-venv)"
  fi
  right_version "$python" || fail "$python is not Python 3.11, 3.12 or 3.13"
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null 2>&1 ||
    fail "$prefix has no pip, and ensurepip cannot add it: install pip there"
}

pip_install() { "$python" -m pip install --disable-pip-version-check "$@" >&2; }

# What an installation depends on, as one hash. Extras have a line of their own in the stamp.
fingerprint() {
  "$python" - "$root" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(str(root).encode())
for name in ("pyproject.toml", "constraints.txt"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PY
}

# The version of an installed torch that satisfies the project's range; nothing otherwise.
kept_torch() {
  "$python" - "$root/pyproject.toml" <<'PY'
import sys, tomllib
from importlib.metadata import PackageNotFoundError, version
from pip._vendor.packaging.requirements import Requirement
with open(sys.argv[1], "rb") as file:
    needed = map(Requirement, tomllib.load(file)["project"]["dependencies"])
torch = next(requirement for requirement in needed if requirement.name == "torch")
try:
    installed = version("torch")
except PackageNotFoundError:
    sys.exit()
if torch.specifier.contains(installed, prereleases=True):
    print(installed)
PY
}

has_gpu() {
  [[ -e /dev/kfd ]] || { command -v nvidia-smi >/dev/null && [[ "$(nvidia-smi -L 2>/dev/null)" == GPU* ]]; }
}

reachable() {
  "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$1" 2>/dev/null
}

# install [EXTRA]: what is missing, and nothing when the stamp is of today's pyproject.toml and constraints.txt.
install() {
  local extra="${1:-}" stamp="$prefix/.afresh-installed" now torch constraints
  make_environment
  now="$(fingerprint)"
  if [[ -f "$stamp" && "$(head -n 1 "$stamp")" == "$now" ]]; then
    if grep -qx "extra:$extra" "$stamp"; then return; fi
  else
    rm -f "$stamp"
  fi
  say "installing afresh into $prefix (once; later starts skip this)"

  constraints="$(mktemp)"
  # shellcheck disable=SC2064  # the name of this moment is meant
  trap "rm -f '$constraints'" EXIT
  torch="$(kept_torch)"
  if [[ -n "$torch" ]]; then
    say "keeping torch $torch"
    sed "s/^torch==.*/torch==$torch/" "$root/constraints.txt" >"$constraints"
  else
    cp "$root/constraints.txt" "$constraints"
    if [[ "$(uname -s)" == Linux ]] && ! has_gpu; then
      if reachable "$cpu_index/torch/"; then
        pip_install torch -c "$constraints" --extra-index-url "$cpu_index" || fail "pip could not install torch"
      else
        say "$cpu_index is out of reach: taking the build of torch that pip finds by itself"
      fi
    fi
  fi
  pip_install -e "$root${extra:+[$extra]}" -c "$constraints" || fail "pip could not install the project (above)"
  rm -f "$constraints"
  trap - EXIT

  [[ -f "$stamp" ]] || printf '%s\nextra:\n' "$now" >"$stamp"
  [[ -z "$extra" ]] || printf 'extra:%s\n' "$extra" >>"$stamp"
}

# --------------------------------------------------------------------------------------------------- the job

# How many accelerators torch sees here (CUDA, ROCm, XPU, MPS); before torch is installed, how many NVIDIA GPUs.
count_accelerators() {
  local program='import torch; a = torch.accelerator; print(a.device_count() if a.is_available() else 0)'
  if [[ -x "$python" ]] && "$python" -c "$program" 2>/dev/null; then return; fi
  if command -v nvidia-smi >/dev/null; then nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true; else echo 0; fi
}

cpu_count() { getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1; }

# `train finetune` from a config's line `job: train finetune`, quoted or not, perhaps with a comment.
read_job() {
  sed -n "s/^job:[[:space:]]*[\"']\{0,1\}\([a-z ]*[a-z]\)[\"']\{0,1\}[[:space:]]*\(#.*\)\{0,1\}$/\1/p" "$1" | head -n 1
}

# Sets `command` to the words that run job $1 ("package verb") with the arguments that follow.
build_command() {
  local package="${1%% *}" verb="${1#* }" accelerators n
  shift
  if [[ "$package $verb" != "train finetune" ]]; then # the one job that shares its work among processes
    [[ -z "$processes" ]] || usage_error "--processes is for train finetune; this config's job is $package $verb"
    command=("$python" -m "$package" "$verb" "$@")
    return
  fi
  accelerators="$(count_accelerators)"
  if ((accelerators == 0)); then
    n="${processes:-1}"
    if ((n == 1)); then
      command=("$prefix/bin/accelerate" launch --quiet --cpu --num_processes 1 --num_machines 1
        --num_cpu_threads_per_process "${OMP_NUM_THREADS:-$(cpu_count)}" --mixed_precision no --dynamo_backend no)
    else # accelerate starts a single process on a machine without accelerators
      local threads=$(($(cpu_count) / n))
      command=(env ACCELERATE_USE_CPU=true "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
        "$prefix/bin/torchrun" --standalone --nproc_per_node "$n")
    fi
  else
    n="${processes:-$accelerators}"
    ((n <= accelerators)) || usage_error "--processes $n, but this machine has $accelerators accelerator(s)"
    command=("$prefix/bin/accelerate" launch --quiet --num_processes "$n" --num_machines 1
      --mixed_precision no --dynamo_backend no)
    ((n == 1)) || command+=(--multi_gpu)
  fi
  command+=(-m "$package" "$verb" "$@")
}

run_tests() {
  install test
  cd "$root"
  exec "$python" -m pytest "$@"
}

run_config() {
  local config="" dry_run="" job
  local -a rest=()
  processes=""
  while (($#)); do
    case "$1" in
      -h | --help) usage; exit 0 ;;
      --dry-run) dry_run=yes; shift ;;
      --processes)
        (($# > 1)) || usage_error "--processes needs a number"
        processes="$2"; shift 2 ;;
      --processes=*) processes="${1#*=}"; shift ;;
      *)
        if [[ -n "$config" ]]; then
          rest+=("$1")
        elif [[ "$1" == -* ]]; then
          usage_error "the config comes first: ./launch.sh CONFIG $*"
        else
          config="$1"
        fi
        shift ;;
    esac
  done
  [[ -n "$config" ]] || { usage >&2; exit 2; }
  [[ -z "$processes" || "$processes" =~ ^[1-9][0-9]*$ ]] ||
    usage_error "--processes is a number of processes, 1 or more: got '$processes'"
  [[ -f "$config" ]] || usage_error "$config: there is no such config file"
  [[ -r "$config" ]] || usage_error "$config: not readable"
  job="$(read_job "$config")"
  [[ "$job" =~ ^(curate|train)\ [a-z]+$ ]] ||
    usage_error "$config: no line 'job: train VERB' or 'job: curate VERB' that says what to run"

  if [[ -z "$dry_run" ]]; then install; fi
  build_command "$job" --config "$config" ${rest[@]+"${rest[@]}"}
  if [[ -n "$dry_run" ]]; then
    printf '%q ' "${command[@]}" | sed 's/ $//'
    printf '\n'
    exit 0
  fi
  if [[ "${command[0]}" != "$python" ]]; then # a mistake costs a line here, and a traceback of each launcher there
    "$python" -m "${job% *}" "${job#* }" --config "$config" ${rest[@]+"${rest[@]}"} --check_config >/dev/null
  fi
  exec "${command[@]}"
}

find_environment
if [[ "${1:-}" == test ]]; then
  shift
  run_tests "$@"
else
  run_config "$@"
fi
