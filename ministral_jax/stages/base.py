"""What a stage is: settings that a recipe may say, and a function from finished stage directories to one more.

A verb is a class: `do` names it, its fields are its settings. It says what it needs (`inputs`), resolves its sizes and
finds every fault before anything is computed (`resolve`, `check_mesh`, `prepare`), gives the compiled programs it runs
(`programs`), runs them (`run`), and names its figures (`figures`, `curve`). Everything that orders, runs, sweeps or
reports stages learns of a verb from here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from pydantic import ConfigDict, Field, ValidationError

from ministral_jax.data.config import TokenizerConfig
from ministral_jax.data.tokenizer import Tokenizer, load_tokenizer, read_tokenizer
from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.distributed.processes import saving
from ministral_jax.errors import UserError
from ministral_jax.explain import explain, suggest
from ministral_jax.models.spec import PRESETS, ModelSpec
from ministral_jax.models.vlm import abstract_params, init_params, param_shardings, placed_params
from ministral_jax.settings import ANYWHERE, Frozen, merge
from ministral_jax.stages.figures import Curve, Figure
from ministral_jax.stages.manifest import finished, refuse_export
from ministral_jax.training.checkpoint import load_params, save_params

if TYPE_CHECKING:
    from ministral_jax.stages.rows import Packing

Params = dict[str, Any]
ModelRef = str | dict[str, Any]
"""A preset's name, or overrides of the source's spec (of `preset:` when given)."""


class Program(NamedTuple):
    """A jitted function and the arguments it is compiled for: shapes, dtypes and where they lie. `rules`: those under
    which the stage calls it, where it has none of its own; `mesh`: the one it runs on where that is not the stage's.
    """

    function: Any
    arguments: tuple[Any, ...]
    static: Mapping[str, Any] = {}
    rules: Rules | None = None
    mesh: Mesh | None = None

    def lower(self) -> Any:
        """`jax.stages.Lowered`; nothing is allocated, and the devices need not be there."""
        with ExitStack() as stack:
            if self.rules is not None:
                stack.enter_context(self.rules.active())
            if self.mesh is not None:
                stack.enter_context(jax.set_mesh(self.mesh))
            return self.function.lower(*self.arguments, **self.static)


class Stage(Frozen):
    """What every stage has: a source stage, unless it makes its model from nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, populate_by_name=True)

    figures: ClassVar[tuple[Figure, ...]] = ()
    """Held-out figures, those in the manifest's `metrics`, most telling first."""
    curve: ClassVar[Curve | None] = None
    makes_model: ClassVar[bool] = True
    """Whether other stages can start from it."""
    prunes: ClassVar[bool] = False
    """Whether a child of the family begins here."""
    begins_anew: ClassVar[bool] = False
    """Whether it goes on from no other stage, so that it takes no `from`."""
    distils: ClassVar[bool] = False
    """Whether its tokens and its KL are those of the family's recovery from pruning."""
    incidental: ClassVar[frozenset[str]] = frozenset(
        {"checkpoint", "guard", "mesh", "sharding", "teacher_sharding", "teacher_mesh", "optional"}
        | {"workers", "track", "profile", "microbatches", "batch.microbatches", "loss.chunk"}
        | {"answers_at_once", "evaluate.answers_at_once", "generate.answers_at_once"}
        | {"evaluate.tasks.batch", "evaluate.patience"}
    )
    """Settings that say where and how a result is computed, and do not make it another one, beyond rounding."""

    do: str
    source: str | None = Field(default=None, alias="from")
    optional: bool = False
    """Run only when it is named, when another stage needs it, or with `--all`."""
    mesh: MeshConfig = MeshConfig()
    sharding: Rules = Rules()

    def making(self, also: Collection[str] = (), anywhere: bool = False) -> dict[str, Any]:
        """The settings that make the result what it is, as JSON: all but the incidental ones and those of `also`.
        `anywhere`: paths are left empty."""
        left_out: dict[str, Any] = {}
        for name in sorted((*self.incidental, *also), reverse=True):  # the parts of a setting before the whole of it
            *outer, last = name.split(".")
            reduce(lambda tree, part: tree.setdefault(part, {}), outer, left_out)[last] = True
        return self.model_dump(mode="json", by_alias=True, exclude=left_out, context={ANYWHERE: anywhere})

    def inputs(self) -> dict[str, str]:
        """Stages that must be finished first, by their role: the source is the parent."""
        return {} if self.source is None else {"parent": self.source}

    @property
    def is_gone(self) -> bool:
        """Whether the checkpoint that the stage reads from outside of the run is not there (any more)."""
        return False

    def fetch(self) -> None:
        """Bring here the checkpoint that the stage reads from outside of the run, where that can be done."""

    def stored_dtype(self, stages: Mapping[str, Stage]) -> str:
        """Of the parameters that it writes, in a recipe of these stages."""
        return "float32"

    def contents(self, root: Path) -> dict[str, str | None]:
        """By setting, the digest of everything outside of the run that makes the result what it is: wherever it lies,
        whatever it is called. None where it cannot be read. `root`: where packed data lies."""
        return {}

    def companions(self, name: str, stages: Mapping[str, Stage], sizes: Callable[[], ModelSpec]) -> Mapping[str, Stage]:
        """Stages that this one, called `name`, brings into the recipe, such as a baseline. `sizes` resolves its own."""
        return {}

    def resolve(self, graph: Graph, where: str) -> ModelSpec:
        """Sizes of the result, and everything in which the stage does not fit its inputs. Reads no data. Raises
        `UserError`: naming `where`, the stage's place in the recipe."""
        spec = resolve_model(getattr(self, "model", None), graph.specs.get(self.source or ""), where)
        self.check_sizes(spec, graph, where)
        return spec

    def check_sizes(self, spec: ModelSpec, graph: Graph, where: str) -> None:
        """Raise `UserError` where sizes differ that only a prune stage may change."""
        source = graph.specs.get(self.source or "", spec)
        for key in _SHAPE_KEYS:
            if getattr(spec, key) != getattr(source, key):
                raise UserError(
                    f"{where}.model.{key} = {getattr(spec, key)} differs from the {getattr(source, key)} of its source "
                    f"{self.source!r}; only a prune stage changes sizes"
                )

    def meshes(self, devices: list[Any], where: str) -> tuple[Mesh, Mesh | None]:
        """The stage's mesh on a job's devices, and that of its teacher where this has one of its own. Raises
        `UserError`: naming `where`, the sizes do not fit the devices."""
        return make_mesh(self.mesh, devices, f"{where}.mesh"), None

    def check_mesh(self, job: Job[Any]) -> None:
        """Raise `UserError` when the stage's batches do not fit its mesh."""

    def prepare(self, job: Job[Any], packing: Packing) -> None:
        """Pack what the stage reads and find every fault of it; before any stage of the run is begun."""

    def programs(self, job: Job[Any]) -> dict[str, Program]:
        """Everything that is compiled to run the stage, by name. No file is read; the devices of the mesh may be
        described ones."""
        return {}

    def run(self, job: Job[Any]) -> Result:
        """Carry the stage out, going on from what an earlier attempt left."""
        raise NotImplementedError(f"verb {self.do!r} does not say how it is run")


