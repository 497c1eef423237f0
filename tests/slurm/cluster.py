"""A real SLURM of four nodes on this machine: daemons of its own, in a directory of its own, gone when it is left."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

NODES = tuple(f"node{i}" for i in range(4))
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_HOSTS, _POLICY = Path("/etc/hosts"), Path("/usr/sbin/policy-rc.d")


def missing() -> str | None:
    """Why there can be no SLURM here, or None."""
    if os.geteuid() != 0:
        return "SLURM's daemons are started as root"
    if _absent() and not shutil.which("apt-get"):
        return f"{', '.join(_absent())} not installed, and no apt-get to install them with"
    return None


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def wait_for(ready: Callable[[], object], what: str, seconds: float, details: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s\n{details()}"
        time.sleep(0.1)


@contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """Bring SLURM up; yields the environment in which its commands find it. AssertionError when it stays down."""
    _install()
    with ExitStack() as stack:
        # not below pytest's directory: a socket's path must be short, and munge wants parents that others cannot write
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
        work.chmod(0o755)
        stack.enter_context(_named_here(NODES))
        (work / "slurm.conf").write_text(_configuration(work))
        (work / "cgroup.conf").write_text(f"CgroupPlugin={_cgroups()}\n")
        environment = {**os.environ, "SLURM_CONF": str(work / "slurm.conf")}
        daemons: list[subprocess.Popen[bytes]] = []
        stack.callback(_end_all, work, daemons)
        (work / "key").write_bytes(os.urandom(128))
        (work / "key").chmod(0o600)
        files = {"key-file": "key", "socket": "munge", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{option}={work / name}" for option, name in files.items()]
        start = partial(_start, work, environment, daemons)
        start("munged", "--force", "--foreground", f"--seed-file={work / 'seed'}", *options)
        wait_for(lambda: (work / "munge").exists(), "munged", 30)
        start("slurmctld", "-D", "-c")
        for node in NODES:
            start("slurmd", "-D", "-N", node)
        query = ["sinfo", "--noheader", "--Node", "--format=%T"]

        def idle() -> bool:
            told = subprocess.run(query, env=environment, capture_output=True, text=True)
            return told.stdout.split() == ["idle"] * len(NODES)

        wait_for(idle, "four idle nodes", 60, lambda: _logs(work))
        yield environment


def _absent() -> list[str]:
    return [name for name in _PROGRAMS if not shutil.which(name)]


def _install() -> None:
    """Install SLURM where it is missing, starting none of the services that come with it."""
    if not _absent():
        return
    mine = not _POLICY.exists()
    try:
        if mine:
            _POLICY.write_text("#!/bin/sh\nexit 101\n")
            _POLICY.chmod(0o755)
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        apt = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0"]
        subprocess.run([*apt, "update"], env=quiet, check=True)
        subprocess.run([*apt, "install", "-y", "--no-install-recommends", "slurm-wlm", "munge"], env=quiet, check=True)
    finally:
        if mine:
            _POLICY.unlink(missing_ok=True)


def _configuration(work: Path) -> str:
    host = socket.gethostname().split(".")[0]
    port, *ports = _free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=500 State=UNKNOWN"
        for node, port in zip(NODES, ports, strict=True)
    )
    return f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={work}/munge
StateSaveLocation={work}/state
SlurmdSpoolDir={work}/spool-%n
SlurmctldPidFile={work}/slurmctld.pid
SlurmdPidFile={work}/slurmd-%n.pid
SlurmctldLogFile={work}/slurmctld.log
SlurmdLogFile={work}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
JobRequeue=1
KillWait=60
{nodes}
PartitionName=main Nodes=node[0-3] Default=YES MaxTime=INFINITE State=UP
"""


def _cgroups() -> str:
    """Without a systemd of its own SLURM cannot use version 2; the setting for none at all came with 23.02."""
    version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True).stdout.split()[-1]
    return "disabled" if tuple(int(part) for part in version.split(".")[:2]) >= (23, 2) else "cgroup/v1"


@contextmanager
def _named_here(names: tuple[str, ...]) -> Iterator[None]:
    """JAX calls the first node by its name, so names must lead here; one line for each cluster that is up."""
    line = f"127.0.0.1 {' '.join(names)} # a test of SLURM\n"
    before = _HOSTS.read_text()
    _HOSTS.write_text(before + ("" if before.endswith("\n") else "\n") + line)
    try:
        yield
    finally:
        _HOSTS.write_text(_HOSTS.read_text().replace(line, "", 1))


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _start(work: Path, environment: dict[str, str], daemons: list[subprocess.Popen[bytes]], *command: str) -> None:
    with (work / "daemons.log").open("a") as log:
        daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))


def _logs(work: Path) -> str:
    return "\n".join(f"---- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(work.glob("*.log")))


def processes(**variables: str) -> list[int]:
    """Living processes whose environment has these values."""
    wanted = {f"{name}={value}".encode() for name, value in variables.items()}
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted <= set(path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
    return sorted(found)


def managers(job: str) -> list[int]:
    """Living `slurmstepd`s of a job; each tells the controller how its step has ended before it goes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if path.read_bytes().startswith(f"slurmstepd: [{job}.".encode()):
                found.append(int(path.parent.name))
    return found


def _end_all(work: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    """Daemons, the managers of steps and what jobs left: all know of this cluster by their environment."""

    def left() -> list[int]:
        return [pid for pid in processes(SLURM_CONF=str(work / "slurm.conf")) if pid != os.getpid()]

    for number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 10)):
        deadline = time.monotonic() + seconds
        while (pids := left()) and time.monotonic() < deadline:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(0.5)
    assert not left(), f"still there: {left()}"
    for daemon in daemons:
        daemon.wait()
