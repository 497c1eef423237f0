"""What the compiler says of a program: its figures, kept by digest, and what is said where it cannot be asked."""

import importlib.util
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from paths import TESTS
from rich.console import Console

from ministral_jax.cli import main
from ministral_jax.distributed.placement import MeshConfig, make_mesh
from ministral_jax.errors import UserError
from ministral_jax.planning import here
from ministral_jax.planning.compiler import compile as compiling
from ministral_jax.planning.compiler.compile import (
    Compiled,
    Traffic,
    cache_directory,
    compile_program,
    prepare_environment,
    target_of,
)
from ministral_jax.planning.compiler.table import compiled_view
from ministral_jax.planning.machine import parse_machine
from ministral_jax.planning.memory.stage import Item, PhaseMemory, StageMemory
from ministral_jax.planning.plan import StagePlan
from ministral_jax.stages.base import Program

ROWS, WIDTH = 16, 64


def program(width: int = WIDTH) -> Program:
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices()[:8])

    def step(batch, kernel):
        hidden = jax.lax.fori_loop(0, batch["count"], lambda _, x: x @ kernel, batch["tokens"])
        return hidden, jnp.sum(hidden)

    def shape(sizes, *axes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P(*axes)))

    batch = {"tokens": shape((ROWS, width), "fsdp"), "count": shape((), dtype=jnp.int32)}
    return Program(jax.jit(step), (batch, shape((width, width))))


def mesh_of(found: Program) -> jax.sharding.Mesh:
    return found.arguments[1].sharding.mesh


def test_figures_of_a_device():
    found = compile_program("step", program(), mesh_of(program()), visited=3)
    assert found.arguments == 4 * (ROWS // 4 * WIDTH + WIDTH**2 + 1)
    assert found.outputs >= 4 * (ROWS // 4 * WIDTH + 1) and found.seconds > 0
    assert found.flops == 3 * 2 * ROWS // 4 * WIDTH**2
    assert found.traffic == (Traffic(("fsdp",), "all-reduce", 1, 2 * 3 * 4 // 4),)
    assert found.held == found.arguments + found.outputs + found.temporaries + found.code


def test_a_program_is_compiled_once(tmp_path, monkeypatch):
    kept = "v5p:2x2x2, 1 slices", tmp_path / "new"
    first = compile_program("step", program(), mesh_of(program()), 3, kept)
    compile_once = compiling._compile
    monkeypatch.setattr(compiling, "_compile", None)
    assert compile_program("again", program(), mesh_of(program()), 3, kept) == first.model_copy(
        update={"name": "again"}
    )
    monkeypatch.setattr(compiling, "_compile", compile_once)
    compile_program("step", program(), mesh_of(program()), 4, kept)
    compile_program("step", program(), mesh_of(program()), 3, ("v5p:8x1x1, 1 slices", kept[1]))
    compile_program("step", program(2 * WIDTH), mesh_of(program()), 3, kept)
    assert len(list(kept[1].iterdir())) == 4


HLO = """HloModule jit_f

ENTRY %main (x: f32[8,4]) -> f32[8,8] {
  %x = f32[8,4] parameter(0)
  ROOT %y = f32[8,8] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
"""


class Refused:
    """A lowered program that is too large."""

    def compile(self, options):
        Path(options["xla_dump_to"], "module_0000.jit_f.after_optimizations.txt").write_text(HLO)
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (21.50G) exceeds available HBM (15.75G). HLO module: jit_f."
        )


def test_of_a_program_that_does_not_fit_everything_is_said_all_the_same():
    found = compiling._compile("step", Refused(), mesh_of(program()), 1)
    assert (found.temporaries, found.available) == (21.5 * 2**30, 15.75 * 2**30)
    assert (found.arguments, found.flops) == (128, 2 * 8 * 8 * 4)


def test_flags_of_other_platforms_do_not_reach_libtpu(monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=2")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "0")
    for name in ("TPU_WORKER_HOSTNAMES", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    prepare_environment()
    assert "XLA_FLAGS" not in os.environ
    assert (os.environ["TPU_SKIP_MDS_QUERY"], os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"]) == ("0", "1")


def test_where_programs_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "ministral_jax" / "plan"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "ministral_jax" / "plan"


def test_what_cannot_be_compiled_for(monkeypatch):
    with pytest.raises(UserError, match="--compile on h100:8: a program for a GPU can be compiled only where"):
        target_of(parse_machine("h100:8"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"v5p:2x2x1 needs libtpu.*pip install -e '\.\[aot\]'"):
        target_of(parse_machine("v5p:2x2x1"))


def test_what_libtpu_does_not_know_is_said_in_one_line(monkeypatch):
    def unknown(*args, **options):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such topology\nfurther lines")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(compiling.topologies, "get_topology_desc", unknown)
    with pytest.raises(UserError, match=r"libtpu says INVALID_ARGUMENT: no such topology$"):
        target_of(parse_machine("v5p:2x2x1"))


def test_the_command_asks_the_compiler_of_what_is_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(here, "measured_peaks", lambda: (8e10, 4e10))
    mesh = ["mesh.fsdp=2", "mesh.tensor=2", "mesh.context=2"]
    words = ["plan", str(TESTS / "micro.yaml"), "14b-pruned", *mesh, "--on", "here", "--compile"]
    main([*words, "--output", str(tmp_path / "plan.json")])
    output = capsys.readouterr()
    assert "14b-pruned: what the compiler allots" in output.out and "parent: what" not in output.out
    assert "compiling calibrate of 14b-pruned for 8 x cpu" in output.err
    (found,) = json.loads((tmp_path / "plan.json").read_text())["compiled"].values()
    names = {Compiled.model_validate(program).name for program in found}
    assert names == {"calibrate", "cut/mlp", "evaluate/states", "evaluate/figures"}
    assert len(list(cache_directory().iterdir())) == len(names)


def test_a_table_of_what_fits_and_what_does_not():
    step = Compiled(
        name="step", seconds=90, temporaries=2**31, traffic=(Traffic(("fsdp", "data"), "all-gather", 1, 10**9),)
    )
    phase = PhaseMemory("step", (Item("batch", 3 * 2**30),))
    stage = StagePlan("short", None, None, {}, StageMemory((phase,), 0, 0), None)  # type: ignore[arg-type]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(compiled_view(stage, [step, step.model_copy(update={"name": "cut/mlp", "available": 2**30})]))
    fits, refused = (line for line in shown.get().splitlines() if "GiB" in line)
    assert "2.0 GiB" in fits and "3.0 GiB" in fits and "fsdp+data 1.0 GB" in fits
    assert "2.0 of 1.0 GiB" in refused and "3.0 GiB" not in refused


def test_figures_go_through_json():
    found = Compiled(
        name="step", seconds=1, traffic=(Traffic(("fsdp",), "all-gather", 2, 8),), buffers=((8, "f32[2]", "x"),)
    )
    assert Compiled.model_validate_json(found.model_dump_json()) == found