_SHAPE_KEYS = ("layers", "width", "mlp_width", "heads", "kv_heads", "head_width", "vocab", "tied", "vision")


@dataclass(frozen=True)
class Graph:
    """The stages of a recipe, and the sizes of those that were resolved."""

    stages: Mapping[str, Stage]
    specs: Mapping[str, ModelSpec]


@dataclass(frozen=True)
class TokenIds:
    """Ids that stand in compiled programs as constants; the family's own where no tokenizer was read."""

    eos: int = 2
    control: tuple[int, ...] = (*range(20), 32, 33, 34, 35)
    """Of the special tokens that have a meaning."""
    choices: tuple[int, int] = (0, 1)
    """Of the letters A and B, with which a judge answers; without a tokenizer any two will do."""
    vocab: int | None = None
    """Ids that the tokenizer has; none from there on is drawn."""

    @staticmethod
    def of(tokenizer: Tokenizer) -> TokenIds:
        a, b = (tokenizer.encode(letter)[0] for letter in "AB")
        return TokenIds(tokenizer.eos, tokenizer.control_ids, (a, b), tokenizer.vocab)


S = TypeVar("S", bound=Stage, covariant=True)


@dataclass(frozen=True)
class Job(Generic[S]):
    """One stage of one run: its settings, the sizes of its result, and where everything lies."""

    name: str
    stage: S
    spec: ModelSpec
    graph: Graph
    run_dir: Path
    mesh: Mesh
    teacher_mesh: Mesh | None = None
    tokens: TokenIds = TokenIds()

    @property
    def where(self) -> str:
        """The stage's place in the recipe, for errors."""
        return f"stages.{self.name}"

    @property
    def directory(self) -> Path:
        return self.run_dir / self.name

    @property
    def data_root(self) -> Path:
        """Packed data, shared by the stages of the run that read the same."""
        return self.run_dir / "data"

    @property
    def source(self) -> Path:
        """The directory of the stage that this one starts from."""
        assert self.stage.source is not None, "it starts from nothing"
        return self.run_dir / self.stage.source

    @cached_property
    def placement(self) -> Placement:
        return Placement(self.mesh, self.stage.sharding)

    @cached_property
    def teacher_placement(self) -> Placement:
        """What the student's mesh has of a teacher, by the teacher's own rules where it has some."""
        return Placement(self.mesh, getattr(self.stage, "teacher_sharding", None) or self.stage.sharding)

    @cached_property
    def teacher_apart(self) -> Placement | None:
        """Where a teacher lies that has a mesh of its own."""
        return None if self.teacher_mesh is None else replace(self.teacher_placement, mesh=self.teacher_mesh)

    def with_tokens(self, tokenizer: Tokenizer) -> Job[S]:
        """The job of a run, whose programs are made for the ids of its tokenizer."""
        return replace(self, tokens=TokenIds.of(tokenizer))

    def save(self, params: Params) -> dict[str, Any]:
        """Write the stage's parameters; returns the checksums for its manifest."""
        saving()
        return save_params(self.directory / "params", params)


