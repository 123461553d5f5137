#!/usr/bin/env bash
# GPT-2 on several hosts that you reach by SSH:
#
#     VENV=/shared/gpt2/.venv DATA=/shared/fineweb10B SHARED=/shared bash examples/ssh.sh node1 node2 node3
#
# The first host is the rendezvous host: every host must reach it by the name given here. SSH must log in with a key,
# without a password. --batch-size (512 in this recipe) must be a multiple of all GPUs.
#
# When a host fails, the others are stopped; all are stopped on Ctrl-C, or when this script is killed. A stopped run is
# saved: the same command resumes it. This script must run as long as the training: start it in tmux, on a host.
set -euo pipefail

shared=${SHARED:-/shared}               # a folder on a disk that all hosts share: the runs and their checkpoints
venv=${VENV:-$shared/.venv}             # where pip installed gpt2, on each host
data=${DATA:-$shared/data}              # token shards from `gpt2 data prepare`, on each host
cache=${GPT2_HOME:-/tmp/gpt2-$(id -u)}  # local to each host: cache for text given as --data, once tokenized
port=${PORT:-29500}                     # a free port of the first host; hosts must also reach each other on all ports
gpus=${GPUS:-gpu}                       # per host; gpu for all

if (($# == 0)); then
    echo "usage: bash ssh.sh HOST ... (or USER@HOST)" >&2
    exit 2
fi
hosts=("$@")

# On each host: torchrun, and a process that stops it when our pipe is closed.
# shellcheck disable=SC2016  # the shell of the other host expands this
leash='"$@" </dev/null 3<&- & run=$!; { read -r _ <&3; kill -TERM $run; } >/dev/null 2>&1 & wait $run; code=$?; kill $! 2>/dev/null; exit $code'

on_host() { # $1: index of the host
    local address=${hosts[$1]#*@} meets=false
    [[ $1 == 0 ]] && meets=true
    local command=(
        env GPT2_HOME="$cache"
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # seconds to save before torchrun kills the ranks; older versions of torch: 30
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # otherwise a restarted torchrun cannot join a running one
        "$venv/bin/torchrun"
        --nnodes "${#hosts[@]}"
        --nproc-per-node "$gpus"
        --rdzv-backend c10d
        --rdzv-endpoint "${hosts[0]#*@}:$port"
        --rdzv-id gpt2-124m
        --rdzv-conf "is_host=$meets"
        --local-addr "$address"
        --max-restarts 3
        -m gpt2 train gpt2-124m
        --data "$data"
        --out-dir "$shared/runs"
        --name gpt2-124m
        --resume auto
    )
    ssh -T -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=8 "${hosts[$1]}" \
        "$(printf '%q ' sh -c "$leash" sh "${command[@]}") 3<&0"
}

# All hosts read from one pipe, to which nothing is written. Closing it stops them.
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
mkfifo "$folder/pipe"
exec 9<>"$folder/pipe"
exec 8<"$folder/pipe"
trap 'exec 9>&-' INT TERM HUP USR1

running=()
for number in "${!hosts[@]}"; do
    {
        trap '' INT # Ctrl-C is handled by this script: ssh runs until torchrun has saved
        on_host "$number" || {
            code=$?
            echo "ssh.sh: torchrun on ${hosts[$number]} ended with code $code" >&2
            [[ -e $folder/code ]] || echo "$code" >"$folder/code"
            kill -USR1 $$ 2>/dev/null || true # stops all others
        }
    } <&8 8<&- 9>&- &
    running+=($!)
done

for process in "${running[@]}"; do
    while kill -0 "$process" 2>/dev/null; do wait "$process" || true; done # a signal interrupts wait, not the process
done
[[ ! -e $folder/code ]] || exit "$(<"$folder/code")" # of the host that failed first
