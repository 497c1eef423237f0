#!/usr/bin/env bash
# Keeps a queued resource of TPU VMs, and the job on it, going until the job is done or at fault. It owns the queued resource, which
# is deleted when this script ends, whatever ends it: run it where it can stay (tmux, a small VM).
set -uo pipefail

name=tiny
slices=2
restarts_left=20
place=(--zone=us-east5-b --project=my-project)
create=(--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --node-count=2 --node-prefix=tiny --spot --service-account=trainer@my-project.iam.gserviceaccount.com)
# shellcheck disable=SC2016  # expanded on the hosts, not here
worker='# shellcheck shell=bash
# Runs on every host. gcloud runs it again when its connection breaks: what an earlier start left behind holds the TPU and goes first.
pid_file=/dev/shm/tiny.pid
if [ -s "$pid_file" ] && kill -TERM "$(cat "$pid_file")" 2> /dev/null; then
  for _ in $(seq 120); do
    kill -0 "$(cat "$pid_file")" 2> /dev/null || break
    sleep 1
  done
  kill -KILL "$(cat "$pid_file")" 2> /dev/null
fi
bash -c '"'"'pip install --quiet '"'"'"'"'"'"'"'"'ministral-jax[tpu]'"'"'"'"'"'"'"'"''"'"' || exit 1
mountpoint -q /mnt/work || { sudo install -d -o "$(id -un)" /mnt/work && gcsfuse --implicit-dirs my-runs /mnt/work; } || exit 1
cd /mnt/work || exit 1
echo $$ > "$pid_file"
exec ministral-jax run configs/tiny.yaml --distributed
'

poll=30
requested=no
ssh=()

say() { echo "tpu-vm: $*" >&2; }

# ACTIVE, WAITING_FOR_RESOURCES, ...; MISSING when there is none; UNKNOWN when the question failed.
state() {
  local answer
  if answer=$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)' 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    echo MISSING
  else
    say "$answer"
    echo UNKNOWN
  fi
}

remove() {
  gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

# One more restart, or the end with this exit code.
spend() {
  if ((restarts_left == 0)); then
    say "giving up: all restarts are used"
    exit "$1"
  fi
  restarts_left=$((restarts_left - 1))
}

obtain() {
  local code now
  while true; do
    now=$(state)
    case $now in
      ACTIVE) return ;;
      MISSING)
        gcloud compute tpus queued-resources create "$name" "${place[@]}" "${create[@]}"
        code=$?
        if ((code != 0)); then
          [[ $requested == no ]] && exit "$code"   # refused at once: quota, a misspelt type, rights
          spend "$code"
        fi
        requested=yes
        ;;
      SUSPENDED | FAILED)   # it will not come back by itself
        spend 75
        say "queued resource is $now; made again"
        requested=yes
        remove
        ;;
      UNKNOWN) spend 1 ;;
    esac
    sleep "$poll"
  done
}

# Starts the worker on all hosts and waits for all. 2 when any says so, else 75 when any was stopped or killed, else the first fault.
run() {
  local slice node pid code result=0
  ssh=()
  for ((slice = 0; slice < slices; slice++)); do
    node=$name
    ((slices > 1)) && node=$name-$slice
    gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$worker" --quiet &
    ssh+=($!)
  done
  for pid in "${ssh[@]}"; do
    wait "$pid"
    code=$?
    ((code > 128 && code != 130)) && code=75
    if ((result == 0 || code == 2 || (code == 75 && result != 2))); then
      result=$code
    fi
  done
  return "$result"
}

finish() {
  local pid
  for pid in ${ssh[@]+"${ssh[@]}"}; do
    kill "$pid" 2> /dev/null
  done
  [[ $requested == no ]] || remove
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

while true; do
  obtain
  requested=yes
  run
  code=$?
  ((code == 0 || code == 2)) && exit "$code"
  # A host that was taken away ends ssh in its own ways; only with all of them there is the code the job's own.
  sleep "$poll"
  now=$(state)
  if ((code != 75)) && [[ $now == ACTIVE ]]; then
    exit "$code"
  fi
  spend 75
  say "exit code $code, queued resource is $now: again"
done
