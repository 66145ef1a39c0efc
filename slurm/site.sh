# Settings of your cluster: the only file to edit. TRSR_SITE=/path/to/other.sh uses another file instead.
# It can start with `source slurm/site.sh` and change a few lines. Empty means that Slurm's own default holds.
# shellcheck shell=bash disable=SC2034

# Read by sbatch itself: slurm/pipeline.sh sources this file; do so yourself before a plain sbatch.
#export SBATCH_ACCOUNT=my-project
#export SBATCH_PARTITION=gpu
#export SBATCH_QOS=normal

# Options of the stages' jobs when slurm/pipeline.sh submits them. These ask for no GPU, which is enough for
# configs/quickstart.yaml alone. For one node of 8 GPUs (one task a GPU), and a merge that reads the whole model:
#TRSR_SUMMARIZE_OPTIONS="--nodes=1 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8 --mem=0 --time=24:00:00"
#TRSR_TRAIN_OPTIONS=$TRSR_SUMMARIZE_OPTIONS
#TRSR_EVALUATE_OPTIONS=$TRSR_SUMMARIZE_OPTIONS
#TRSR_MERGE_OPTIONS="--nodes=1 --ntasks=1 --cpus-per-task=8 --mem=64G --time=02:00:00"
TRSR_PREPARE_OPTIONS=${TRSR_PREPARE_OPTIONS:-"--nodes=1 --ntasks=1"}
TRSR_SUMMARIZE_OPTIONS=${TRSR_SUMMARIZE_OPTIONS:-"--nodes=1 --ntasks-per-node=1"}
# slurm/summarize_vllm.sbatch: with vLLM servers beside the tasks.
TRSR_SUMMARIZE_SCRIPT=${TRSR_SUMMARIZE_SCRIPT:-slurm/summarize.sbatch}
TRSR_TRAIN_OPTIONS=${TRSR_TRAIN_OPTIONS:-"--nodes=1 --ntasks-per-node=1"}
TRSR_MERGE_OPTIONS=${TRSR_MERGE_OPTIONS:-"--nodes=1 --ntasks=1"}
TRSR_EVALUATE_OPTIONS=${TRSR_EVALUATE_OPTIONS:-"--nodes=1 --ntasks-per-node=1"}

# Modules and virtual environment, on every node.
trsr_environment() {
  : # module load cuda/12.4
  if [ -z "${VIRTUAL_ENV:-}" ] && [ -f .venv/bin/activate ]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
  fi
}

# More options of srun, for instance a container, which must start in this folder (an example for pyxis):
#TRSR_SRUN_OPTIONS="--container-image=/images/torch.sqsh --container-mounts=/data,$PWD --container-workdir=$PWD"
TRSR_SRUN_OPTIONS=${TRSR_SRUN_OPTIONS:-}

# Fast disk of each node, for caches of compiled kernels; made where missing.
TRSR_SCRATCH=${TRSR_SCRATCH:-${TMPDIR:-/tmp}}

# A job that has restarted this often without new work on the disk is given up.
TRSR_IDLE_RESTARTS=${TRSR_IDLE_RESTARTS:-3}

# A task without a sign of life for this many seconds is gone, and its job requeued. Must exceed NFS attribute caching (60).
TRSR_TASK_SECONDS=${TRSR_TASK_SECONDS:-90}

# 0: no preflight.
TRSR_PREFLIGHT=${TRSR_PREFLIGHT:-1}

# Seconds the preflight ranks wait for each other.
TRSR_PREFLIGHT_SECONDS=${TRSR_PREFLIGHT_SECONDS:-60}

# 1: a node that fails the preflight is excluded when its job is requeued (needs spare nodes).
TRSR_EXCLUDE_BAD_NODES=${TRSR_EXCLUDE_BAD_NODES:-0}

# Free space that every node needs, in GB: in the run folder and on the scratch disk.
TRSR_FREE_GB=${TRSR_FREE_GB:-5}
