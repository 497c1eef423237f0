"""Files of weights: whether all are there, and hold the tensors that the configuration promises."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from ministral_jax.doctor.source import Finding, Source, section, some
from ministral_jax.errors import UserError
from ministral_jax.interop.checkpoint import checked_checkpoint
from ministral_jax.interop.fp8_weights import block_size
from ministral_jax.interop.hf import TABLE, is_buffer, short_name, slots
from ministral_jax.interop.native import NATIVE_TABLE
from ministral_jax.interop.safetensors import Tensor
from ministral_jax.models.spec import ModelSpec

INDEX = "model.safetensors.index.json"
_SCALE = re.compile(r"\.(weight_scale_inv|weight_scale|activation_scale|input_scale|[kv]_scale|qscale_(weight|act))$")


def held(source: Source) -> dict[str, Tensor]:
    """Tensors of a Hugging Face directory by their short names; of the files that its index names, where it has one."""
    named = set(_weight_map(source).values()) or set(source.weights)
    parts = (tensors for file, tensors in source.tensors.items() if file in named)
    return {short_name(name): tensor for tensors in parts for name, tensor in tensors.items()}


def whole(source: Source) -> bool:
    """Whether every file of weights that is there, or that an index names, can be read: else what is not found may
    stand in one that cannot."""
    wanted = {*source.weights, *_weight_map(source).values()}
    return wanted <= source.tensors.keys() and set(source.native_weights) <= source.native_tensors.keys()


def native_held(source: Source) -> dict[str, Tensor]:
    """Tensors of a directory in Mistral's own format."""
    return {name: tensor for tensors in source.native_tensors.values() for name, tensor in tensors.items()}


def _weight_map(source: Source) -> dict[str, str]:
    """Names of tensors and of the files that an index says hold them."""
    named = section(source.json(INDEX), "weight_map")
    return {name: file for name, file in named.items() if isinstance(file, str)}


def files(source: Source) -> Iterator[Finding]:
    """Format, size, and files that are missing or of no use."""
    yield from _format(source)
    unfinished = [path.name for path in source.directory.rglob("*") if path.suffix in (".incomplete", ".partial")]
    if unfinished:
        yield Finding("red", "files", f"a download was cut off: {some(unfinished)}; fetch it again")
    lost = [path.name for path in source.directory.iterdir() if path.is_symlink() and not path.exists()]
    if lost:
        yield Finding("red", "files", f"{some(lost)}: a link to what is not there; fetch it again")
    yield from _index(source)
    there = {*source.weights, *source.native_weights}
    numbered = [re.fullmatch(r"(.*-)(\d+)-of-(\d+)\.safetensors", name) for name in there]
    for start, count, width in {(m[1], int(m[3]), len(m[2])) for m in numbered if m and not source.has(INDEX)}:
        names = {f"{start}{n:0{width}}-of-{count:0{width}}.safetensors" for n in range(1, count + 1)}
        if missing := names - there:
            yield Finding("red", "files", f"shards are missing: {some(missing)}")


def importable(source: Source) -> Iterator[Finding]:
    """What an import refuses, whatever else is said."""
    try:
        checked_checkpoint(source.directory)
    except UserError as error:
        yield Finding("red", "import", str(error))


def _format(source: Source) -> Iterator[Finding]:
    ours, theirs = bool(source.weights), bool(source.native_weights)
    tensors = [t for read in (source.tensors, source.native_tensors) for found in read.values() for t in found.values()]
    size = sum((source.directory / name).stat().st_size for name in (*source.weights, *source.native_weights))
    kinds = Counter(tensor.dtype.name for tensor in tensors)
    count = len(source.weights) + len(source.native_weights)
    said = f"{count} file{'s' * (count > 1)} of weights, {size / 1e9:,.3f} GB"
    said += "".join(f", {count} tensors in {kind}" for kind, count in kinds.most_common())
    if source.has("adapter_config.json"):
        yield Finding("red", "format", "an adapter (LoRA), which is no model; merge it into the one it was made for")
    elif ours and theirs:
        yield Finding("green", "format", f"Hugging Face and Mistral's own: {said}")
        both = "both formats lie in one directory: a glob of *.safetensors loads the model twice (vLLM#40765); the "
        yield Finding("amber", "format", both + "importer reads the Hugging Face files")
    elif ours or theirs:
        yield Finding("green", "format", f"{'Hugging Face' if ours else 'Mistral'}: {said}")
    elif pickled := [path.name for kind in ("*.bin", "*.pth", "*.pt") for path in source.directory.glob(kind)]:
        yield Finding("red", "format", f"{some(pickled)}: pickled weights, which are not read; convert to safetensors")
    elif source.has("manifest.json"):
        said = f"{source.directory} is a stage; `ministral-jax export` makes of a finished one what is examined here"
        yield Finding("red", "format", said)
    elif any(source.directory.glob("*.gguf")):
        yield Finding("red", "format", "GGUF files, which are not examined; `ministral-jax certify` compares them")
    else:
        yield Finding("red", "format", f"{source.directory} has no weights (*.safetensors)")
    if ours and not source.has("config.json"):
        yield Finding("red", "format", "config.json is missing")
    if theirs and not source.has("params.json"):
        yield Finding("red" if not ours else "amber", "format", "consolidated weights without their params.json")


