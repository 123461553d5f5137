#!/usr/bin/env bash
# GPT-2 on several hosts that you reach by SSH:
#
#     VENV=/shared/gpt2/.venv DATA=/shared/fineweb10B SHARED=/shared bash examples/ssh.sh node1 node2 node3
#
# The first host is where all meet, so every host must reach it by the name given here. You log in with a key, nobody
# types passwords. --batch-size (512 in this recipe) must be a multiple of all GPUs together.
#
# When a host fails, the others are stopped; so are all of them on Ctrl-C, or when this script dies. To be stopped is to
# save: the same command goes on from there. This script has to live as long as the run: start it in tmux, on a host.
set -euo pipefail

shared=${SHARED:-/shared}               # a folder on a disk that all hosts see: the runs, and what they go on from
venv=${VENV:-$shared/.venv}             # where pip installed gpt2, on each host
data=${DATA:-$shared/data}              # token shards that `gpt2 data prepare` has made, on each host
cache=${GPT2_HOME:-/tmp/gpt2-$(id -u)}  # of each host: a text given as --data is tokenized into it, once a host
port=${PORT:-29500}                     # a free one on the first host; beyond it, hosts must reach each other on all ports
gpus=${GPUS:-gpu}                       # of each host; gpu for all it has

if (($# == 0)); then
    echo "usage: bash ssh.sh HOST ... (or USER@HOST)" >&2
    exit 2
fi
hosts=("$@")

# What runs on a host: torchrun, and beside it one that waits for the end of our pipe and then stops it.
# shellcheck disable=SC2016  # it is the other host's shell that expands this
leash='"$@" </dev/null 3<&- & run=$!; { read -r _ <&3; kill -TERM $run; } >/dev/null 2>&1 & wait $run; code=$?; kill $! 2>/dev/null; exit $code'

on_host() { # which host, by its number
    local address=${hosts[$1]#*@} meets=false
    [[ $1 == 0 ]] && meets=true
    local command=(
        env GPT2_HOME="$cache"
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # seconds to save in, before torchrun kills; an older torch gives 30
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or a torchrun that is started anew cannot join one that lives
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

# All hosts read from one pipe, of which we hold the other end and write nothing. Closing it stops them.
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
mkfifo "$folder/pipe"
exec 9<>"$folder/pipe"
exec 8<"$folder/pipe"
trap 'exec 9>&-' INT TERM HUP USR1

running=()
for number in "${!hosts[@]}"; do
    {
        trap '' INT # Ctrl-C is for us: ssh goes on until torchrun has saved
        on_host "$number" || {
            code=$?
            echo "ssh.sh: torchrun on ${hosts[$number]} ended with code $code" >&2
            [[ -e $folder/code ]] || echo "$code" >"$folder/code"
            kill -USR1 $$ 2>/dev/null || true # so that all the others are stopped
        }
    } <&8 8<&- 9>&- &
    running+=($!)
done

for process in "${running[@]}"; do
    while kill -0 "$process" 2>/dev/null; do wait "$process" || true; done # a signal ends the wait, not the process
done
[[ ! -e $folder/code ]] || exit "$(<"$folder/code")" # of the one that failed first
