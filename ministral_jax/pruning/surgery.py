"""Prune a model to a smaller spec: layers, then width, then feed-forward, then ties (Ministral 3, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ministral_jax.distributed.collectives import agreed
from ministral_jax.distributed.placement import Placement
from ministral_jax.errors import UserError
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute, Params, check_params, init_params, param_shardings, placed_params
from ministral_jax.pruning.report import (
    Kept,
    LayersStep,
    MlpStep,
    ProjectorStep,
    PruneReport,
    RopeStep,
    Spectrum,
    Step,
    TieStep,
    WidthStep,
)
from ministral_jax.pruning.score import Basis, PruneOptions, layer_scores, mlp_scores, top, width_basis
from ministral_jax.pruning.statistics import DOMAINS, Statistics, collect, retained
from ministral_jax.pruning.transforms import (
    Gains,
    drop_layers,
    fold_norm_gains,
    narrow_mlp,
    narrow_projector,
    rotate,
    slice_gain,
    slice_width,
    tie_embeddings,
    untie,
)

__all__ = ["PruneOptions", "Pruned", "Surgery", "check_target"]

_SHRINK = ("layers", "width", "mlp_width")
_SAME = ("heads", "kv_heads", "head_width", "vocab", "image_token", "vision")


def check_target(source: ModelSpec, target: ModelSpec, where: str) -> None:
    """Raise `UserError`, naming `where`, when pruning cannot lead from `source` to `target`."""
    for name in _SHRINK:
        have, want = getattr(source, name), getattr(target, name)
        if want > have:
            raise UserError(f"{where}: {name} = {want} is larger than the source's {have}; pruning only makes smaller")
    for name in _SAME:
        have, want = getattr(source, name), getattr(target, name)
        if want != have:
            raise UserError(f"{where}: {name} = {want} differs from the source's {have}; pruning leaves it as it is")


class Model(NamedTuple):
    """Parameters and their sizes, on the way from source to target."""

    params: Params
    spec: ModelSpec


class Pruned(NamedTuple):
    """What surgery leaves: the target's spec but for the norms' epsilon where `PruneOptions.norm_eps` is exact."""

    params: Params
    spec: ModelSpec
    report: PruneReport


@dataclass(frozen=True)
class Surgery:
    """How a model becomes one of `target`'s sizes, context and RoPE: `Surgery(target, batches).run(params, spec)`."""

    target: ModelSpec
    batches: Callable[[], Iterable[Mapping[str, Any]]]
    """Starts a pass over the calibration batches; called once, or before every cut with `options.recollect`."""
    options: PruneOptions = field(default_factory=PruneOptions)
    seed: int = 0
    """Of random scores and a fresh projector."""
    compute: Compute = field(default_factory=Compute)
    """How the model is evaluated during calibration."""
    placement: Placement | None = None
    """Where the parameters lie; every step makes its result there."""
    measure: Callable[[Params, ModelSpec], float] | None = None
    """Called with parameters and spec after every step, for instance for the KL from the source: `PruneReport.kl`."""
    progress: Callable[[str], None] = lambda line: None
    """Called with a line of progress now and then."""

    def run(self, params: Params, spec: ModelSpec) -> Pruned:
        """Cut `params` of `spec`, which stay as they are; a dimension that has its size already is skipped. What a cut
        has replaced is not held any longer: it is freed where the caller holds it no more either.

        Raises:
            UserError: the target cannot be cut from `spec`, `params` are not of `spec`, or calibration is of no use.
        """
        check_target(spec, self.target, "prune target")
        check_params(params, spec, "prune source")
        model, report, statistics = Model(params, spec), PruneReport(), None
        del params
        rng = np.random.default_rng(np.asarray(jax.random.key_data(jax.random.key(self.seed))).ravel())
        for size, cut in (("layers", self._layers), ("width", self._width), ("mlp_width", self._mlp)):
            if getattr(model.spec, size) == getattr(self.target, size):
                continue
            if statistics is None or self.options.recollect:
                statistics = self._calibrate(model, size)
                tokens = dict(zip(DOMAINS, statistics.tokens.tolist(), strict=True))
                report = report.model_copy(update={"tokens": report.tokens or tokens})
            model, step = cut(model, statistics, rng)
            if isinstance(step, LayersStep):
                statistics = statistics.take_layers(np.array(step.kept))
            report = self._noted(report, step, model)
        for finish in (self._ties, self._projector, self._positions):
            model, step = finish(model)
            if step is not None:
                report = self._noted(report, step, model)
        check_params(model.params, model.spec, "pruned model")
        return Pruned(*model, report)

    def _calibrate(self, model: Model, size: str) -> Statistics:
        """Statistics of the model as it now is, for the cut of `size`, or for all of them when they are taken once."""
        narrows = self.target.width < model.spec.width
        width = narrows and (size == "width" or not self.options.recollect)
        tell = lambda line: self.progress(f"{size.removesuffix('_width')}: {line}")
        token_weighted = self.options.width_weight == "token"
        vlm, more = VLM(model.spec, self.compute), dict(width=width, token_weighted=token_weighted)
        statistics = collect(vlm, model.params, self.batches(), **more, progress=tell)
        scores_projector = narrows and model.spec.vision is not None and self.options.projector == "rotated"
        if scores_projector and not statistics.tokens[1] > 0:
            raise UserError(
                "calibration saw no image token, so the projector's hidden neurons cannot be scored; calibrate on "
                "images too, or set projector: fresh"
            )
        return statistics

    def _noted(self, report: PruneReport, step: Step, model: Model) -> PruneReport:
        kl = {} if self.measure is None else {step.step: float(self.measure(*model))}
        self.progress(f"{step.step}: done")
        return report.model_copy(update={"steps": (*report.steps, step), "kl": report.kl | kl})

    def _apply(self, transform: Callable[..., Params], spec: ModelSpec, *arguments: Any) -> Model:
        """`transform` of parameters, whose leaves that it leaves as they are the result shares."""
        if self.placement is None:
            return Model(transform(*arguments), spec)
        made = self._compiled(transform, spec, *arguments)(*arguments)
        kept = lambda path, new, where: jax.device_put(_at(arguments[0], path), where) if new is None else new
        shardings = param_shardings(spec, self.placement)
        return Model(jax.tree_util.tree_map_with_path(kept, made, shardings, is_leaf=_is_none), spec)

    def _compiled(self, transform: Callable[..., Params], spec: ModelSpec, *arguments: Any) -> Any:
        """`transform`, which makes parameters of `spec`, computed part by part where they will lie: those that it
        changes, and None for the others."""
        assert self.placement is not None, "there is nowhere to lie"

        def changed(params: Params, *more: Any) -> Params:
            given = {id(leaf) for leaf in jax.tree.leaves(params)}
            return jax.tree.map(lambda new: None if id(new) in given else new, transform(params, *more))

        made, shardings = jax.eval_shape(changed, *arguments), param_shardings(spec, self.placement)
        lie = jax.tree.map(lambda new, where: where if new is not None else None, made, shardings, is_leaf=_is_none)
        return jax.jit(changed, out_shardings=lie)

    def programs(self, spec: ModelSpec, dtype: DTypeLike) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """The cuts that lead from a model of `spec`, its parameters of `dtype`, to the target, each compiled function
        with abstract arguments.

        Which layers and neurons are kept stands in a program as constants; here the first ones are.
        """
        placement = self.placement
        assert placement is not None, "programs lie on a mesh"
        found: dict[str, tuple[Any, tuple[Any, ...]]] = {}

        def then(name: str, transform: Callable[..., Params], change: dict[str, Any], *more: Any) -> None:
            nonlocal spec
            before, spec = placed_params(spec, placement, dtype), spec.model_copy(update=change)
            found[f"cut/{name}"] = (self._compiled(transform, spec, before, *more), (before, *more))

        target, first = self.target, np.arange
        if target.layers < spec.layers:
            then("layers", partial(drop_layers, keep=first(target.layers)), {"layers": target.layers})
        if target.width < spec.width:
            kept = None if spec.vision is None else first(target.width)
            basis = jax.ShapeDtypeStruct((spec.width, target.width), jnp.float32)
            gains = jax.eval_shape(partial(Gains.same, 1.0, spec.layers))
            then("width", partial(_narrowed, kept=kept), {"width": target.width, "tied": False}, basis, gains)
        if target.mlp_width < spec.mlp_width:
            keep = np.tile(first(target.mlp_width), (spec.layers, 1))
            then("mlp", partial(narrow_mlp, keep=keep), {"mlp_width": target.mlp_width})
        if target.tied != spec.tied:
            tie = partial(tie_embeddings, seed=self.options.tie_seed) if target.tied else untie
            then("tie", tie, {"tied": target.tied})
        return found

    # ---- Algorithm 2 ----

    def _layers(self, model: Model, statistics: Statistics, rng: np.random.Generator) -> tuple[Model, LayersStep]:
        """Keep the layers of highest score, in their order."""
        scores = layer_scores(statistics, self.options, rng)
        kept = top(scores, self.target.layers)
        spec = model.spec.model_copy(update={"layers": self.target.layers})
        step = LayersStep(score=self.options.layer_score, scores=scores.tolist(), kept=kept.tolist())
        return self._apply(partial(drop_layers, keep=kept), spec, model.params), step

    def _width(self, model: Model, statistics: Statistics, rng: np.random.Generator) -> tuple[Model, WidthStep]:
        """Rotate the residual stream into one basis for the whole network, keep its first directions."""
        options, width = self.options, self.target.width
        basis = width_basis(statistics, options, rng)
        energy = float(agreed(basis.retained(width)))
        vectors = jnp.asarray(agreed(basis.vectors[:, :width]))
        gain, gains = self._gains(model, vectors, energy)
        step = WidthStep(basis=options.width_basis, retained_energy=energy, gain=gain, spectrum=_spectrum(basis))
        kept = None
        if model.spec.vision is not None:
            assert statistics.projector is not None
            scores = statistics.projector[1] / max(statistics.tokens[1], 1)
            kept = top(scores, width)
            step = step.model_copy(update={"projector": _kept(scores, kept)})
        eps = model.spec.norm_eps * (gain**2 if options.norm_eps == "exact" else 1)
        spec = model.spec.model_copy(update={"width": width, "norm_eps": eps, "tied": False})
        return self._apply(partial(_narrowed, kept=kept), spec, model.params, vectors, gains), step

    def _gains(self, model: Model, basis: Array, energy: float) -> tuple[float, Gains]:
        """Of the norms once the stream is cut to `basis`, which retains `energy`; and their mean."""
        spec, options = model.spec, self.options
        gain = partial(slice_gain, spec.width, basis.shape[1])
        if options.norm_gain != "per_norm":
            same = gain(energy if options.norm_gain == "energy" else 1.0)
            return same, Gains.same(same, spec.layers)
        vlm = VLM(spec, self.compute)
        left = retained(vlm, model.params, self.batches(), np.asarray(basis), options.image_weight)
        found = [
            np.sqrt(agreed(x) * spec.width / basis.shape[1]) for x in (left.attention, left.mlp, np.float64(left.final))
        ]
        mean = (found[0].sum() + found[1].sum() + found[2]) / (2 * spec.layers + 1)
        return float(mean), Gains(*map(jnp.asarray, found))

    def _mlp(self, model: Model, statistics: Statistics, rng: np.random.Generator) -> tuple[Model, MlpStep]:
        """Keep the feed-forward neurons of highest score, in each layer its own."""
        scores = mlp_scores(model.params, statistics, self.options, rng)
        kept = top(scores, self.target.mlp_width)
        layers = [_kept(*layer) for layer in zip(scores, kept, strict=True)]
        spec = model.spec.model_copy(update={"mlp_width": self.target.mlp_width})
        step = MlpStep(score=self.options.mlp_score, kept=self.target.mlp_width, layers=tuple(layers))
        return self._apply(partial(narrow_mlp, keep=kept), spec, model.params), step

    # ---- what else the target has otherwise ----

    def _ties(self, model: Model) -> tuple[Model, TieStep | None]:
        spec = model.spec.model_copy(update={"tied": self.target.tied})
        if spec.tied and not model.spec.tied:
            seed = self.options.tie_seed
            return self._apply(partial(tie_embeddings, seed=seed), spec, model.params), TieStep(seed=seed)
        if model.spec.tied and not spec.tied:
            return self._apply(untie, spec, model.params), None
        return model, None

    def _projector(self, model: Model) -> tuple[Model, ProjectorStep | None]:
        if model.spec.vision is None or self.options.projector != "fresh":
            return model, None
        draw, key = partial(_fresh_projector, model.spec), jax.random.key(self.seed)
        return self._apply(draw, model.spec, model.params, key), ProjectorStep()

    def _positions(self, model: Model) -> tuple[Model, RopeStep | None]:
        """Context and RoPE have no parameters."""
        eps = (model.spec if self.options.norm_eps == "exact" else self.target).norm_eps
        moved = Model(model.params, self.target.model_copy(update={"norm_eps": eps}))
        same = model.spec.rope == self.target.rope
        return moved, None if same else RopeStep(to=self.target.rope.model_dump(mode="json"))


