"""Read a model's directory into the cascade, so that other stages can start from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from ministral_jax.interop import hub
from ministral_jax.interop.checkpoint import checkpoint_digest, import_checkpoint, is_checkpoint, read_spec
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import param_shardings
from ministral_jax.places import fetched, place
from ministral_jax.settings import Place
from ministral_jax.stages.base import Graph, Job, Result, Stage
from ministral_jax.stages.evaluate import Evaluate, evaluation_name
from ministral_jax.stages.rows import EvaluateConfig, RowStage


class Import(Stage):
    """Read a model's directory into the cascade: a Hugging Face one, or one in Mistral's own format."""

    begins_anew: ClassVar = True

    do: Literal["import"]
    path: Annotated[Place, BeforeValidator(hub.named)]
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def directory(self) -> Path:
        """That of a model on the hub is downloaded."""
        name = hub.hub_name(self.path)
        return place(self.path, "path =", hub.PLACES) if name is None else hub.downloaded(name)

    @property
    def is_gone(self) -> bool:
        if (name := hub.hub_name(self.path)) is not None:
            return hub.cached(name) is None
        return not is_checkpoint(self.directory)

    def fetch(self) -> None:
        if (name := hub.hub_name(self.path)) is not None and not self.optional:
            hub.downloaded(name)

    def stored_dtype(self, stages: Mapping[str, Stage]) -> str:
        return self.dtype

    def contents(self, root: Path) -> dict[str, str | None]:
        return {"path": None if self.is_gone else checkpoint_digest(fetched(self.directory), root)}

    def companions(self, name: str, stages: Mapping[str, Stage], sizes: Callable[[], ModelSpec]) -> Mapping[str, Stage]:
        """Its evaluation, on the longest rows within its context that the stages that are made from it or taught by it
        read, so that a table of the family has a first row."""
        readers = [s for s in stages.values() if isinstance(s, RowStage) and name in s.inputs().values()]
        if not readers or evaluation_name(name) in stages:
            return {}
        context = sizes().context
        if not (readers := [reader for reader in readers if reader.batch.length <= context]):
            return {}
        reader = max(readers, key=lambda stage: stage.batch.length)
        shared = {key: getattr(reader, key) for key in ("seed", "data", "batch", "compute", "mesh", "sharding")}
        evaluate = getattr(reader, "evaluate", EvaluateConfig())
        made = Evaluate.model_validate(
            {"do": "evaluate", "from": name, "optional": self.optional, "evaluate": evaluate, **shared}
        )
        return {evaluation_name(name): made}

    def resolve(self, graph: Graph, where: str) -> ModelSpec:
        """Read from its `config.json` or `params.json`."""
        return read_spec(self.directory)

    def run(self, job: Job[Import]) -> Result:
        _, params = import_checkpoint(fetched(self.directory), self.dtype, param_shardings(job.spec, job.placement))
        return Result(files=job.save(params))
