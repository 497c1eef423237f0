"""The rendered scripts, executed with stand-ins for the schedulers' clients on PATH."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from launch_cases import TPU_VM, render
from test_launch_jobs import NASTY


@pytest.fixture
def bench(tmp_path):
    """A directory of stand-ins, first on PATH; `$BENCH` is where they note what they were called with."""

    class Bench:
        folder = tmp_path

        def command(self, name: str, script: str) -> None:
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/bash\n{script}\n")
            path.chmod(0o755)

        def environment(self, **more: str) -> dict[str, str]:
            return {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "BENCH": str(tmp_path), "HOME": "/root", **more}

        def run(self, script: str, **more: str) -> subprocess.CompletedProcess[str]:
            path = tmp_path / "job"
            path.write_text(script)
            return subprocess.run(
                ["bash", path], env=self.environment(**more), capture_output=True, text=True, cwd=tmp_path, timeout=60
            )

        def lines(self, name: str) -> list[str]:
            path = tmp_path / name
            return path.read_text().splitlines() if path.exists() else []

    return Bench()


SRUN = r"""printf '%s\0' "$@" > "$BENCH/argv"; printenv > "$BENCH/env"; exit "$CODE" """


@pytest.mark.parametrize(
    ("code", "count", "again"),
    [
        *[(0, "", False), (75, "", True), (75, "2", True), (75, "3", False), (137, "1", True), (143, "3", False)],
        *[(1, "", False), (2, "", False), (128, "", False), (130, "", False)],
    ],
)
def test_slurm_acts_on_the_exit_code(bench, code, count, again):
    bench.command("srun", SRUN)
    bench.command("scontrol", 'echo "$@" >> "$BENCH/scontrol"')
    script = render("slurm", "launch.slurm={nodes: 2, restarts: 3}")
    more = {"SLURM_RESTART_COUNT": count} if count else {}
    ended = bench.run(script, CODE=str(code), SLURM_JOB_ID="77", **more)
    assert ended.returncode == code
    assert bench.lines("scontrol") == (["requeue 77"] if again else [])


# As the real one: every task is started, a bad end sends SIGTERM to the rest, and the largest code is given back.
TASKS = r"""
shift 2
for code in $CODES; do CODE=$code setsid "$@" & done
sleep 0.3
largest=0
for _ in $CODES; do
  wait -n; code=$?
  [ "$code" -gt 0 ] && for task in $(jobs -p); do kill -- "-$task"; done 2> /dev/null
  [ "$code" -gt "$largest" ] && largest=$code
done
exit "$largest"
"""
# Saves for a moment when it is asked to stop, as a task that waits does.
TASK = r"""
[ "$CODE" = wait ] && { trap 'sleep 0.1; exit 75' TERM; for _ in {1..100}; do sleep 0.1; done; }
exit "$CODE"
"""


@pytest.mark.parametrize(
    ("codes", "code", "again"),
    [
        *[("0 0", 0, False), ("75 75", 75, True), ("137 75", 137, True), ("137 wait", 137, True)],
        *[("2 2 2", 2, False), ("2 wait 143", 2, False), ("1 wait", 1, False), ("3 75 137", 1, False)],
    ],
)
def test_slurm_tells_a_fault_from_what_it_does_to_the_others(bench, codes, code, again):
    bench.command("srun", TASKS)
    bench.command("ministral-jax", TASK)
    bench.command("scontrol", 'echo "$@" >> "$BENCH/scontrol"')
    script = render("slurm", "launch.slurm={nodes: 2, restarts: 3}")
    assert bench.run(script, CODES=codes, SLURM_JOB_ID="77").returncode == code
    assert bench.lines("scontrol") == (["requeue 77"] if again else [])


def test_slurm_passes_words_verbatim_and_secrets_by_their_file(bench):
    bench.command("srun", SRUN)
    secrets = bench.folder / "my secrets.env"
    secrets.write_text("HF_TOKEN='hf_hush'\n")
    block = f'launch.slurm={{env_file: {secrets}, nodes: 2, environment: {{A: "it\'s $(touch pwned)\\nb"}}}}'
    script = render("slurm", NASTY, block)
    assert "hf_hush" not in script
    assert bench.run(script, CODE="0").returncode == 0
    argv = (bench.folder / "argv").read_bytes().decode().split("\0")[:-1]
    assert argv[2:4] == ["bash", "-c"]
    assert argv[6:] == ["ministral-jax", "run", "configs/tiny.yaml", NASTY, "--distributed"]
    assert not (bench.folder / "pwned").exists()
    assert {"HF_TOKEN=hf_hush", "A=it's $(touch pwned)", "b"} <= set(bench.lines("env"))
    secrets.unlink()
    (bench.folder / "argv").unlink()
    assert bench.run(script, CODE="0").returncode == 2 and not (bench.folder / "argv").exists()


# `states` and `codes` hold what to answer next; a last state stays.
GCLOUD = r"""
exec 9> "$BENCH/lock"; flock 9
echo "${*//$'\n'*/}" >> "$BENCH/calls"
next() { head -n 1 "$BENCH/$1"; [ "$(wc -l < "$BENCH/$1")" -gt 1 ] && sed -i 1d "$BENCH/$1"; }
case $4 in
  describe)
    state=$(next states)
    [ "$state" = MISSING ] && { echo "ERROR: (gcloud) NOT_FOUND: Resource not found" >&2; exit 1; }
    [ "$state" = BROKEN ] && { echo "ERROR: (gcloud) backend error" >&2; exit 1; }
    echo "$state" ;;
  create) exit "${CREATE:-0}" ;;
  ssh)
    export CODE=$(next codes)
    exec 9>&-
    [ "$CODE" = hang ] && exec /bin/sleep 60
    for word in "$@"; do case $word in --command=*) exec bash -c "${word#--command=}" ;; esac; done ;;
