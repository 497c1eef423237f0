"""Verbs: what each says of itself, one that a user's package adds, and programs without data or devices."""

import json
import os
import subprocess
import sys

import jax
import pytest
from harness import COMPILING
from paths import ROOT, TESTS

from ministral_jax.distributed.axes import constrain
from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.stages import Graph, Job, figures, verbs
from ministral_jax.stages.base import Program

TOY = """
from typing import Any, ClassVar, Literal

from pydantic import Field

from ministral_jax.stages import Figure, Job, Result, Stage
from ministral_jax.stages.base import load_stage
from ministral_jax.training.log import StageLog
from ministral_jax.stages.figures import Curve


class Shrink(Stage):
    \"\"\"Multiply every parameter by a factor.\"\"\"

    figures: ClassVar = (Figure("largest", "largest weight", "", "lower"),)
    curve: ClassVar = Curve("largest", None, "step")

    do: Literal["shrink"]
    source: str = Field(alias="from")
    factor: float = Field(default=0.5, gt=0)

    def run(self, job: Job) -> Result:
        import jax
        import jax.numpy as jnp

        params = jax.tree.map(lambda x: x * self.factor, load_stage(job.source, placement=job.placement)[1])
        largest = float(max(jnp.abs(x).max() for x in jax.tree.leaves(params)))
        log = StageLog(job.directory, None)
        log.write("eval", 0, {"largest": 2 * largest})
        log.write("eval", 1, {"largest": largest})
        log.close()
        return Result({"largest": largest}, files=job.save(params))
"""
RECIPE = """
name: toy
data:
  tokenizer: {file: bundled, vocab: 512, special: 64}
  sources: {code: {kind: python-library, limit: 12}}
  held_out: 0.2
stages:
  parent:
    do: train
    steps: 1
    batch: {sequences: 1, length: 32}
    evaluate: {rows: 1}
    model:
      {layers: 1, width: 8, mlp_width: 8, heads: 1, kv_heads: 1, head_width: 8, vocab: 512, context: 32, vision: null}
  small: {do: shrink, from: parent}
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A package of a user's, installed, and a recipe with its verb."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_verbs.py").write_text(TOY)
    (folder / "toy.yaml").write_text(RECIPE)
    metadata = folder / "toy_verbs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-verbs\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[ministral_jax.stages]\nshrink = toy_verbs:Shrink\n")
    return folder


COMMANDS = """
import json, sys
from ministral_jax.cli import main
print(json.dumps([main(words.split()) for words in sys.argv[1:]]))
"""
LINES = (
    "run toy.yaml --run-dir run",
    "run toy.yaml --run-dir run",
    "sweep toy.yaml stages.small.factor=0.5,0.25 --run-dir swept",
    "run toy.yaml stages.small.factr=2 --run-dir run",
)


@pytest.fixture(scope="module")
def done(toy) -> subprocess.CompletedProcess:
    """The lines, one after the other, by a process that knows the user's package."""
    environment = {**os.environ, **COMPILING, "PYTHONPATH": f"{ROOT}{os.pathsep}{toy}", "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-c", COMMANDS, *LINES]
    found = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=toy)
    assert json.loads(found.stdout.splitlines()[-1]) == [0, 0, 0, 2], found.stderr
    return found


def test_a_verb_of_one_file_runs_resumes_sweeps_and_is_reported(toy, done):
    assert "[2/2] small: shrink" in done.stderr, done.stderr
    assert all(f"] {name}: finished already" in done.stderr for name in ("parent", "small")), done.stderr
    page = (toy / "run" / "report.html").read_text()
    assert "small" in page and "largest weight" in page
    assert "largest" in done.stdout, done.stderr
    assert len(list((toy / "swept" / "shared").glob("parent-*"))) == 1
    assert "largest weight" in (toy / "swept" / "report.html").read_text()


def test_a_fault_of_a_users_verb_is_said_like_any_other(done):
    assert "unknown key stages.small.factr (did you mean factor?)" in done.stderr.splitlines()[-1]


def test_every_verb_says_what_it_is_called_and_what_it_measures():
    for name, verb in verbs().items():
        assert verb.model_fields["do"].annotation.__args__ == (name,) and verb.__doc__
        assert verb.curve is None or verb.curve.figure in {figure.name for figure in verb.figures}
    assert {"kl", "ce", "win_rate", "judge_accuracy", "bytes_per_token", "kl_to_source"} <= figures().keys()


def test_a_program_is_lowered_under_its_rules():
    place = Placement(make_mesh(MeshConfig(fsdp=8), jax.devices()[:8]), Rules())
    program = Program(jax.jit(lambda x: constrain(2 * x, ("batch", None))), (jax.ShapeDtypeStruct((8, 4), "float32"),))
    with jax.set_mesh(place.mesh):
        assert "sharding_constraint" not in program.lower().as_text()
        ruled = program._replace(function=jax.jit(lambda x: constrain(2 * x, ("batch", None))), rules=place.rules)
        assert "sharding_constraint" in ruled.lower().as_text()


@pytest.fixture
def opened():
    """Files that were opened while it was there, but for those of Python and of its packages."""
    paths: list[str] = []
    watching = [True]

    packages = (sys.prefix, sys.base_prefix)

    def note(event, args):
        path = args[0] if watching[0] and event == "open" else None
        if isinstance(path, str) and not path.endswith((".py", ".pyc")) and not path.startswith(packages):
            paths.append(path)

    sys.addaudithook(note)
    yield paths
    watching[0] = False


@pytest.mark.parametrize("recipe", ["micro.yaml", "micro_stored.yaml", "micro_post.yaml"])
def test_programs_lower_for_described_devices_without_a_file_being_read(recipe, tmp_path, opened):
    loaded = load_recipe(TESTS.joinpath(recipe), ["mesh.fsdp=2", "mesh.tensor=2", "mesh.context=2"])
    specs, devices = resolve_specs(loaded), jax.devices()[:8]
    opened.clear()
    for name, stage in loaded.stages.items():
        graph = Graph(loaded.stages, specs)
        job = Job(name, stage, specs[name], graph, tmp_path / "none", make_mesh(stage.mesh, devices))
        programs = stage.programs(job)
        assert programs or stage.do in ("import", "export"), name
        for label, program in programs.items():
            with jax.set_mesh(job.mesh):
                assert "module @" in program.lower().as_text(), (name, label)
    assert opened == []
