"""The rendered scripts, executed with stand-ins for the schedulers' clients on PATH."""

from __future__ import annotations

import subprocess
import threading
import time
import uuid
from pathlib import Path

import pytest
from launch_cases import NASTY, TPU_VM, render


class Bench:
    """A directory of stand-ins, first on PATH; `$BENCH` is where they note what they were called with."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, f"test-{uuid.uuid4().hex[:12]}"
        self.pid_file = Path(f"/dev/shm/{self.name}.pid")
        self.command("scontrol", 'echo "$@" >> "$BENCH/scontrol"')

    def command(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def start(self, script: str, **more: str) -> subprocess.Popen[bytes]:
        path = self.folder / "job"
        path.write_text(script)
        environment = {"PATH": f"{self.folder}/bin:/usr/bin:/bin", "BENCH": str(self.folder), "HOME": "/root", **more}
        return subprocess.Popen(["bash", path], env=environment, cwd=self.folder, stderr=subprocess.DEVNULL)

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def argv(self) -> list[str]:
        return (self.folder / "argv").read_bytes().decode().split("\0")[:-1]

    def on_tpu_vm(
        self, states: str, codes: str, *words: str, run_dir: str | None = None, **more: str
    ) -> subprocess.Popen[bytes]:
        """The script, begun, with what gcloud answers."""
        for name, script in (("gcloud", GCLOUD), ("sleep", "exit 0"), ("ministral-jax", RECORD)):
            self.command(name, script)
        for name, values in (("states", states), ("codes", codes)):
            (self.folder / name).write_text("\n".join(values.split()) + "\n")
        words = (*TPU_VM, f"launch.tpu_vm.mount={self.folder}", f"launch.tpu_vm.name={self.name}", *words)
        return self.start(render("tpu-vm", *words, run_dir=run_dir), **more)

    def verbs(self) -> str:
        """Of the calls of gcloud, questions left out."""
        return " ".join(verb for line in self.lines("calls") if (verb := line.split()[3]) != "describe")


def wait_for(bench: Bench, process: subprocess.Popen[bytes], verb: str) -> None:
    deadline = time.monotonic() + 30
    while verb not in bench.verbs():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.pid_file.unlink(missing_ok=True)


RECORD = r"""printf '%s\0' "$@" > "$BENCH/argv"; printenv > "$BENCH/env"; exit "$CODE" """


@pytest.mark.parametrize(
    ("code", "count", "again"),
    [
        *[(0, "", False), (75, "", True), (75, "2", True), (75, "3", False), (137, "1", True), (143, "3", False)],
        *[(1, "", False), (2, "", False), (128, "", False), (130, "", False)],
    ],
)
def test_slurm_acts_on_the_exit_code(bench, code, count, again):
    bench.command("srun", RECORD)
    more = {"SLURM_RESTART_COUNT": count} if count else {}
    script = render("slurm", "launch.slurm={nodes: 2, restarts: 3}")
    assert bench.start(script, CODE=str(code), SLURM_JOB_ID="77", **more).wait(60) == code
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
    script = render("slurm", "launch.slurm={nodes: 2, restarts: 3}")
    assert bench.start(script, CODES=codes, SLURM_JOB_ID="77").wait(60) == code
    assert bench.lines("scontrol") == (["requeue 77"] if again else [])


def test_slurm_passes_words_verbatim_and_secrets_by_their_file(bench):
    bench.command("srun", RECORD)
    secrets = bench.folder / "my secrets.env"
    secrets.write_text("HF_TOKEN='hf_hush'\n")
    block = f'launch.slurm={{env_file: {secrets}, nodes: 2, environment: {{A: "it\'s $(touch pwned)\\nb"}}}}'
    script = render("slurm", NASTY, block)
    assert "hf_hush" not in script
    assert bench.start(script, CODE="0").wait(60) == 0
    assert bench.argv()[2:4] == ["bash", "-c"]
    assert bench.argv()[6:] == ["ministral-jax", "run", "configs/tiny.yaml", NASTY, "--distributed"]
    assert not (bench.folder / "pwned").exists()
    assert {"HF_TOKEN=hf_hush", "A=it's $(touch pwned)", "b"} <= set(bench.lines("env"))
    secrets.unlink()
    (bench.folder / "argv").unlink()
    assert bench.start(script, CODE="0").wait(60) == 2 and not (bench.folder / "argv").exists()


# `states` and `codes` hold what to answer next; a last one stays.
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
  create) /bin/sleep "${TAKES:-0}"; exit "${CREATE:-0}" ;;
  ssh)
    export CODE=$(next codes)
    exec 9>&-
    [ "$CODE" = hang ] && exec /bin/sleep 60
    for word in "$@"; do case $word in --command=*) exec bash -c "${word#--command=}" ;; esac; done ;;
esac
exit 0
"""


