#!/bin/bash
# GPT-2 on several hosts of a SLURM cluster:
#
#     VENV=/shared/gpt2/.venv DATA=/shared/fineweb10B sbatch examples/slurm.sh
#
# Change the nodes, the GPUs and the time below, and add the options your cluster requires (--partition, --account). If it
# does not support --gpus-per-node, use --gres=gpu:8. --batch-size (512 in this recipe) must be a multiple of all GPUs.
#
# At the time limit, the run is saved, requeued under the same job id, and resumed. --signal makes SLURM signal this shell
# (B: the batch shell only) 300 seconds before the limit, or up to a minute earlier. After the loss of a host or a
# preemption, --requeue makes SLURM itself requeue the job.
#
#SBATCH --job-name=gpt2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

shared=${SHARED:-$SLURM_SUBMIT_DIR}  # a folder on a disk that all hosts share: the runs and their checkpoints
venv=${VENV:-$shared/.venv}          # where pip installed gpt2, also shared
data=${DATA:-$shared/data}           # token shards from `gpt2 data prepare`, also shared

export GPT2_HOME=${GPT2_HOME:-/tmp/gpt2-$(id -u)}  # local to each host: cache for text given as --data, once tokenized
export TIKTOKEN_CACHE_DIR=${TIKTOKEN_CACHE_DIR:-$shared/tiktoken}  # GPT-2's vocabulary, for hosts without a network
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240  # seconds to save before torchrun kills the ranks; older versions of torch: 30
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # otherwise a restarted torchrun cannot join a running one
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# export NCCL_SOCKET_IFNAME=ib0  # if the hosts have several networks: the one that connects them

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# TERM goes to the job steps, that is, to each torchrun; srun would kill them immediately.
out_of_time=
trap 'out_of_time=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# One torchrun per host. When one has exited, the others have --wait seconds to save.
result=$(mktemp)
{
    code=0
    srun --kill-on-bad-exit=0 --wait=300 "$venv/bin/torchrun" \
        --nnodes "${#hosts[@]}" \
        --nproc-per-node gpu \
        --rdzv-backend c10d \
        --rdzv-endpoint "${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000))" \
        --rdzv-id "$SLURM_JOB_ID" \
        --max-restarts 3 \
        -m gpt2 train gpt2-124m \
        --data "$data" \
        --out-dir "$shared/runs" \
        --name gpt2-124m \
        --resume auto || code=$?
    echo "$code" >"$result"
} &
step=$!

while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done  # a signal interrupts wait, not the step
code=$(<"$result")
rm "$result"
if [[ $out_of_time && $code != 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "${code:-1}"
