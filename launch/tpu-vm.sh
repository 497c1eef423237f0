#!/usr/bin/env bash
# Keeps a queued resource of TPU VMs, and the job on it, going until the job is done or at fault. It owns the queued resource, which
# is deleted when this script ends, whatever ends it: run it where it can stay (tmux, a small VM).
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
eval {{ job.setup }} || exit 1
{% endif %}
{% if job.bucket %}
mountpoint -q {{ job.mount }} || { sudo install -d -o "$(id -un)" {{ job.mount }} && gcsfuse --implicit-dirs {{ job.bucket }} {{ job.mount }}; } || exit 1
{% endif %}
cd {{ job.mount }} || exit 1
echo $$ > "$pid_file"
exec {{ command }}
{% endset %}

name={{ name }}
zone=--zone={{ job.zone }}
restarts_left={{ job.restarts }}
# shellcheck disable=SC2016  # expanded on the hosts, not here
worker={{ worker }}
poll=30
requested=no
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
  [[ -z $ssh ]] || kill "$ssh" 2> /dev/null
  [[ $requested == no ]] || queued delete --force --quiet
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

while true; do
  now=$(state)
  case $now in
    MISSING)
      queued create --node-id="$name" {{ create }}
      code=$?
      ((code == 0)) || [[ $requested == yes ]] || exit "$code"   # refused at once: quota, a misspelt type, rights
      ((code == 0)) || spend "$code" "not created"
      requested=yes
      ;;
    SUSPENDED | FAILED)   # it will not come back by itself
      requested=yes
      spend 75 "queued resource is $now, is made again"
      queued delete --force --quiet
      ;;
    UNKNOWN) spend 1 "state unknown" ;;
    ACTIVE)
      requested=yes
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
