"""The processes of a job: joining them, stopping together, and never waiting for one that is gone.

Exit codes are a contract with whatever started the job: 0 done; 75 (`EX_TEMPFAIL`) preempted or lost a peer, the same
command goes on; 2 the user's input is at fault; 130 interrupted (Ctrl-C); anything else is a fault, 128 + n a signal.
"""

from __future__ import annotations

import dis
import faulthandler
import os
import re
import signal
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, TypeVar

import jax
from jax.experimental import multihost_utils
from pydantic import Field

from ministral_jax import console
from ministral_jax.errors import UserError
from ministral_jax.settings import Frozen

Batch = TypeVar("Batch")
Shapes = tuple[tuple[int, ...], ...]
RETRY = 75
_LEAVE_SECONDS = 10
_TIMES = 10
_MEASURED = 20
"""Of each kind of work, the durations that are kept."""


class Limits(Frozen):
    """Seconds after which a job of several processes gives up waiting and ends with 75, to be started again."""

    step: float = Field(default=900, gt=0)
    """Without a step, an evaluated or a calibrated batch: a peer hangs. What takes long by nature gets more: ten times
    the median of the last ones of its kind, and `slow` until one of them was measured."""
    slow: float = Field(default=3600, gt=0)
    """The same, for what takes long: compiling, loading, saving. Packing data may take any time."""
    join: int = Field(default=300, ge=1)
    """For all processes to appear."""
    heartbeat: int = Field(default=100, ge=1)
    """Without a sign of life from a process; too short a time kills healthy jobs on a busy network."""


class Preempted(Exception):
    """The job was asked to stop (SIGTERM), before what the text says. Every process raises it at the same point."""

    code: ClassVar = RETRY
    said: ClassVar = "stopped as asked"
    then: str = "what is finished is kept, the same command does the rest"
    """What the same command will do; whoever saves on the way out says more."""


class Interrupted(Preempted):
    """The same, by Ctrl-C (SIGINT) in this process."""

    code = 130
    said = "interrupted"


class Unreachable(Preempted):
    """What the job needs did not answer, as the text says, which a later attempt may find mended."""

    said = "stopped by the network"


@dataclass
class _Job:
    """What this process knows of its job."""

    limits: Limits = field(default_factory=Limits)
    asked: bool = False
    interrupted: bool = False
    polls: int = 0
    doing: str = "starting"
    begun: float = 0.0
    measured: str | None = None
    """The kind of work that is being done, if its duration counts."""
    durations: defaultdict[str, deque[float]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=_MEASURED))
    )
    """Seconds of the last pieces of work, by their kind."""
    deadline: float | None = None
    observer: Callable[[str], None] | None = None


_job = _Job()


def use_cpu(devices: int) -> None:
    """Run on that many virtual CPU devices; before the first use of a device."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def join(
    limits: Limits,
    distributed: bool = False,
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
) -> None:
    """Become one of a job's processes; before the first use of a device.

    `distributed` leaves everything to JAX's own detection of the cluster (SLURM, TPU VMs, GKE, Kubernetes jobs); the
    three settings override what it finds.

    Raises:
        UserError: no cluster was found, or a scheduler started several tasks that would not know of each other.
    """
    _job.limits = limits
    _job.durations.clear()
    explicit = coordinator is not None
    if not distributed and not explicit:
        if (
            int(os.environ.get("SLURM_NTASKS", 1)) > 1
            and "SLURM_PROCID" in os.environ
            and "SLURM_STEP_ID" in os.environ
        ):
            raise UserError(
                f"SLURM started {os.environ['SLURM_NTASKS']} tasks of this command; add --distributed to make them one "
                "job, or start one task"
            )
        signal.signal(signal.SIGTERM, _ask)
        _listen()
        return
    if explicit and (count is None or index is None or not 0 <= index < count):
        raise UserError(
            f"--coordinator {coordinator} needs --process-count and --process-index below it, got {count} and {index}"
        )
    threading.Thread(target=_watch, daemon=True, name="watchdog").start()
    _arm("joining", limits.join + 30)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=limits.join,
            heartbeat_timeout_seconds=limits.heartbeat,
            shutdown_timeout_seconds=_LEAVE_SECONDS + 5,
        )
    except ValueError as error:
        raise UserError(
            f"--distributed found no cluster ({error}); start the job with a scheduler JAX knows, or give "
            "--coordinator HOST:PORT, --process-count and --process-index"
        ) from None
    _listen()
    print(
        f"process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of {jax.device_count()} "
        f"devices ({jax.devices()[0].device_kind})",
        file=sys.stderr,
        flush=True,
    )


def _ask(signum: int, frame: object) -> None:
    _job.asked = True


def _listen() -> None:
    """Take Ctrl-C as SIGTERM, and a second one as the wish to end at once; unless somebody else handles it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.set_wakeup_fd(_ear(), warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, _heard)