def _index(source: Source) -> Iterator[Finding]:
    if not source.has(INDEX):
        return
    named = _weight_map(source)
    wanted = set(named.values())
    if missing := wanted - set(source.weights):
        yield Finding("red", "files", f"shards are missing: {INDEX} names {some(missing)}")
    extra = set(source.weights) - wanted
    if "model.safetensors" in extra:
        said = f"two sets of weights, model.safetensors and those of {INDEX}: which is loaded depends on the loader"
        yield Finding("red", "files", f"{said}; delete one")
    elif extra:
        yield Finding("amber", "files", f"{some(extra)}: weights that {INDEX} does not name, of another save")
    astray = {name for name, file in named.items() if name not in source.tensors.get(file, {name})}
    if astray:
        yield Finding("red", "tensors", f"{some(astray)}: not in the file that {INDEX} names for it")


def tensors(source: Source, spec: ModelSpec) -> Iterator[Finding]:
    """Every name and shape, against the sizes of the configuration."""
    hf = bool(source.weights)
    wanted = {slot.name: slot.shape for slot in slots(spec, TABLE if hf else NATIVE_TABLE)}
    found = held(source) if hf else native_held(source)
    extra = {name for name in found.keys() - wanted.keys() if not (_SCALE.search(name) or is_buffer(name))}
    missing = wanted.keys() - found.keys() - {"lm_head.weight"}  # of which `tying` speaks
    wrong = {n for n in wanted.keys() & found.keys() if found[n].shape != wanted[n]}
    if missing:
        yield Finding("red", "tensors", f"missing: {some(missing)}")
    if extra:
        yield Finding("red", "tensors", f"not part of this model: {some(extra)}")
    for name in sorted(wrong)[:3]:
        more = f" ({len(wrong)} tensors in all)" if len(wrong) > 1 else ""
        said = f"{name} has shape {list(found[name].shape)}, the configuration says {list(wanted[name])}{more}"
        yield Finding("red", "tensors", said)
    if not (missing or extra or wrong):
        yield Finding("green", "tensors", f"{len(wanted)} tensors, all of the names and shapes that it should have")


def scales(source: Source) -> Iterator[Finding]:
    """FP8: a scale for every weight, and what the configuration says of it."""
    found, said = held(source), section(source.config, "quantization_config")
    eight = {name for name, tensor in found.items() if tensor.dtype.name.startswith("float8")}
    if said:
        try:
            block_size(said, "config.json")
        except UserError as error:
            yield Finding("red", "FP8", str(error))
            return
    if not eight:
        if said:
            yield Finding("red", "FP8", "quantization_config says fp8, but no tensor is in FP8")
        return
    if not said:
        yield Finding("red", "FP8", f"{len(eight)} tensors are in FP8, but config.json has no quantization_config")
    bare = {n for n in eight if not {n + "_scale_inv", n + "_scale"} & found.keys()}
    if bare:
        yield Finding("red", "FP8", f"no weight_scale_inv beside {some(bare)}: the weights cannot be told")
    scheme = said.get("activation_scheme")
    calm = {n for n in eight if not {_beside(n, k) for k in ("activation_scale", "input_scale")} & found.keys()}
    if scheme == "static" and calm:
        yield Finding("amber", "FP8", f"activations are static, but {some(calm)} has no activation_scale")
    kept = {n for n in eight if n.startswith(("vision_tower", "multi_modal_projector", "lm_head", "embed_tokens"))}
    if kept:
        yield Finding("amber", "FP8", f"{some(kept)}: in FP8, which released checkpoints keep in bfloat16")
    if said and not bare:
        shapes = {found[n].shape for name in eight for n in (name + "_scale_inv", name + "_scale") if n in found}
        kind = "a scale for each tensor" if all(shape in ((), (1,)) for shape in shapes) else "scales for blocks"
        yield Finding("green", "FP8", f"{len(eight)} tensors, {kind}, activations {scheme or 'unsaid'}")


def _beside(name: str, kind: str) -> str:
    return f"{name.removesuffix('.weight')}.{kind}"