@pytest.mark.parametrize(
    ("states", "codes", "restarts", "code", "verbs"),
    [
        ("MISSING WAITING_FOR_RESOURCES PROVISIONING ACTIVE", "0", 20, 0, "create ssh delete"),
        ("MISSING ACTIVE", "75 0", 20, 0, "create ssh ssh delete"),
        ("MISSING ACTIVE SUSPENDED MISSING ACTIVE", "255 0", 20, 0, "create ssh delete create ssh delete"),
        ("MISSING ACTIVE SUSPENDED FAILED MISSING ACTIVE", "1 0", 20, 0, "create ssh delete create ssh delete"),
        ("MISSING FAILED", "0", 2, 75, "create delete delete delete"),
        ("MISSING ACTIVE", "75", 2, 75, "create ssh ssh ssh delete"),
        *[("MISSING ACTIVE", code, 20, int(code), "create ssh delete") for code in ("1", "130")],
        *[("MISSING ACTIVE", code, 20, int(code), "create ssh") for code in ("2", "126", "127")],
        ("BROKEN MISSING BROKEN ACTIVE", "0", 20, 0, "create ssh delete"),
        ("BROKEN", "0", 3, 1, ""),
    ],
)
def test_tpu_vms_are_kept_going(bench, states, codes, restarts, code, verbs):
    """A taken slice is deleted and made again; 75 starts again; a fault ends it; each bounded; nothing is left over
    but what a mended command is to use."""
    assert bench.on_tpu_vm(states, codes, f"launch.tpu_vm.restarts={restarts}").wait(60) == code
    assert bench.verbs() == verbs
    made = [line.split() for line in bench.lines("calls") if " create " in line]
    asked = {f"--node-id={bench.name}", "--zone=us-east5-b", "--accelerator-type=v6e-4", "--spot"}
    assert all(asked | {"--runtime-version=v2-alpha-tpuv6e"} <= set(words) for words in made)


@pytest.mark.parametrize(
    ("states", "codes", "code", "verbs"),
    [
        *[("ACTIVE", code, int(code), "ssh") for code in ("0", "1", "2")],
        ("WAITING_FOR_RESOURCES ACTIVE", "75 0", 0, "ssh ssh"),
        *[(state, "0", 1, "") for state in ("SUSPENDED", "FAILED")],
        ("ACTIVE MISSING ACTIVE", "75 0", 0, "ssh create ssh delete"),
    ],
)
def test_tpu_vms_that_were_there_are_not_deleted(bench, states, codes, code, verbs):
    assert bench.on_tpu_vm(states, codes).wait(60) == code
    assert bench.verbs() == verbs


def test_tpu_vms_of_an_earlier_start_are_owned_by_saying_so(bench):
    assert bench.on_tpu_vm("ACTIVE SUSPENDED MISSING ACTIVE", "75 0", OWNED="yes").wait(60) == 0
    assert bench.verbs() == "ssh delete create ssh delete"


def test_tpu_vm_of_a_reservation(bench):
    assert bench.on_tpu_vm("MISSING ACTIVE", "0", "launch.tpu_vm.reserved=true").wait(60) == 0
    (made,) = [line.split() for line in bench.lines("calls") if " create " in line]
    assert "--reserved" in made and "--spot" not in made


def test_tpu_vms_are_deleted_when_the_script_is_stopped_while_it_asks_for_them(bench):
    process = bench.on_tpu_vm("MISSING ACTIVE", "0", TAKES="1")
    wait_for(bench, process, "create")
    process.terminate()
    assert process.wait(30) == 143 and bench.verbs() == "create delete"


def test_tpu_vm_creation_that_is_refused_is_not_repeated(bench):
    assert bench.on_tpu_vm("MISSING", "0", "launch.tpu_vm.spot=false", CREATE="4").wait(60) == 4
    assert bench.verbs() == "create" and "--spot" not in bench.lines("calls")[-1]


def test_tpu_vm_words_are_verbatim_and_leftovers_end(bench):
    left = subprocess.Popen(["/bin/sleep", "60"])
    threading.Thread(target=left.wait, daemon=True).start()  # a host's first process takes note of its end, too
    bench.pid_file.write_text(f"{left.pid}\n")
    setup = 'launch.tpu_vm.setup=export B="it\'s"; echo $((6 * 7)) > setup'
    begun = bench.on_tpu_vm("MISSING ACTIVE", "0", NASTY, setup, "launch.tpu_vm.environment.A=it's")
    assert begun.wait(60) == 0 and left.poll() < 0
    assert bench.argv() == ["run", "configs/tiny.yaml", NASTY, "--distributed"]
    assert bench.lines("setup") == ["42"] and {"A=it's", "B=it's"} <= set(bench.lines("env"))
    assert not (bench.folder / "pwned").exists()


@pytest.mark.parametrize(("run_dir", "code"), [("gs://my-runs/tiny", 0), (None, 2)])
def test_tpu_vms_whose_run_is_in_a_bucket_mount_none(bench, run_dir, code):
    bench.command("sudo", 'exec "$@"')
    mount = f"launch.tpu_vm.mount={bench.folder}/made for it"
    assert bench.on_tpu_vm("MISSING ACTIVE", "0", mount, run_dir=run_dir).wait(60) == code
    assert (bench.folder / "made for it").is_dir() == (code == 0)


def test_tpu_vms_are_deleted_when_the_script_is_stopped(bench):
    process = bench.on_tpu_vm("MISSING ACTIVE", "hang")
    wait_for(bench, process, "ssh")
    process.terminate()
    assert process.wait(30) == 143 and bench.verbs() == "create ssh delete"
