"""Attention by the kernels of GPUs: interpreted, or with a stand-in for the library that is called, and lowered."""

import importlib.util
import re
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused
from mesh_cases import placement

from ministral_jax.distributed.placement import zigzag
from ministral_jax.errors import UserError
from ministral_jax.models import attention
from ministral_jax.models.attention import AttentionSpec, attend, chosen_implementation
from ministral_jax.models.kernels import Asked, cudnn, gpu, mosaic, triton
from ministral_jax.models.sharded_attention import attend_on_mesh

H, K, WIDTH, TOKENS = 4, 2, 32, 256
ROWS = np.stack([np.repeat([1, 2, 3, 0], [100, 28, 100, 28]), np.repeat([1, 2], [40, 216])]).astype(np.int32)
FLOAT32 = 3e-6  # sums of at most 256 products in float32, against float64


def case(dtype=np.float64):
    """Queries, keys, values and the output's cotangent."""
    random = np.random.default_rng(0)
    return [random.standard_normal((len(ROWS), TOKENS, n, WIDTH)).astype(dtype) for n in (H, K, K, H)]


def value_and_gradients(function, arrays, segments=ROWS):
    *qkv, weight = map(jnp.asarray, arrays)

    def total(q, k, v):
        out = function(q, k, v, jnp.asarray(segments))
        return jnp.sum(out * weight), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*qkv)
    return [np.asarray(x, np.float64) for x in (out, *gradients)]


def exact(causal, segments=ROWS):
    """By all scores at once, in float64."""
    with jax.enable_x64(True):
        return value_and_gradients(partial(attend, spec=AttentionSpec(causal, "xla")), case(), segments)