def _narrowed(params: Params, basis: jax.Array, gains: Gains, kept: np.ndarray | None) -> Params:
    """`_project`, and of the projector's hidden neurons those that are `kept`."""
    narrow = _project(params, basis, gains)
    return narrow if kept is None else narrow_projector(narrow, kept)


@jax.jit
def _project(params: Params, basis: Float[Array, "D D'"], gains: Gains) -> Params:
    """Untie, fold, rotate and slice in one program that works on one layer at a time, so that no second copy of the
    model is alive in between."""
    params = untie(params)

    def cut(layers: Params, gains: Gains) -> Params:
        whole = {**params, "decoder": {**params["decoder"], "layers": layers}}
        return slice_width(rotate(fold_norm_gains(whole), basis), basis.shape[1], gains)

    def cut_one(layer: tuple[Params, Array, Array]) -> Params:
        alone, attention, mlp = jax.tree.map(lambda leaf: leaf[None], layer)
        one = cut(alone, Gains(attention, mlp, gains.final))
        return jax.tree.map(lambda leaf: leaf[0], one["decoder"]["layers"])

    layers = params["decoder"]["layers"]
    rest = cut(layers, gains)  # its layers are unused, hence never computed
    cut_layers = jax.lax.map(cut_one, (layers, gains.attention, gains.mlp))
    return {**rest, "decoder": {**rest["decoder"], "layers": cut_layers}}


