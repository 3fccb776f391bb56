#!/bin/bash
# Stops a toy run twice under a real SLURM, and compares it with an undisturbed one.
#
#   apt-get install slurm-wlm munge && make test && bash tests/slurm.sh
#
# Starts a cluster of this machine alone, for a container: needs root. Takes about ten minutes, since SLURM signals a job
# half a minute or more after its start. A run that ends before its second signal needs more EPOCHS, one that is stopped
# before its first step more MINUTES (2).
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH

fail() {
    echo "tests/slurm.sh: $1" >&2
    exit 1
}
[ "$(id -u)" = 0 ] || fail "run it as root, in a container"
for tool in munged slurmctld slurmd; do
    command -v "$tool" >/dev/null || fail "$tool is missing: apt-get install slurm-wlm munge"
done
for tool in probing accelerate; do
    command -v "$tool" >/dev/null || fail "$tool is missing: make test installs it"
done

WORK=$(mktemp -d)
export SLURM_CONF=$WORK/slurm.conf OMP_NUM_THREADS=1
clean() {
    set +e
    scancel --user=root --full --signal=KILL 2>/dev/null
    sleep 2
    kill $(jobs -p)
    wait
    rm -rf "$WORK"
}
trap clean EXIT
mkdir "$WORK/bin" # accelerate imports torchvision, which needs the shim with a CPU torch
cat >"$WORK/bin/accelerate" <<LAUNCHER
#!$(command -v python)
import probing.utils.torchvision_shim
from accelerate.commands.accelerate_cli import main

main()
LAUNCHER
chmod +x "$WORK/bin/accelerate"
PATH=$WORK/bin:$PATH
cat >"$SLURM_CONF" <<CONFIGURATION
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$WORK/munge.socket
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
StateSaveLocation=$WORK/state
SlurmdSpoolDir=$WORK/spool
SlurmctldPidFile=$WORK/slurmctld.pid
SlurmdPidFile=$WORK/slurmd.pid
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=$(nproc --all)
PartitionName=debug Nodes=$(hostname) Default=YES
CONFIGURATION
mkdir "$WORK/state" "$WORK/spool"
(umask 077 && head -c 1024 /dev/urandom >"$WORK/munge.key")
munged --foreground --force --socket "$WORK/munge.socket" --key-file "$WORK/munge.key" --seed-file "$WORK/munge.seed" \
    --pid-file "$WORK/munge.pid" --log-file "$WORK/munge.log" 2>/dev/null &
while [ ! -S "$WORK/munge.socket" ]; do sleep 0.1; done
slurmctld -D 2>"$WORK/slurmctld.log" &
slurmd -D 2>"$WORK/slurmd.log" &
for second in {1..30}; do
    sleep 1
    [ "$(sinfo --noheader --format=%t 2>/dev/null)" != idle ] || break
    [ $second != 30 ] || fail "SLURM does not start: $(tail -n 3 "$WORK/slurmctld.log" "$WORK/slurmd.log")"
done

python - "$WORK" <<'PYTHON'
import sys
from pathlib import Path

from probing.recipe import dump_recipe
from probing.toyworld.demo import demo_recipe
from probing.toyworld.layout import write_world
from probing.toyworld.models import ASSETS

work = Path(sys.argv[1])
world = write_world(work / "world", train=200, val=40, seed=1)
(work / "recipe.yaml").write_text(dump_recipe(demo_recipe(ASSETS, world, layers="0,3,6", controls=[])))
PYTHON

# submit NAME OPTIONS -- ARGUMENTS: the job of examples/cluster on this machine; prints its id.
submit() {
    local name=$1 options=()
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    sbatch --parsable --job-name="$name" --output="$WORK/$name.log" --gpus-per-node=0 --cpus-per-task=1 \
        "${options[@]}" examples/cluster/job.sh "$@"
}
field() { scontrol show job "$JOB" | grep -o "\b$1=[^ ]*" | cut -d= -f2; }
train() { echo two_cpus.yaml train --recipe "$WORK/recipe.yaml" --out "$WORK/$1" fit.epochs="${EPOCHS:-200}"; }

JOB=$(submit stopped --time="${MINUTES:-2}" --signal=USR1@60 -- $(train stopped))
for stop in 1 2; do
    until [ "$(field Restarts) $(field JobState)" = "$stop PENDING" ]; do
        [[ $(field JobState) =~ PENDING|RUNNING|COMPLETING|CONFIGURING|REQUEUE ]] ||
            fail "the job is $(field JobState) after $(field Restarts) stops: $(cat "$WORK/stopped.log")"
        sleep 1
    done
    echo "requeued $stop: $(grep interrupted "$WORK/stopped.log" | tail -n 1)"
    [ $stop = 1 ] || scontrol update JobId="$JOB" TimeLimit=60
    scontrol update JobId="$JOB" StartTime=now # SLURM lets a requeued job wait two minutes
done
while [[ $(field JobState) =~ PENDING|RUNNING|COMPLETING|CONFIGURING|REQUEUE ]]; do sleep 1; done
[ "$(field JobState)" = COMPLETED ] || fail "the job is $(field JobState): $(cat "$WORK/stopped.log")"
grep "resuming from step" "$WORK/stopped.log" || fail "it was stopped before its first step; raise MINUTES"

submit undisturbed --wait --time=60 -- $(train undisturbed) >/dev/null
for run in stopped undisturbed; do
    submit evaluate --wait --time=60 -- one_gpu.yaml evaluate "$WORK/$run" >/dev/null
done
for file in $(cd "$WORK/undisturbed" && find probes ridge results.csv learning_curves.csv -type f); do
    cmp "$WORK/stopped/$file" "$WORK/undisturbed/$file"
    echo "equal: $file"
done