def _heard(signum: int, frame: object) -> None:
    """Python writes a signal's number to the wakeup file only where it handles it."""


@cache
def _ear() -> int:
    """A file to which numbers of signals are written, and a thread that answers to them: it runs while the main one
    waits for a device or for the compiler."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_answer, args=(reading,), daemon=True, name="interrupts").start()
    return writing


def _answer(reading: int) -> None:
    while number := os.read(reading, 1):
        if number[0] != signal.SIGINT:
            continue
        if _job.interrupted:
            os.write(2, b"ministral-jax: interrupted twice, ended at once; what was saved before stays\n")
            os._exit(Interrupted.code)
        _job.interrupted = True
        os.write(2, b"ministral-jax: interrupted, stopping before the next step; a second Ctrl-C ends at once\n")
        os.kill(os.getpid(), signal.SIGTERM)  # of several processes, JAX's notifier tells the others


def poll(doing: str, slow: bool = False) -> None:
    """Say what comes next; every process calls it at the same points, between pieces of work.

    Raises:
        Preempted: the job was asked to stop and all processes have agreed to do so here.
    """
    limits, kind = _job.limits, _kind(doing)
    _measure()
    if slow:  # the first of a stage, which may be slower than all stages before
        _job.durations[kind].clear()
    usual = limits.step if _job.durations[kind] else limits.slow
    _arm(doing, usual, None if slow else kind)
    _job.polls += 1
    # Of several processes, JAX's notifier has the SIGTERM of any; they learn of it and agree on a count to stop at.
    if multihost_utils.reached_preemption_sync_point(_job.polls) if jax.process_count() > 1 else _job.asked:
        raise (Interrupted if _job.interrupted else Preempted)(doing)


def poll_slow(doing: str) -> None:
    """`poll` before what may have to be compiled."""
    poll(doing, slow=True)


def poll_alone(doing: str) -> None:
    """`poll` where only this process works: it cannot agree with others, so it stops only when there are none. It may
    take any time."""
    _arm(doing, None)
    if _job.asked and jax.process_count() == 1:
        raise (Interrupted if _job.interrupted else Preempted)(doing)


def polled(batches: Iterable[Batch], doing: str) -> Iterator[Batch]:
    """The batches, with a `poll` before each is worked on, "`doing` n" with n from 1; the work of the first one of its
    shapes compiles.

    Raises:
        Preempted: see `poll`.
    """
    seen = set[Shapes]()
    for number, batch in enumerate(batches, 1):
        shapes = shapes_of(batch)
        poll(f"{doing} {number}", slow=shapes not in seen)
        seen.add(shapes)
        yield batch


def shapes_of(batch: Any) -> Shapes:
    """Of a batch's arrays: batches with others are worked on by a program of their own. None of what is no arrays by
    name, such as prompts, of which a step makes its own."""
    return tuple(getattr(x, "shape", ()) for x in jax.tree.leaves(batch)) if isinstance(batch, Mapping) else ()


def compiles() -> None:
    """What the last `poll` told of has to be compiled first, as it turns out: as if that had been `slow`."""
    _job.durations[_kind(_job.doing)].clear()
    _job.measured, _job.deadline = None, time.monotonic() + _job.limits.slow


def announce(doing: str) -> None:
    """Say what comes next, where it may take as long as what is slow and does not stop on the way."""
    _arm(doing, _job.limits.slow, _kind(doing))


def saving() -> None:
    """`announce` a save."""
    announce("saving")


@contextmanager
def unwatched() -> Generator[None]:
    """For a wait that ends by itself when one of those that are waited for dies: its time is not held against this
    process."""
    deadline, begun = _job.deadline, time.monotonic()
    _job.deadline = None
    try:
        yield
    finally:
        _job.deadline = None if deadline is None else deadline + time.monotonic() - begun


def observe(told: Callable[[str], None]) -> None:
    """Have `told` called with what comes next whenever this process says it: for whoever watches a job from inside."""
    _job.observer = told


def _kind(doing: str) -> str:
    return re.sub(r"\d+", "", doing)


def _measure() -> None:
    """What was being done is done."""
    if _job.measured is not None:
        _job.durations[_job.measured].append(time.monotonic() - _job.begun)
        _job.measured = None


def _arm(doing: str, usual: float | None, measured: str | None = None) -> None:
    """This process gives up after the `usual` seconds, or after a multiple of what was `measured` of this kind."""
    _measure()
    now = time.monotonic()
    _job.doing, _job.begun, _job.measured = doing, now, measured
    past = _job.durations[measured] if measured is not None else None
    _job.deadline = None if usual is None else now + max(usual, _TIMES * statistics.median(past or [0.0]))
    if _job.observer is not None:
        _job.observer(doing)


def _watch() -> None:
    """A peer that hangs sends heartbeats all the same; this is what ends the wait for it.

    The second timer lives in C, for a main thread that never lets go of the interpreter.
    """
    while True:
        time.sleep(0.5)
        deadline = _job.deadline
        if deadline is None:
            faulthandler.cancel_dump_traceback_later()
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"process {_index()}: no progress while {_job.doing}; giving up", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
            os._exit(RETRY)
        faulthandler.dump_traceback_later(left + 30, exit=True)


def _index() -> int:
    return jax.process_index() if jax.distributed.is_initialized() else 0


_LOST = re.compile(r"(UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED|ABORTED): |[A-Z_]+: (.*: )?(Gloo|NCCL) .*failed")
"""How the status of a wait for other processes begins: by its code, or by the transport of the collective."""
_RUNTIME = ("jax", "jaxlib", "orbax")


def lost_peer(error: BaseException) -> bool:
    """Whether an error of a job of several processes, or what it came from, says that another one is gone.

    It is the runtime's own then: a `JaxRuntimeError`, or the plain `ValueError` that JAX makes of the status of a
    collective that fails while it is dispatched; and no `raise` of this program or its user made it. Other errors are
    faults of theirs, whatever words their texts have.
    """
    if not jax.distributed.is_initialized():
        return False
    seen: BaseException | None = error
    while seen is not None:
        of_runtime = isinstance(seen, jax.errors.JaxRuntimeError) or type(seen) is ValueError
        if of_runtime and _LOST.match(str(seen)) and not _raised_here(seen):
            return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False


def _raised_here(error: BaseException) -> bool:
    """Whether a `raise` statement outside JAX made it, and not compiled code: where that fails, the innermost frame
    stands at a call."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    raised = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return raised and str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0] not in _RUNTIME


def leave(code: int, together: bool) -> int:
    """End this process's part in the job: `together` with the others after what all of them did; else at once, so that
    no peer waits for a handshake. Returns `code` when there are no others."""
    if not jax.distributed.is_initialized():
        if signal.getsignal(signal.SIGINT) is _heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return code
    _arm("leaving", _LEAVE_SECONDS + 20)
    if together:
        goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        goodbye.start()
        goodbye.join(_LEAVE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    console.flush()
    os._exit(code)