def agrees(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.abs(ours - theirs).max() < FLOAT32 * np.abs(theirs).max()


def dense(q, k, v, visible):
    """softmax(q kᵀ) v over what is `visible` [B, t, s]."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.where(visible[:, None], jnp.einsum("bthd,bshd->bhts", q, k), -1e30)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


class Tokamax:
    """tokamax's operation and its backward one: queries with ranges of keys."""

    def bind(self, q, k, v, *, logits_scale, mask):
        assert logits_scale == 1
        return SimpleNamespace(args=(q, k, v), kwargs=dict(mask=mask, return_residuals=False))

    def __call__(self, q, k, v, *, mask, return_residuals):
        assert return_residuals
        return dense(q, k, v, self.visible(q, k, mask)), (jnp.zeros(()), jnp.zeros(()))

    def vjp(self, statistics, out, d_out, q, k, v, *, mask):
        return dict(zip("qkv", jax.vjp(lambda *x: dense(*x, self.visible(q, k, mask)), q, k, v)[1](d_out), strict=True))

    def visible(self, q, k, mask):
        key = jnp.arange(k.shape[1])
        sees = key >= mask.k_start[:, 0, :, None]
        if mask.k_end is not None:
            sees &= key < mask.k_end[:, 0, :, None]
        return sees & (jnp.arange(q.shape[1])[:, None] >= key) if mask.is_causal else sees


@pytest.fixture
def tokamax(monkeypatch):
    """The Mosaic kernel is that of CPUs."""
    base = ModuleType("base")
    base.Mask = SimpleNamespace
    for name in ("tokamax", "tokamax._src", "tokamax._src.ops", "tokamax._src.ops.attention"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "tokamax._src.ops.attention.base", base)
    monkeypatch.setattr(mosaic, "_kernel", Tokamax)
    monkeypatch.setattr(attention, "KERNELS", {"mosaic": ("cpu", serving(mosaic))})


def serving(module, **how):
    return SimpleNamespace(unserved=lambda asked: "", attend=partial(module.attend, **how))


@pytest.mark.parametrize("causal", [True, False])
def test_each_query_of_mosaic_has_the_keys_of_its_document(tokamax, causal):
    agrees(value_and_gradients(partial(attend, spec=AttentionSpec(causal)), case(np.float32)), exact(causal))


@pytest.mark.parametrize("causal", [True, False])
def test_so_has_each_of_a_row_that_a_mesh_cuts(tokamax, causal):
    place = placement(devices=4, context=2, tensor=2)
    order = zigzag(TOKENS, 2) if causal else np.arange(TOKENS)
    with jax.set_mesh(place.mesh), place.rules.active():
        arrays = [x[:, order] for x in case(np.float32)]
        found = value_and_gradients(partial(attend_on_mesh, spec=AttentionSpec(causal)), arrays, ROWS[:, order])
    agrees(found, [x[:, order] for x in exact(causal)])


@pytest.mark.parametrize("causal", [True, False])
def test_the_triton_kernels_have_the_values_and_gradients_of_all_scores_at_once(monkeypatch, causal):
    monkeypatch.setattr(attention, "KERNELS", {"triton": ("cpu", serving(triton, interpret=True))})
    agrees(value_and_gradients(partial(attend, spec=AttentionSpec(causal)), case(np.float32)), exact(causal))


@pytest.mark.parametrize("causal", [True, False])
def test_documents_are_sequences_of_cudnn_while_a_row_holds_no_more_than_it_may(monkeypatch, causal):
    def sequences(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
        assert q_seqlen is kv_seqlen and q_offsets is kv_offsets and scale == 1
        assert mask_type == (fused.MaskType.PADDING_CAUSAL if causal else fused.MaskType.PADDING)
        index = jnp.arange(q.shape[1])
        begin = q_offsets[:, :-1, None]
        within = (begin >= 0) & (index >= begin) & (index < begin + q_seqlen[..., None])  # [B, M, t]
        sees = jnp.einsum("bmt,bms->bts", within, within, preferred_element_type=jnp.int32) > 0
        out = dense(q, k, v, sees & (index[:, None] >= index) if causal else sees)
        return jnp.where(within.any(1)[..., None, None], out, jnp.nan)

    monkeypatch.setattr(fused, "dot_product_attention", sequences)
    monkeypatch.setattr(attention, "KERNELS", {"cudnn": ("cpu", serving(cudnn))})
    monkeypatch.setattr(triton, "attend", lambda q, *_: jnp.full_like(q, 7))
    ours = partial(attend, spec=AttentionSpec(causal))
    agrees(value_and_gradients(ours, case(np.float32)), exact(causal))
    many = np.stack([np.arange(TOKENS) // 8 + 1, ROWS[1]]).astype(np.int32)  # 32 documents, of 16
    assert (value_and_gradients(ours, case(np.float32), many)[0] == 7).all()


def test_documents_that_are_not_there_are_marked():
    begins = jnp.array([[1, 0, 1, 0, 0], [1, 1, 1, 1, 0], [0] * 5, [1, 1, 1, 0, 1]], bool)
    starts, lengths = cudnn.packed(begins, jnp.array([3, 5, 0, 5]), 4)
    np.testing.assert_array_equal(starts, [[0, 2, -1, -1, -1], [0, 1, 2, 3, -1], [-1] * 5, [0, 1, 2, 4, -1]])
    np.testing.assert_array_equal(lengths, [[2, 1, -1, -1], [1, 1, 1, 2], [-1] * 4, [1, 1, 2, 1]])
    # As the library tells them to cuDNN: the n-th length is of what begins at the n-th place.
    q = jnp.zeros((4, 5, 1, 1))
    lengths, _, places, _ = fused._fix_seqlen_offsets(lengths, lengths, starts, starts, q, q)
    pairs = zip(places.ravel().tolist(), lengths.ravel().tolist(), strict=False)
    found = [(begin, count) for begin, count in pairs if count]
    rows = [[(0, 2), (2, 1)], [(0, 1), (1, 1), (2, 1), (3, 2)], [], [(0, 1), (1, 1), (2, 2), (4, 1)]]
    assert found == [(5 * row + begin, count) for row, each in enumerate(rows) for begin, count in each]


@pytest.mark.parametrize(
    ("compute_capability", "installed", "asked", "expected"),
    [
        (9.0, True, Asked(16384, 16384, 128, "bfloat16"), "cudnn"),
        (9.0, True, Asked(1024, 16384, 128, "bfloat16"), "mosaic"),
        (9.0, False, Asked(1024, 16384, 128, "bfloat16"), "blockwise"),
        (8.0, True, Asked(16384, 16384, 128, "bfloat16"), "triton"),
        (8.0, True, Asked(1024, 16384, 128, "bfloat16"), "blockwise"),
        (7.5, True, Asked(16384, 16384, 128, "bfloat16"), "blockwise"),
        (9.0, True, Asked(16384, 16384, 128, "float32"), "blockwise"),
        (9.0, True, Asked(16384, 16384, 100, "bfloat16"), "blockwise"),
        (9.0, True, Asked(16300, 16300, 128, "bfloat16"), "blockwise"),
    ],
)
def test_what_auto_is_by_the_gpu_and_by_what_is_installed(monkeypatch, compute_capability, installed, asked, expected):
    for module in (cudnn, mosaic, triton):
        monkeypatch.setattr(module, "capability", lambda: compute_capability)
    monkeypatch.setattr(mosaic, "is_here", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
    assert chosen_implementation(AttentionSpec(), "gpu", asked) == expected
    wanted = AttentionSpec(implementation="cudnn")
    if expected == "mosaic":
        with pytest.raises(UserError, match=r"attention = cudnn needs rows that no mesh cuts \(mesh.context 1\); here"):
            chosen_implementation(wanted, "gpu", asked)


def test_a_gpu_that_is_planned_for_has_what_its_kernels_need(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen_implementation(AttentionSpec(), "gpu", Asked(1024, 16384, 128, "bfloat16")) == "mosaic"


def test_a_gpu_that_is_planned_for_is_no_older_than_hopper(monkeypatch):
    assert gpu.capability() == gpu.HOPPER
    for text, expected in (("8.6", 8.6), ("gfx942", 0)):
        monkeypatch.setattr(jax, "devices", lambda t=text: [SimpleNamespace(platform="gpu", compute_capability=t)])
        assert gpu.capability() == expected


def kernels_in(function):
    """Names of the custom calls in a program of forward and backward, lowered for a GPU."""
    q, k, v = (jax.ShapeDtypeStruct((2, TOKENS, n, 64), jnp.bfloat16) for n in (H, K, K))
    total = lambda q, k, v, s: function(q, k, v, (s, s), jnp.arange(TOKENS)[None], True).astype(jnp.float32).sum()
    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(q, k, v, jax.ShapeDtypeStruct(ROWS.shape, jnp.int32))
    return re.findall(r"custom_call @([\w$.]+)", traced.lower(lowering_platforms=("cuda",)).as_text())


def test_the_kernels_are_in_programs_for_gpus(monkeypatch):
    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=h100)):
        assert kernels_in(triton.attend) == ["__gpu$xla.gpu.triton"] * 3
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(fused, "check_compute_capability", lambda needed: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda other: False)
    monkeypatch.setattr(triton, "attend", lambda q, *_: q)
    assert kernels_in(cudnn.attend) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
