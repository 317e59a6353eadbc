#!/usr/bin/env bash
# The main job on a fresh machine: ./launch.sh [flags of train.py]. The test suite: ./launch.sh test [flags of pytest].
#   NPROC                                           processes on this machine; default: one per GPU, one without GPUs
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT     several machines: the same command on each, NODE_RANK 0, 1, ...
#                                                   Slurm knows them: srun --ntasks-per-node=1 ./launch.sh [flags]
#   PYTHON                                          the interpreter to start from; default: python3
set -euo pipefail
cd "$(dirname "$0")"

extra=""
needs="import minirm, torch, transformers, datasets, safetensors, tqdm"
if [ "${1:-}" = test ]; then
  extra="[test]"
  needs="$needs, pytest, xdist"
fi
python=${PYTHON:-$(command -v python3 || command -v python)}
# The environment that is active, if it has what is needed; else .venv beside this file, made and filled once.
if ! "$python" -c "$needs" 2>/dev/null; then
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  python=$PWD/.venv/bin/python
  if ! "$python" -c "$needs" 2>/dev/null; then
    echo "launch.sh: installing minirm$extra into .venv" >&2
    # torch first and by number: the newest of the tested range, not whatever came out since.
    "$python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
    "$python" -m pip install --quiet --disable-pip-version-check -e ".$extra"
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
