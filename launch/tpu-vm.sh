#!/usr/bin/env bash
# Keeps a queued resource of TPU VMs, and the job on it, going until the job is done or at fault: run it where it can stay (tmux, a
# small VM). The queued resource that it has made it deletes when it ends, unless the command is at fault. One of this name that is
# there already is used, and not deleted: OWNED=yes says that it is this script's, from an earlier start.
set -uo pipefail
{% set worker %}
# shellcheck shell=bash
# Runs on every host. gcloud runs it again when its connection breaks: what an earlier start left behind holds the TPU and goes first.
pid_file=/dev/shm/{{ name }}.pid
if pid=$(cat "$pid_file" 2> /dev/null) && kill -TERM "$pid" 2> /dev/null; then
  timeout 120 tail --pid="$pid" -s 0.2 -f /dev/null || kill -KILL "$pid"
fi
{% for variable, value in job.environment.items() %}
export {{ variable }}={{ value }}
{% endfor %}
{% if job.setup %}
eval {{ job.setup }} || exit 2
{% endif %}
{% if job.bucket %}
mountpoint -q {{ job.mount }} || { sudo install -d -o "$(id -un)" {{ job.mount }} && gcsfuse --implicit-dirs {{ job.bucket }} {{ job.mount }}; } || exit 2
{% elif alone %}
[[ -d {{ job.mount }} ]] || sudo install -d -o "$(id -un)" {{ job.mount }} || exit 2
{% endif %}
cd {{ job.mount }} || exit 2
echo $$ > "$pid_file"
exec {{ command }}
{% endset %}

name={{ name }}
zone=--zone={{ job.zone }}
restarts_left={{ job.restarts }}
# shellcheck disable=SC2016  # expanded on the hosts, not here
worker={{ worker }}
poll=30
begun=no   # whether a queued resource was ever made here
owned=${OWNED:-no}   # whether the one that there is was
ssh=

queued() { gcloud compute tpus queued-resources "$1" "$name" "$zone" "${@:2}"; }

# ACTIVE, WAITING_FOR_RESOURCES, ...; MISSING when there is none; UNKNOWN when the question failed.
state() {
  local answer
  if answer=$(queued describe --format='value(state.state)' 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    echo MISSING
  else
    echo "$answer" >&2
    echo UNKNOWN
  fi
}

# One more restart, for this reason, or the end with this exit code.
spend() {
  echo "tpu-vm: $2; $restarts_left restarts left" >&2
  ((restarts_left-- > 0)) || exit "$1"
}

finish() {
  local code=$?
  [[ -z $ssh ]] || kill "$ssh" 2> /dev/null
  [[ $owned == yes ]] || return
  case $code in
    2 | 126 | 127)   # a setting, the setup or the command: to be mended, not paid for by another wait in the queue
      echo "tpu-vm: the command is at fault; queued resource $name stays, and is paid for: run again with OWNED=yes in the environment," \
        "or delete it: gcloud compute tpus queued-resources delete $name $zone --force" >&2
      ;;
    *) queued delete --force --quiet ;;
  esac
}
trap finish EXIT

heed_signals() {
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
}
heed_signals

# A signal that comes meanwhile is heeded when it is known whether there is something to delete.
create() {
  local code stopped=
  trap 'stopped=130' INT
  trap 'stopped=143' TERM HUP
  queued create --node-id="$name" {{ create }}
  code=$?
  ((code != 0)) || begun=yes owned=yes
  heed_signals
  [[ -z $stopped ]] || exit "$stopped"
  return "$code"
}

while true; do
  now=$(state)
  case $now in
    MISSING)
      owned=no
      create
      code=$?
      ((code == 0)) || [[ $begun == yes ]] || exit "$code"   # refused at once: quota, a misspelt type, rights
      ((code == 0)) || spend "$code" "not created"
      ;;
    SUSPENDED | FAILED)   # it will not come back by itself
      if [[ $owned == no ]]; then
        echo "tpu-vm: queued resource $name is $now and was not made here; delete it, or set launch.tpu_vm.name" >&2
        exit 1
      fi
      spend 75 "queued resource is $now, is made again"
      queued delete --force --quiet
      ;;
    UNKNOWN) spend 1 "state unknown" ;;
    ACTIVE)
      [[ $owned == yes ]] || echo "tpu-vm: uses queued resource $name, which was not made here, and leaves it there" >&2
      gcloud compute tpus tpu-vm ssh "$name" "$zone" --worker=all --command="$worker" --quiet &
      ssh=$!
      wait "$ssh"
      code=$? ssh=
      ((code == 0 || code == 2)) && exit "$code"
      sleep "$poll"
      # 75 and signals are the job's own; a host that was taken away ends ssh in other ways.
      if ((code != 75 && (code < 129 || code == 130))) && [[ $(state) == ACTIVE ]]; then
        exit "$code"
      fi
      spend 75 "exit code $code"
      continue
      ;;
  esac
  sleep "$poll"
done
