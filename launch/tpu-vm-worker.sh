# shellcheck shell=bash
# Runs on every host. gcloud runs it again when its connection breaks: what an earlier start left behind holds the TPU and goes first.
pid_file=/dev/shm/{{ name }}.pid
if [ -s "$pid_file" ] && kill -TERM "$(cat "$pid_file")" 2> /dev/null; then
  for _ in $(seq {{ job.grace }}); do
    kill -0 "$(cat "$pid_file")" 2> /dev/null || break
    sleep 1
  done
  kill -KILL "$(cat "$pid_file")" 2> /dev/null
fi
{% if job.setup %}
bash -c {{ job.setup }} || exit 1
{% endif %}
{% if job.bucket %}
mountpoint -q {{ job.mount }} || { sudo install -d -o "$(id -un)" {{ job.mount }} && gcsfuse --implicit-dirs {{ job.bucket }} {{ job.mount }}; } || exit 1
{% endif %}
{% for variable, value in job.environment.items() %}
export {{ variable }}={{ value }}
{% endfor %}
{% if job.env_file %}
set -a
# shellcheck source=/dev/null
. {{ job.env_file }} || exit 2
set +a
{% endif %}
{% if job.activate %}
# shellcheck source=/dev/null
. {{ job.activate }}/bin/activate || exit 2
{% endif %}
cd {{ job.mount }} || exit 1
echo $$ > "$pid_file"
exec {{ command }}
