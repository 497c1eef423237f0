"""FP8 is for what learns: a teacher on its own mesh and held-out rows multiply as `dtype` says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from model_cases import vlm

from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.losses.evaluation import forward
from ministral_jax.models.block import Exported
from ministral_jax.models.vlm import VLM, Compute, abstract_params, image_features
from ministral_jax.teachers.apart import states_program

SEEING = vlm()
SPEC = SEEING.model_copy(update={"vision": None})
FP8 = Compute(matmul="fp8")


def test_only_what_learns_multiplies_numbers_of_eight_bits():
    place = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), Rules())
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params, batch = abstract_params(SPEC), dict(tokens=ids, positions=ids, segments=ids)

    def rounds(program) -> bool:
        with jax.set_mesh(place.mesh):
            return "f8_e4m3" in str(jax.make_jaxpr(program)(params, batch))

    assert rounds(lambda params, batch: VLM(SPEC, FP8).apply({"params": params}, batch["tokens"]))
    assert not rounds(states_program(SPEC, FP8, place, place, 1))
    assert not rounds(forward(SPEC, FP8, place))
    assert rounds(forward(SPEC, Exported(), place))
    assert not rounds(states_program(SPEC, Exported(), place, place, 1))


def test_a_tower_that_is_seen_through_by_both_is_not_rounded():
    grid = jax.ShapeDtypeStruct((1, 1, 4), jnp.int32)
    images = dict(patches=jax.ShapeDtypeStruct((1, 1, 4, SEEING.vision.patch_width), jnp.float32))
    images |= dict(patch_image=grid, patch_row=grid, patch_col=grid, image_slot=jax.ShapeDtypeStruct((1, 8), jnp.int32))
    tower = abstract_params(SEEING)["vision"]
    for compute in (FP8, Exported()):
        program = jax.make_jaxpr(lambda tower, images, c=compute: image_features(VLM(SEEING, c), tower, images))
        assert "f8_e4m3" not in str(program(tower, images))
