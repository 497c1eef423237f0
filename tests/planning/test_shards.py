"""Shapes and axes of parameters, written down without tracing, against the model's own; and how a mesh cuts them."""

import jax
import pytest

from ministral_jax.distributed.placement import MeshConfig, Placement, Rules
from ministral_jax.models.spec import PRESETS
from ministral_jax.models.vlm import abstract_params, logical_axes, param_shardings
from ministral_jax.planning.machine import parse_machine
from ministral_jax.planning.memory.shards import Shards, parameters


def by_path(tree, leaf=None):
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): value for path, value in found}


@pytest.mark.parametrize("name", ["tiny-14b", "tiny-3b"])
def test_parameters_are_those_of_the_model(name):
    spec = PRESETS[name]
    shapes, axes = by_path(abstract_params(spec)), by_path(logical_axes(spec), lambda x: isinstance(x, tuple))
    assert parameters(spec) == {path: (shape.shape, axes[path]) for path, shape in shapes.items()}


@pytest.mark.parametrize("mesh", [{"fsdp": 16, "tensor": 4}, {"fsdp": 4, "tensor": 1, "context": 16}, {"tensor": 16}])
def test_a_device_holds_what_the_shardings_say(mesh):
    mesh = parse_machine("v5p:4x4x4").mesh(MeshConfig(data=-1, **{"fsdp": 1, **mesh}))
    spec, rules = PRESETS["tiny-14b"], Rules()
    shardings = jax.tree.leaves(param_shardings(spec, Placement(mesh, rules)))
    theirs = [
        s.shard_shape(leaf.shape) for s, leaf in zip(shardings, jax.tree.leaves(abstract_params(spec)), strict=True)
    ]
    assert Shards(spec, rules, mesh).size() == sum(int(jax.numpy.prod(jax.numpy.array(shape))) for shape in theirs)
