"""What XLA's compiler makes of a stage's programs on a machine that need not be there: memory, FLOPs and traffic.

libtpu compiles for a TPU topology without a TPU; nothing is run and nothing is allocated. Programs for a GPU can be
compiled only where there is one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from ministral_jax import places
from ministral_jax.errors import UserError
from ministral_jax.files import digest_of, file_digest, write_text
from ministral_jax.planning.compiler import hlo, traffic
from ministral_jax.planning.compiler.hlo import Buffer, Module, live_at_peak
from ministral_jax.planning.compiler.traffic import Collective, collectives
from ministral_jax.planning.machine import Machine
from ministral_jax.sampling.engine import SamplingOptions
from ministral_jax.settings import Frozen
from ministral_jax.stages import Job
from ministral_jax.stages.base import Program

LARGEST = 40
"""Arrays at the peak, and collectives, that are kept of a program."""
_ENVIRONMENT = {
    # no host is asked for its chips: the topology is named
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # no chip is opened, so that nobody else's is taken
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Traffic(NamedTuple):
    """Collectives of one kind along the same axes: how often a run has one,
    and the bytes that a device sends."""

    axes: tuple[str, ...]
    op: str
    times: int
    sent: int


class Compiled(Frozen):
    """What the compiler says of a program; everything is of one device, in bytes, seconds and FLOPs.

    `seconds`: compilation took. `arguments`, `outputs`, `temporaries`, `code`: in its memory; of the outputs, `aliased`
    take the place of arguments. `flops`: of matrix products, loops counted; `traffic` likewise. `buffers`: the largest
    arrays that are there when most is. `available`: the device's memory, where the compiler refused the program because
    its temporaries alone are more; its outputs are then among them.
    """

    name: str
    seconds: float
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    flops: float = 0
    traffic: tuple[Traffic, ...] = ()
    buffers: tuple[Buffer, ...] = ()
    available: int | None = None

    @property
    def held(self) -> int:
        """Bytes that it takes while it runs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def prepare_environment() -> None:
    """Let this process compile for machines that it does not have; before JAX has looked for devices."""
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    os.environ.pop("XLA_FLAGS", None)  # libtpu ends the process at a flag of another platform
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # no program for a topology can be read back from JAX's


def cache_directory() -> Path:
    """Where what the compiler said is kept, by a digest of the program."""
    return places.cache_directory() / "plan"


class Target(NamedTuple):
    """Devices that programs can be compiled for, and what they are called."""

    name: str
    devices: list[Any]