def _is_none(x: Any) -> bool:
    return x is None


def _at(params: Params, path: tuple[Any, ...]) -> Any:
    return reduce(lambda node, key: node[key.key], path, params)


def _fresh_projector(spec: ModelSpec, params: Params, key: Array) -> Params:
    drawn = jax.jit(lambda key: init_params(spec, key)["projector"])(key)  # only the projector is computed
    return {**params, "projector": jax.tree.map(lambda new, old: new.astype(old.dtype), drawn, params["projector"])}


def _kept(scores: Float[np.ndarray, " N"], kept: Int[np.ndarray, " N'"]) -> Kept:
    """Of scores and the indices of the kept ones."""
    every, ours = (np.quantile(s, (0, 0.25, 0.5, 0.75, 1)).tolist() for s in (scores, scores[kept]))
    share = scores[kept].sum() / max(scores.sum(), np.finfo(float).tiny)
    return Kept(all=every, kept=ours, kept_share=float(share))


def _spectrum(basis: Basis, points: int = 256) -> Spectrum:
    """Of at most `points` of the basis directions."""
    index = np.unique(np.linspace(0, len(basis.energy) - 1, points).round().astype(int))
    share = np.cumsum(basis.energy) / basis.energy.sum()
    return Spectrum(index=index.tolist(), energy=basis.energy[index].tolist(), cumulative=share[index].tolist())