@dataclass(frozen=True)
class Result:
    """What goes into the manifest beside the settings."""

    metrics: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    steps: int = 0
    seconds: float | None = None
    """Time over all attempts, where the stage knows it."""
    files: dict[str, Any] = field(default_factory=dict)
    """Checksums of the parameters' files."""
    details: dict[str, Any] = field(default_factory=dict)
    spec: ModelSpec | None = None
    """Where it is not the one the job named: exact surgery scales the norms' epsilon."""


def resolve_model(ref: ModelRef | None, source: ModelSpec | None, where: str) -> ModelSpec:
    """The sizes a stage works on: a preset, or the source's sizes with overrides. Raises `UserError`: unknown preset
    or key, inconsistent sizes, overrides without anything to override."""
    if ref is None:
        if source is None:
            raise UserError(f"{where}.model is required when the stage has no `from`")
        return source
    if isinstance(ref, str):
        return _preset(ref, where)
    changes = dict(ref)
    preset = changes.pop("preset", None)
    base = _preset(preset, where) if preset is not None else source
    raw = merge(base.model_dump(mode="json"), changes) if base is not None else changes
    try:
        return ModelSpec.model_validate(raw)
    except ValidationError as error:
        problems = (explain(problem, ModelSpec, f"{where}.model.") for problem in error.errors())
        raise UserError("; ".join(problems)) from None


def _preset(name: str, where: str) -> ModelSpec:
    if name not in PRESETS:
        raise UserError(f"{where}.model: no preset {name!r}{suggest(name, PRESETS)}")
    return PRESETS[name]


def fresh_params(spec: ModelSpec, seed: int, placement: Placement | None = None) -> Params:
    """Random parameters of a size, made where they are to lie; the values do not depend on that."""
    # On CPU, optimising the generator's code takes longer than running it.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    shardings = None if placement is None else param_shardings(spec, placement)
    make = jax.jit(init_params, static_argnums=0, compiler_options=options, out_shardings=shardings)
    return make(spec, jax.random.key(seed))


def load_stage(
    directory: Path, dtype: Any = jnp.float32, placement: Placement | None = None
) -> tuple[ModelSpec, Params]:
    """Sizes and parameters of a finished stage, on one device unless placed.

    Raises:
        UserError: the stage is not finished, its checkpoint does not have the sizes its manifest names, or a file of it
            is not as it was written.
    """
    refuse_export(directory)
    manifest = finished(directory)
    spec = manifest.spec
    abstract = abstract_params(spec, dtype) if placement is None else placed_params(spec, placement, dtype)
    return spec, load_params(directory / "params", abstract, manifest.files or None)


def stage_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a finished stage's data, None where it read none: the copy that its run keeps, or when that is
    gone the file that its settings name."""
    manifest = finished(directory)
    if manifest.data is None:
        return None
    name = f"tokenizer-*-{manifest.data.tokenizer_digest[:16]}/tekken.json"
    for root in (directory.parent / "data", directory.resolve().parent / "data"):
        if (kept := next(root.glob(name), None)) is not None:
            return read_tokenizer(kept)
    config = TokenizerConfig.model_validate(manifest.config["data"]["tokenizer"])
    return load_tokenizer(config, directory.parent / "data")
