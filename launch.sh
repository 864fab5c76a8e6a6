#!/usr/bin/env bash
# Sets the project up where that is needed and runs a config's job.
#
#   ./launch.sh CONFIG [--processes N] [--accelerate FILE] [--dry-run] [--key value]...
#   ./launch.sh test [pytest arguments]
#
# SIGTERM and SIGUSR1 sent to this script stop a training job after its step, with a checkpoint, and exit 0; several
# processes that sample stop after their batches.
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
usage: ./launch.sh CONFIG [--processes N] [--accelerate FILE] [--dry-run] [--key value]...
       ./launch.sh test [pytest arguments]

CONFIG                a YAML file whose `job:` line names the command, as `job: train finetune`
--processes N         processes that train or sample on this machine; by default one per accelerator
--accelerate FILE     how they share the work: a config of Accelerate, as those in configs/accelerate
--machine_rank R      which of several machines this is, from 0; by default $MACHINE_RANK or $SLURM_NODEID
--main_process_ip IP  address of machine 0; by default $MASTER_ADDR
--dry-run             print the command and stop; nothing is installed
--key value           overrides a key of the config
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

# Cores that this machine, this shell's affinity and its control groups grant.
cpu_count() {
  local program='import sys; sys.path.insert(0, sys.argv[1]); from afresh.cores import cpu_count; print(cpu_count())'
  [[ -x "$python" ]] && "$python" -c "$program" "$root" 2>/dev/null && return
  env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1
}

# `train finetune` from a config's line `job: train finetune`, quoted or not, perhaps with a comment.
read_job() {
  sed -n "s/^job:[[:space:]]*[\"']\{0,1\}\([a-z ]*[a-z]\)[\"']\{0,1\}[[:space:]]*\(#.*\)\{0,1\}$/\1/p" "$1" | head -n 1
}

# The value of a key at the top level of a YAML file, without quotes and comment; empty where it has none.
read_key() {
  sed -n "s/^$2:[[:space:]]*[\"']\{0,1\}\([A-Za-z0-9_.:-]*\)[\"']\{0,1\}[[:space:]]*\(#.*\)\{0,1\}$/\1/p" "$1" | head -n 1
}

# Sets `command` to the words that run job $1 ("package verb") with the arguments that follow, and `launcher` to
# whether it is a launcher of processes that does so.
build_command() {
  local package="${1%% *}" verb="${1#* }" accelerators n
  shift
  launcher=""
  if [[ ! "$package $verb" =~ ^train\ (finetune|sample)$ ]]; then # the jobs that share their work among processes
    local option
    for option in processes accelerate machine_rank main_process_ip; do
      [[ -z "${!option}" ]] || usage_error "--$option is for train finetune and train sample; this config's job is $package $verb"
    done
    command=("$python" -m "$package" "$verb" "$@")
    return
  fi
  accelerators="$(count_accelerators)"
  n="${processes:-$accelerators}"
  ((n > 0)) || n=1
  ((accelerators == 0 || n <= accelerators)) ||
    usage_error "--processes $n, but this machine has $accelerators accelerator(s)"
  command=()
  if ((accelerators == 0)); then
    local threads=$(($(cpu_count) / n))
    command=(env ACCELERATE_USE_CPU=true "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}")
  elif ((n > 1)) && [[ -z "${OMP_NUM_THREADS:-}" ]]; then # launchers would set it to 1
    local cores
    cores="$(cpu_count)"
    export OMP_NUM_THREADS=$((cores > n ? cores / n : 1))
  fi
  launcher=yes
  if [[ -n "$accelerate" ]]; then
    use_accelerate_config
  elif ((n == 1)); then # nothing in between: signals reach the job itself
    command+=("$python")
    launcher=""
  elif ((accelerators == 0)); then # accelerate starts a single process on a machine without accelerators
    command+=("$prefix/bin/torchrun" --standalone --nproc_per_node "$n")
  else
    command+=("$prefix/bin/accelerate" launch --quiet --multi_gpu --num_processes "$n" --num_machines 1
      --mixed_precision no --dynamo_backend no --main_process_port 0)
  fi
  command+=(-m "$package" "$verb" "$@")
}

