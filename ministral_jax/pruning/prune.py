"""Prune a model to a smaller spec: layers, then width, then feed-forward, then ties (Ministral 3, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ministral_jax.distributed.collectives import agreed
from ministral_jax.distributed.placement import Placement
from ministral_jax.errors import UserError
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute, check_params, init_params, param_shardings
from ministral_jax.pruning.score import Basis, PruneOptions, layer_scores, mlp_scores, top, width_basis
from ministral_jax.pruning.statistics import DOMAINS, Statistics, collect
from ministral_jax.pruning.transforms import (
    Params,
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

__all__ = ["PruneOptions", "check_target", "prune"]

_SHRINK = ("layers", "width", "mlp_width")
_SAME = ("heads", "kv_heads", "head_width", "vocab", "image_token", "vision")
_COMPUTE = Compute()
Cut = tuple[Params, ModelSpec, dict[str, Any]]
Operate = Callable[..., Params]
"""(surgery, spec of its result, arguments) -> parameters; see `_operate`."""


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


def prune(
    params: Params,
    spec: ModelSpec,
    target: ModelSpec,
    batches: Callable[[], Iterable[Mapping[str, Any]]],
    options: PruneOptions,
    key: jax.Array,
    progress: Callable[[str], None] | None = None,
    *,
    compute: Compute = _COMPUTE,
    measure: Callable[[Params, ModelSpec], float] | None = None,
    placement: Placement | None = None,
) -> tuple[Params, ModelSpec, dict[str, Any]]:
    """Parameters of `target`'s sizes cut from `params`, their spec, and a JSON-able report of what was kept and why.

    Args:
        params: parameters of `spec`; left as they are.
        target: sizes, context and RoPE to arrive at. A dimension that is already there is skipped.
        batches: starts a pass over the calibration batches; called once, or before every step with `options.recollect`.
        key: draws random scores and a fresh projector.
        progress: called with a line of text now and then.
        compute: how the model is evaluated during calibration.
        measure: called with parameters and spec after every step, for instance for the KL from the source; its values
            stand in the report under `kl`.
        placement: where the parameters lie; every step makes its result there.

    Returns:
        The spec is `target`, with the epsilon of its norms scaled when `options.norm_eps` is "exact". The report holds
        `tokens` (calibration tokens of the first pass by kind), `steps` in order and `kl`.

    Raises:
        UserError: `target` cannot be cut from `spec`, `params` are not of `spec`, or calibration is of no use.
    """
    check_target(spec, target, "prune target")
    check_params(params, spec, "prune source")
    say = progress or (lambda line: None)
    operate = partial(_operate, placement)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    report: dict[str, Any] = {"tokens": None, "steps": [], "kl": {}}
    statistics: Statistics | None = None

    def done(step: str, details: dict[str, Any]) -> None:
        report["steps"].append({"step": step, **details})
        if measure is not None:
            report["kl"][step] = float(measure(params, spec))
        say(f"{step}: done")

    for step, size, cut in _CUTS:
        if getattr(spec, size) == getattr(target, size):
            continue
        if statistics is None or options.recollect:
            width = target.width < spec.width and (step == "width" or not options.recollect)
            tell = partial(_prefixed, say, step)
            statistics = collect(VLM(spec, compute), params, batches(), width=width, progress=tell)
            report["tokens"] = report["tokens"] or dict(zip(DOMAINS, statistics.tokens.tolist(), strict=True))
            _check_images(statistics, spec, target, options)
        params, spec, details = cut(params, spec, target, statistics, options, rng, operate)
        if step == "layers":
            statistics = statistics.take_layers(np.asarray(details["kept"]))
        done(step, details)

    if target.tied and not spec.tied:
        spec = spec.model_copy(update={"tied": True})
        params = operate(partial(tie_embeddings, seed=options.tie_seed), spec, params)
        done("tie", {"seed": options.tie_seed})
    elif spec.tied and not target.tied:
        spec = spec.model_copy(update={"tied": False})
        params = operate(untie, spec, params)
    if spec.vision is not None and options.projector == "fresh":
        params = operate(partial(_fresh_projector, spec), spec, params, key)
        done("projector", {"drawn": "fresh"})
    eps = spec.norm_eps if options.norm_eps == "exact" else target.norm_eps
    moved, spec = spec.rope != target.rope, target.model_copy(update={"norm_eps": eps})
    if moved:
        done("rope", {"to": target.rope.model_dump(mode="json")})
    check_params(params, spec, "pruned model")
    return params, spec, report


def _operate(placement: Placement | None, surgery: Callable[..., Params], spec: ModelSpec, *args: Any) -> Params:
    """`surgery(*args)`, the parameters of `spec`, computed part by part where they will lie."""
    if placement is None:
        return surgery(*args)
    return jax.jit(surgery, out_shardings=param_shardings(spec, placement))(*args)


def _prefixed(say: Callable[[str], None], step: str, line: str) -> None:
    say(f"{step}: {line}")


def _check_images(statistics: Statistics, spec: ModelSpec, target: ModelSpec, options: PruneOptions) -> None:
    narrows = spec.vision is not None and target.width < spec.width
    if narrows and options.projector == "rotated" and not statistics.tokens[1] > 0:
        raise UserError(
            "calibration saw no image token, so the projector's hidden neurons cannot be scored; calibrate on images "
            "too, or set projector: fresh"
        )


def _cut_layers(
    params: Params,
    spec: ModelSpec,
    target: ModelSpec,
    statistics: Statistics,
    options: PruneOptions,
    rng: np.random.Generator,
    operate: Operate,
) -> Cut:
    scores = layer_scores(statistics, options.layer_score, options.image_weight, rng)
    kept = top(scores, target.layers)
    details = {"score": options.layer_score, "scores": scores.tolist(), "kept": kept.tolist()}
    spec = spec.model_copy(update={"layers": target.layers})
    return operate(partial(drop_layers, keep=kept), spec, params), spec, details


def _cut_width(
    params: Params,
    spec: ModelSpec,
    target: ModelSpec,
    statistics: Statistics,
    options: PruneOptions,
    rng: np.random.Generator,
    operate: Operate,
) -> Cut:
    basis = width_basis(statistics, options.width_basis, options.image_weight, rng)
    energy = float(agreed(basis.retained(target.width)))
    gain = slice_gain(spec.width, target.width, energy if options.norm_gain == "energy" else 1.0)
    narrow: Callable[[Params], Params] = lambda params: params
    details = {"basis": options.width_basis, "retained_energy": energy, "gain": gain, "spectrum": _spectrum(basis)}
    if spec.vision is not None:
        assert statistics.projector is not None
        worth = statistics.projector[1] / max(statistics.tokens[1], 1)
        kept = top(worth, target.width)
        narrow = partial(narrow_projector, keep=kept)
        details["projector"] = _summary(worth, kept)
    eps = spec.norm_eps * gain**2 if options.norm_eps == "exact" else spec.norm_eps
    spec = spec.model_copy(update={"width": target.width, "norm_eps": eps, "tied": False})

    def cut(params: Params, vectors: jax.Array) -> Params:
        return narrow(_project(params, vectors, gain))

    return operate(cut, spec, params, jnp.asarray(agreed(basis.vectors[:, : target.width]))), spec, details


def _cut_mlp(
    params: Params,
    spec: ModelSpec,
    target: ModelSpec,
    statistics: Statistics,
    options: PruneOptions,
    rng: np.random.Generator,
    operate: Operate,
) -> Cut:
    scores = mlp_scores(params, statistics, options.mlp_score, options.image_weight, rng)
    kept = top(scores, target.mlp_width)
    layers = [_summary(*layer) for layer in zip(scores, kept, strict=True)]
    details = {"score": options.mlp_score, "kept": target.mlp_width, "layers": layers}
    spec = spec.model_copy(update={"mlp_width": target.mlp_width})
    return operate(partial(narrow_mlp, keep=kept), spec, params), spec, details


_CUTS = (("layers", "layers", _cut_layers), ("width", "width", _cut_width), ("mlp", "mlp_width", _cut_mlp))
"""Name of each step in order, the size it reaches, and the function that reaches it."""


@jax.jit
def _project(params: Params, basis: jax.Array, gain: float) -> Params:
    """Untie, fold, rotate and slice in one program that works on one layer at a time, so that no second copy of the
    model is alive in between."""
    params = untie(params)

    def cut(layers: Params) -> Params:
        whole = {**params, "decoder": {**params["decoder"], "layers": layers}}
        return slice_width(rotate(fold_norm_gains(whole), basis), basis.shape[1], gain)

    def cut_one(layer: Params) -> Params:
        alone = jax.tree.map(lambda leaf: leaf[None], layer)
        return jax.tree.map(lambda leaf: leaf[0], cut(alone)["decoder"]["layers"])

    layers = params["decoder"]["layers"]
    rest = cut(layers)  # its layers are unused, hence never computed
    return {**rest, "decoder": {**rest["decoder"], "layers": jax.lax.map(cut_one, layers)}}


def _fresh_projector(spec: ModelSpec, params: Params, key: jax.Array) -> Params:
    drawn = jax.jit(lambda key: init_params(spec, key)["projector"])(key)  # only the projector is computed
    return {**params, "projector": jax.tree.map(lambda new, old: new.astype(old.dtype), drawn, params["projector"])}


def _summary(scores: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    """Quantiles of all scores [N] and of the kept ones [N'], and the share of the total score that was kept."""
    levels = (0, 0.25, 0.5, 0.75, 1)
    quantiles = {name: np.quantile(s, levels).tolist() for name, s in (("all", scores), ("kept", scores[kept]))}
    return {**quantiles, "kept_share": float(scores[kept].sum() / max(scores.sum(), np.finfo(float).tiny))}


def _spectrum(basis: Basis, points: int = 256) -> dict[str, list[float]]:
    """Energy along at most `points` of the basis directions, and the share of all energy up to each."""
    index = np.unique(np.linspace(0, len(basis.energy) - 1, points).round().astype(int))
    share = np.cumsum(basis.energy) / basis.energy.sum()
    return {"index": index.tolist(), "energy": basis.energy[index].tolist(), "cumulative": share[index].tolist()}