def target_of(machine: Machine) -> Target:
    """A machine that need not be there. Call `prepare_environment` first.

    Raises:
        UserError: GPUs; libtpu is not installed, or does not know the topology.
    """
    if machine.chip.platform != "tpu":
        raise UserError(f"--compile on {machine.name}: a program for a GPU can be compiled only where there is one")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--compile on {machine.name} needs libtpu, without a TPU: in the checkout, pip install -e '.[aot]'"
        )
    several = {"num_slices": machine.slices} if machine.slices > 1 else {}
    try:
        devices = list(topologies.get_topology_desc(machine.name, platform="tpu", **several).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--compile on {machine.name}: libtpu says {str(error).splitlines()[0]}") from None
    return Target(f"{machine.slices} x {machine.name}" if several else machine.name, devices)


def target_here() -> Target:
    """The devices of this job."""
    devices = jax.devices()
    return Target(f"{len(devices)} x {devices[0].device_kind}", devices)


def compile_stage(
    job: Job[Any], target: Target, cache: Path, wanted: Sequence[str] = (), say: Callable[[str], None] = print
) -> list[Compiled]:
    """Every program of a stage (or those `wanted`) on other devices; the job's own mesh does not matter.

    `cache`: where answers are kept; a program that was compiled before, by the same compiler for the same devices, is
    lowered and no more.

    Raises:
        UserError: the stage's mesh or batches do not fit the devices.
    """
    mesh, theirs = job.stage.meshes(list(target.devices), job.where)
    job = replace(job, mesh=mesh, teacher_mesh=theirs)
    job.stage.check_mesh(job)
    block, found = job.stage.compute.attention_block if hasattr(job.stage, "compute") else 1, []
    for name, program in job.stage.programs(job).items():
        if not wanted or name in wanted:
            say(f"compiling {name} of {job.name} for {target.name}")
            found.append(
                compile_program(name, program, program.mesh or mesh, _visited(program, block), (target.name, cache))
            )
    return found


def compile_program(
    name: str, program: Program, mesh: Mesh, visited: float, kept: tuple[str, Path] | None = None
) -> Compiled:
    """One program on the devices of a mesh. `visited`: how often loops that do not say so go round. `kept`: a name of
    the machine, and the directory of the cache."""
    with jax.set_mesh(mesh):
        lowered = program.lower()
    if kept is None:
        return _compile(name, lowered, mesh, visited)
    topology, cache = kept
    devices = [device.id for device in mesh.devices.flat]
    parts = [lowered.as_text(), topology, devices, list(mesh.shape.items()), visited, _versions()]
    path = cache / f"{digest_of(parts)}.json"
    if path.is_file():
        return Compiled.model_validate_json(path.read_text()).model_copy(update={"name": name})
    compiled = _compile(name, lowered, mesh, visited)
    cache.mkdir(parents=True, exist_ok=True)
    write_text(path, compiled.model_dump_json(indent=1) + "\n")
    return compiled


def _versions() -> dict[str, str]:
    """Of the compiler, and of what reads its programs."""
    found = {Path(module.__file__ or "").name: file_digest(Path(module.__file__ or "")) for module in (hlo, traffic)}
    for name in ("jax", "jaxlib", "libtpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _visited(program: Program, block: int) -> float:
    """How often, on average, a loop goes round whose count depends on data. There are two: attention by tiles, of which
    a causal row visits half at most, by which the vision tower's are counted too, though by its pictures they may be
    more or fewer; and sampling, which stops at the end of a chunk of tokens."""
    for argument in program.arguments:
        if isinstance(argument, Mapping) and "tokens" in argument:
            return (-(-argument["tokens"].shape[1] // block) + 1) / 2
    return SamplingOptions().chunk


def _compile(name: str, lowered: Any, mesh: Mesh, visited: float) -> Compiled:
    refused, start = None, time.perf_counter()
    # JAX cannot read these programs back from libtpu 0.0.52 (asynchronous fusions); the compiler's own dump is text,
    # and there even of a program that was refused.
    with tempfile.TemporaryDirectory() as directory:
        dump = Path(directory)
        try:
            compiled = lowered.compile({"xla_dump_to": directory, "xla_dump_hlo_as_text": True})
            memory = _memory(compiled.memory_analysis())
        except jax.errors.JaxRuntimeError as error:
            if not (refused := _OUT_OF_MEMORY.search(str(error))):
                raise
            memory = {"temporaries": round(float(refused.group(1)) * 2**30)}
        seconds = time.perf_counter() - start
        text = max(dump.glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size).read_text()
        live = next((path.read_text() for path in dump.glob("*live-range.txt")), "")
    module = Module.read(text, visited)
    return Compiled(
        name=name,
        seconds=seconds,
        **{"arguments": module.arguments, **memory},
        flops=module.flops(),
        traffic=_by_axes(collectives(module), mesh),
        buffers=tuple(live_at_peak(live, module)[:LARGEST]),
        available=round(float(refused.group(2)) * 2**30) if refused else None,
    )


_OUT_OF_MEMORY = re.compile(r"HLO temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)")


def _memory(found: Any) -> dict[str, int]:
    return {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
    }


def _by_axes(found: list[Collective], mesh: Mesh) -> tuple[Traffic, ...]:
    count, sent = Counter[tuple[tuple[str, ...], str]](), Counter[tuple[tuple[str, ...], str]]()
    for collective in found:
        key = collective.axes(mesh.shape), collective.op
        count[key] += collective.times
        sent[key] += collective.sent
    return tuple(Traffic(*key, count[key], total) for key, total in sent.most_common())
