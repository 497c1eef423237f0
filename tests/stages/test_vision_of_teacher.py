"""A student from scratch takes its tower from a teacher that is loaded already, on whatever mesh that lies."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
from model_cases import vlm

from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.models.vlm import init_params, param_shardings
from ministral_jax.stages import teaching

SPEC = vlm()


def test_the_tower_of_a_teacher_on_other_devices_is_handed_over_and_not_read_again(monkeypatch):
    ours, theirs = (
        Placement(make_mesh(MeshConfig(fsdp=2), devices), Rules())
        for devices in (jax.devices()[:2], jax.devices()[2:4])
    )
    fresh, taught = (init_params(SPEC, seed) for seed in (jax.random.key(0), jax.random.key(1)))
    lies = param_shardings(SPEC, ours)
    fresh, apart = jax.device_put(fresh, lies), jax.device_put(taught, param_shardings(SPEC, theirs))
    teacher = SimpleNamespace(constants={}, apart=SimpleNamespace(params=apart))
    monkeypatch.setattr(teaching, "load_stage", None)
    found = teaching.vision_of_teacher(SimpleNamespace(spec=SPEC, placement=ours), teacher, fresh)
    assert jax.tree.all(jax.tree.map(np.array_equal, found["vision"], taught["vision"]))
    assert jax.tree.all(jax.tree.map(lambda x, where: x.sharding == where, found["vision"], lies["vision"]))
    assert found["decoder"] is fresh["decoder"]
