#!/bin/bash
# A training under SLURM that resumes after a preemption or a time limit.
#
#   sbatch             examples/cluster/job.sh eight_gpus.yaml   train --recipe examples/probe/fig3_row1.yaml --out runs/fig3
#   sbatch --nodes=2   examples/cluster/job.sh sixteen_gpus.yaml train --recipe examples/probe/fig3_row1.yaml --out runs/fig3
#   sbatch --gpus-per-node=1 --cpus-per-task=12 examples/cluster/job.sh one_gpu.yaml evaluate runs/fig3
#
# Arguments: one of the YAML files of this folder, then those of `probing`. Submit it from the root of the repository,
# in an environment that has `probing`. Ten minutes before the time limit, SLURM sends USR1 to all processes of the step.
# Only the shell of each host reacts: it sends one TERM to the training processes, which save and stop.
#SBATCH --job-name=probing
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=probing-%j.log

set -u
if [ $# -lt 2 ]; then
    echo "usage: sbatch job.sh CONFIG train|distill|evaluate|align ARGUMENTS" >&2
    exit 2
fi

# On every host: the launcher, and a shell that waits for it. Exit code 130: stopped and saved.
node() {
    signals=0
    (
        trap '' USR1
        exec accelerate launch --config_file "$CONFIG" --machine_rank "${SLURM_NODEID:-0}" \
            --main_process_ip "$HEAD" --main_process_port "$PORT" -m probing "$@"
    ) &
    launcher=$!
    trap 'signals=$((signals + 1)); pkill -TERM -P "$launcher"' USR1
    while :; do
        before=$signals
        wait "$launcher" # until it ends, or a signal comes
        code=$?
        [ "$before" = "$signals" ] && break
    done
    if [ "$signals" != 0 ] && [ "$code" != 0 ]; then code=130; fi
    exit "$code"
}

CONFIG=$1
shift
[ -f "$CONFIG" ] || CONFIG=examples/cluster/$CONFIG
HEAD=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" | head -n 1)
PORT=$((20000 + ${SLURM_JOB_ID:-0} % 20000))
export CONFIG HEAD PORT
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=500 # seconds that a process has for saving, once another has ended
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

trap : USR1 # some sites send it here too
srun --kill-on-bad-exit=0 bash -c "$(declare -f node); node \"\$@\"" node "$@"
code=$?
if [ "$code" = 130 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    scontrol requeue "$SLURM_JOB_ID" # the same command resumes from the saved state
fi
exit "$code"
