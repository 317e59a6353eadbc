#!/usr/bin/env bash
# The main job on a fresh machine: ./launch.sh [flags of train.py]. The test suite: ./launch.sh test [flags of pytest].
# Raise the pinned versions: ./launch.sh pins (tests the newest ones within setup.py's ranges, then writes tests/constraints.txt).
#   NPROC                                           processes on this machine; default: one per GPU, one without GPUs
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT     several machines: the same command on each, NODE_RANK 0, 1, ...
#                                                   Slurm knows them: srun --ntasks-per-node=1 ./launch.sh [flags]
#   PYTHON                                          the interpreter to start from; default: python3
set -euo pipefail
cd "$(dirname "$0")"

extra="[plot]"
needs="import minirm, torch, transformers, datasets, safetensors, tqdm"
case "${1:-}" in test | pins)
  extra="[test,plot]"
  needs="$needs, pytest, xdist, matplotlib" ;;
esac
python=${PYTHON:-$(command -v python3 || command -v python)}
# Install minirm with the versions of a list: `install INTERPRETER LIST`. torch comes first, since it is the largest.
install() {
  "$1" -m pip install --quiet --disable-pip-version-check --constraint "$2" torch
  "$1" -m pip install --quiet --disable-pip-version-check --constraint "$2" -e ".$extra"
}
if [ "${1:-}" = pins ]; then
  new=$(mktemp -d)
  trap 'rm -rf "$new"' EXIT
  "$python" -m venv "$new"
  install "$new/bin/python" /dev/null
  "$new/bin/python" -m pytest -q -n 2 --dist worksteal tests
  # Not +cpu or +cu130: which build of torch a machine gets is its own affair, and so are the libraries of CUDA.
  { grep "^#" tests/constraints.txt
    "$new/bin/python" -m pip freeze --exclude-editable | grep -vE "^(nvidia|cuda|triton)" | sed "s/+[a-z0-9]*$//"
  } > "$new/list"
  cp "$new/list" tests/constraints.txt
  exit
fi
# Use the active environment if it has what is needed, else .venv beside this file, made and filled once.
if ! "$python" -c "$needs" 2>/dev/null; then
  "$python" -c "import sys; sys.exit(sys.version_info < (3, 11))" ||
    { echo "launch.sh: $python is older than Python 3.11; name a newer one: PYTHON=python3.11 ./launch.sh" >&2; exit 2; }
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  python=$PWD/.venv/bin/python
  if ! "$python" -c "$needs" 2>/dev/null; then
    echo "launch.sh: installing minirm$extra into .venv, in the versions of tests/constraints.txt" >&2
    install "$python" tests/constraints.txt
  fi
fi

if [ "${1:-}" = test ]; then
  shift
  exec "$python" -m pytest -q -n 2 --dist worksteal tests "$@"
fi
if [ -z "${NNODES:-}" ] && [ -n "${SLURM_NODEID:-}" ]; then
  NNODES=${SLURM_NNODES:-${SLURM_JOB_NUM_NODES:-1}}
  NODE_RANK=$SLURM_NODEID
  hosts=$([ "$NNODES" = 1 ] || scontrol show hostnames "$SLURM_JOB_NODELIST")
  MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
  MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
fi
nproc=${NPROC:-$("$python" -c "import torch; print(max(1, torch.cuda.device_count()))")}
if [ "$nproc" = 1 ] && [ "${NNODES:-1}" = 1 ]; then
  exec "$python" train.py "$@"
fi
if [ "${NNODES:-1}" = 1 ]; then
  where=(--standalone)
else
  # Without it, processes that torchrun --max_restarts starts again meet the addresses of those before them.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  where=(--nnodes="$NNODES" --node_rank="${NODE_RANK:?}" --master_addr="${MASTER_ADDR:?}" --master_port="${MASTER_PORT:-29500}")
fi
# torchrun gives every process one thread; without GPUs they share the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$("$python" -c "import os; print(max(1, len(os.sched_getaffinity(0)) // $nproc))")}
# torchrun, but for the report with which it buries the line that a failed process printed.
exec "$python" -c '
import sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main(sys.argv[1:])
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    sys.exit(code if code > 0 else 128 - code)
' "${where[@]}" --nproc_per_node="$nproc" train.py "$@"
