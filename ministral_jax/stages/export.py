"""Write a finished stage for other programs, `<stage>/<format>`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Literal, Self

import jax.numpy as jnp
from pydantic import Field, model_validator

from ministral_jax.data.tokenizer import export_template, export_tokenizer
from ministral_jax.distributed.placement import Placement
from ministral_jax.errors import UserError
from ministral_jax.interop.checkpoint import is_checkpoint
from ministral_jax.interop.export import Export as Model
from ministral_jax.interop.export import check_dtype, check_free, export
from ministral_jax.interop.formats import FORMATS, FormatName
from ministral_jax.models.spec import ModelSpec
from ministral_jax.stages.base import Graph, Job, Result, Stage, load_stage, stage_tokenizer
from ministral_jax.stages.calibration import activation_scales, calibration_batches, reads_rows
from ministral_jax.stages.card import NAME, CardConfig, write_card
from ministral_jax.stages.manifest import finished, refuse_export
from ministral_jax.stages.rows import RowStage, ancestors

NumberFormat = Literal["float32", "bfloat16", "float16", "q8_0", "q4_0"]


class Export(Stage):
    """Write `from` for other programs, tokenizer included."""

    makes_model: ClassVar = False

    do: Literal["export"]
    source: str = Field(alias="from")
    format: FormatName = "hf"
    """The files and their names: of transformers (`hf`; `fp8` with the decoder's linear layers in FP8), of Mistral
    (`native`) or of llama.cpp (`gguf`). They lie in `<stage>/<format>`."""
    dtype: NumberFormat = "float32"
    """Of the weights, in `fp8` of those that are not rounded; the last three in `gguf`. `q8_0` and `q4_0` are whole
    numbers of 8 and 4 bits, scaled by 32."""

    card: CardConfig = CardConfig()

    @model_validator(mode="after")
    def _format_has_dtype(self) -> Self:
        if self.dtype not in (known := FORMATS[self.format].dtypes):
            raise ValueError(f"format {self.format} has no dtype {self.dtype}; it has {', '.join(known)}")
        return self

    def check_sizes(self, spec: ModelSpec, graph: Graph, where: str) -> None:
        super().check_sizes(spec, graph, where)
        try:
            FORMATS[self.format].check(spec)
        except UserError as problem:
            raise UserError(f"{where}: {problem}") from None
        if self.format == "fp8" and self.calibrated_on(graph) is None:
            raise UserError(
                f"{where}.format = fp8 needs rows to find scales on, and neither {self.source!r} nor a stage that it "
                "comes from reads any"
            )

    def calibrated_on(self, graph: Graph) -> RowStage | None:
        """Whose rows give the scales of an FP8 export."""
        before = ancestors(self, graph.stages)
        return next((one for one in before if isinstance(one, RowStage) and reads_rows(type(one))), None)

    def run(self, job: Job[Export]) -> Result:
        export_stage(job.source, job.directory / self.format, self.dtype, job.placement, self.format, self.card)
        return Result()


CALIBRATION = 16
"""Batches on which the scales of an FP8 export are found."""


def export_stage(
    stage_directory: Path,
    destination: Path,
    dtype: str,
    placement: Placement,
    layout: FormatName = "hf",
    card: CardConfig | None = None,
) -> None:
    """Export a finished stage in the layout of that name in `FORMATS`, with the tokenizer its data was made with and a
    model card. All processes call it, the first writes.

    Raises:
        UserError: no finished stage, or what `interop.export.export` and, in `fp8`, `calibration_batches` refuse; but
            for numbers that the format does not hold, before the model is loaded.
    """
    check_dtype(dtype, FORMATS[layout])
    if is_checkpoint(stage_directory) and not (stage_directory / "manifest.json").is_file():
        raise UserError(f"{stage_directory} is a model and no finished stage; an import stage of a recipe makes it one")
    refuse_export(stage_directory)
    spec = finished(stage_directory).spec
    FORMATS[layout].check(spec)
    check_free(destination)
    batches = calibration_batches(stage_directory, spec, placement, CALIBRATION) if layout == "fp8" else None
    spec, params = load_stage(stage_directory, jnp.dtype(loaded_dtype(dtype)), placement)
    scales = None if batches is None else activation_scales(spec, params, placement, batches)
    tokenizer = stage_tokenizer(stage_directory)
    with TemporaryDirectory() as scratch:
        files = [write_card(stage_directory, Path(scratch, NAME), layout, dtype, card or CardConfig())]
        if tokenizer is not None:
            tekken = export_tokenizer(tokenizer, Path(scratch), spec.vision)
            files += [tekken, *export_template(tekken, Path(scratch))]
        export(Model(params, spec, dtype, files, scales), FORMATS[layout], destination)


def loaded_dtype(dtype: str) -> str:
    """In what parameters are loaded that are written in `dtype`: those that become whole numbers, without loss."""
    return dtype if dtype in ("float32", "bfloat16") else "float32"