esac
exit 0
"""


@pytest.fixture
def cloud(bench):
    bench.command("gcloud", GCLOUD)
    bench.command("sleep", "exit 0")
    bench.command("ministral-jax", SRUN)
    bench.name = f"test-{uuid.uuid4().hex[:12]}"
    bench.words = [*TPU_VM, f"launch.tpu_vm.mount={bench.folder}", f"launch.tpu_vm.name={bench.name}"]
    yield bench
    Path(f"/dev/shm/{bench.name}.pid").unlink(missing_ok=True)


def told(cloud, states: str, codes: str = "0", *words: str, **more: str) -> tuple[int, list[str]]:
    """The script's exit code and the verbs of the calls of gcloud, questions left out."""
    for name, values in (("states", states), ("codes", codes)):
        (cloud.folder / name).write_text("\n".join(values.split()) + "\n")
    (cloud.folder / "calls").write_text("")
    ended = cloud.run(render("tpu-vm", *cloud.words, *words), **more)
    verbs = [line.split()[3] for line in cloud.lines("calls")]
    return ended.returncode, [verb for verb in verbs if verb != "describe"]


@pytest.mark.parametrize(
    ("states", "codes", "restarts", "code", "verbs"),
    [
        ("MISSING WAITING_FOR_RESOURCES PROVISIONING ACTIVE", "0", 20, 0, "create ssh delete"),
        ("MISSING ACTIVE", "75 0", 20, 0, "create ssh ssh delete"),
        ("MISSING ACTIVE SUSPENDED SUSPENDED MISSING ACTIVE", "255 0", 20, 0, "create ssh delete create ssh delete"),
        ("MISSING ACTIVE SUSPENDED FAILED MISSING ACTIVE", "1 0", 20, 0, "create ssh delete create ssh delete"),
        ("MISSING FAILED", "0", 2, 75, "create delete delete delete"),
        ("MISSING ACTIVE", "75", 2, 75, "create ssh ssh ssh delete"),
        ("MISSING ACTIVE", "1", 20, 1, "create ssh delete"),
        ("MISSING ACTIVE", "2", 20, 2, "create ssh delete"),
        ("BROKEN MISSING BROKEN ACTIVE", "0", 20, 0, "create ssh delete"),
        ("BROKEN", "0", 3, 1, ""),
    ],
)
def test_tpu_vms_are_kept_going(cloud, states, codes, restarts, code, verbs):
    """A taken slice is deleted and made again; 75 starts again; a fault ends it; each bounded; nothing is left over."""
    result = told(cloud, states, codes, f"launch.tpu_vm.restarts={restarts}")
    assert result == (code, verbs.split())


def test_tpu_vm_creation_that_is_refused_is_not_repeated(cloud):
    assert told(cloud, "MISSING", "0", CREATE="4") == (4, ["create"])


@pytest.mark.parametrize(("codes", "code"), [("75 2", 2), ("1 75 0 0", 0), ("0 0", 0), ("0 3", 3)])
def test_tpu_slices_count_together(cloud, codes, code):
    result, _ = told(cloud, "MISSING ACTIVE", codes, "launch.tpu_vm.slices=2")
    assert result == code
    nodes = {line.split()[4] for line in cloud.lines("calls") if line.split()[3] == "ssh"}
    assert nodes == {f"{cloud.name}-0", f"{cloud.name}-1"}
    assert any(f"--node-count=2 --node-prefix={cloud.name}" in line for line in cloud.lines("calls"))


def test_tpu_vm_words_are_verbatim_and_leftovers_end(cloud):
    left = subprocess.Popen(["/bin/sleep", "60"])
    Path(f"/dev/shm/{cloud.name}.pid").write_text(f"{left.pid}\n")
    setup = 'launch.tpu_vm.setup=echo "it\'s" > setup; echo $((6 * 7)) >> setup'
    code, _ = told(cloud, "MISSING ACTIVE", "0", NASTY, setup, "launch.tpu_vm.environment.A=it's")
    assert code == 0 and left.wait(5) < 0
    argv = (cloud.folder / "argv").read_bytes().decode().split("\0")[:-1]
    assert argv == ["run", "configs/tiny.yaml", NASTY, "--distributed"]
    assert cloud.lines("setup") == ["it's", "42"] and "A=it's" in cloud.lines("env")
    assert not (cloud.folder / "pwned").exists()


def test_tpu_vms_are_deleted_when_the_script_is_stopped(cloud):
    (cloud.folder / "states").write_text("MISSING\nACTIVE\n")
    (cloud.folder / "codes").write_text("hang\n")
    script = cloud.folder / "job"
    script.write_text(render("tpu-vm", *cloud.words))
    process = subprocess.Popen(["bash", script], env=cloud.environment(), cwd=cloud.folder, stderr=subprocess.DEVNULL)
    begun = time.monotonic()
    while not any(" ssh " in line for line in cloud.lines("calls")):
        assert process.poll() is None and time.monotonic() - begun < 30
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 143
    assert " delete " in cloud.lines("calls")[-1]