# Adds accelerate's launcher with the file of --accelerate to `command`.
use_accelerate_config() {
  local kind machines total
  kind="$(read_key "$accelerate" distributed_type)"
  machines="$(read_key "$accelerate" num_machines)"
  machines="${machines:-1}"
  total="$(read_key "$accelerate" num_processes)"
  [[ -n "$kind" ]] || usage_error "$accelerate: no line 'distributed_type: …': not a config of Accelerate"
  if [[ "$kind" == DEEPSPEED ]]; then
    usage_error "$accelerate: DeepSpeed is not supported; configs/accelerate/zero2.yaml shares out as ZeRO-2 does"
  fi
  if [[ "$kind" == NO ]]; then
    [[ "${processes:-1}" == 1 ]] || usage_error "--processes $processes, but $accelerate is for one process"
  elif [[ -n "$processes" || -z "$total" ]]; then
    total=$((n * machines))
  fi
  command+=("$prefix/bin/accelerate" launch --quiet --config_file "$accelerate" --num_processes "${total:-1}"
    --dynamo_backend no)
  if ((machines > 1)); then
    local rank="${machine_rank:-${MACHINE_RANK:-${SLURM_NODEID:-}}}" ip="${main_process_ip:-${MASTER_ADDR:-}}"
    if [[ ! "$rank" =~ ^[0-9]+$ ]] || ((rank >= machines)); then
      usage_error "$accelerate is for $machines machines: --machine_rank says which one this is, from 0: got '$rank'"
    fi
    [[ -n "$ip" ]] || usage_error "$accelerate is for $machines machines: --main_process_ip is the address of the first"
    command+=(--machine_rank "$rank" --main_process_ip "$ip")
  fi
}

# Runs `command`, a launcher of processes, as `exec` would, but for SIGTERM and SIGUSR1. A launcher passes the one on
# with a time limit and an exit code of failure, and dies of the other. So they are a wish here, kept in a file that the
# processes look for after each step: they save and end by themselves, and the launcher with them. A signal that
# reaches the whole group, as a batch system's may, does no harm: the launcher ignores both.
supervise() {
  local child code=127 now folder woken=yes
  folder="$(mktemp -d)"
  # shellcheck disable=SC2064  # the name of this moment is meant
  trap "rm -rf '$folder'" EXIT
  export AFRESH_STOP_FILE="$folder/stop" PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT
  trap '' TERM USR1 # inherited by the launcher
  set -m            # a group of its own: the terminal's Ctrl-C is passed on below, once
  "${command[@]}" &
  child=$!
  set +m
  trap 'woken=yes; : >"$AFRESH_STOP_FILE"' TERM USR1
  trap 'woken=yes; kill -INT -- "-$child"' INT
  trap 'woken=yes; kill -HUP -- "-$child"' HUP
  while [[ -n "$woken" ]]; do # a trap ends `wait` before the child does
    woken="" now=0
    wait "$child" 2>/dev/null || now=$?
    ((now == 127)) || code=$now # 127: it was waited for before
  done
  exit "$code"
}

run_tests() {
  install test
  cd "$root"
  exec "$python" -m pytest "$@"
}

run_config() {
  local config="" dry_run="" job word
  local -a rest=()
  processes="" accelerate="" machine_rank="" main_process_ip=""
  while (($#)); do
    case "$1" in
      -h | --help) usage; exit 0 ;;
      --dry-run) dry_run=yes; shift ;;
      --processes | --accelerate | --machine_rank | --main_process_ip)
        (($# > 1)) || usage_error "$1 needs a value"
        printf -v "${1#--}" %s "$2"; shift 2 ;;
      --processes=* | --accelerate=* | --machine_rank=* | --main_process_ip=*)
        word="${1%%=*}"
        printf -v "${word#--}" %s "${1#*=}"; shift ;;
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
  [[ -z "$accelerate" || -r "$accelerate" ]] || usage_error "$accelerate: there is no such file, or it is not readable"
  job="$(read_job "$config")"
  [[ "$job" =~ ^(curate|train)\ [a-z]+$ ]] ||
    usage_error "$config: no line 'job: train VERB' or 'job: curate VERB' that says what to run"

  # The project beside this file runs, whatever is called train.py or curate.py in the folder that it is started from.
  export PYTHONSAFEPATH=1 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  if [[ -z "$dry_run" ]]; then
    install
    # Mistakes are told before torch is loaded; and behind a launcher they would cost a traceback for each process.
    "$python" -m "${job% *}" "${job#* }" --config "$config" ${rest[@]+"${rest[@]}"} --check_config >/dev/null
  fi
  build_command "$job" --config "$config" ${rest[@]+"${rest[@]}"}
  if [[ -n "$dry_run" ]]; then
    printf '%q ' "${command[@]}" | sed 's/ $//'
    printf '\n'
    exit 0
  fi
  [[ -n "$launcher" ]] || exec "${command[@]}"
  supervise
}

# How OpenMP's threads wait, here for the tests and for launchers; afresh/cores.py says why, and does it for every job.
if [[ -z "${OMP_WAIT_POLICY+set}${GOMP_SPINCOUNT+set}${KMP_BLOCKTIME+set}" ]]; then
  export GOMP_SPINCOUNT=1000 KMP_BLOCKTIME=0
fi
find_environment
if [[ "${1:-}" == test ]]; then
  shift
  run_tests "$@"
else
  run_config "$@"
fi
