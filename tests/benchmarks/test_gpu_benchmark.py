"""The benchmark of one GPU: how many layers fit, and that it ends and tells whatever fails."""

from dataclasses import replace

import gpu
import jax
import pytest

from ministral_jax.losses.targets import DEFAULT_CHUNK
from ministral_jax.models.spec import PRESETS


def test_all_parts_have_a_deadline_and_together_they_take_less_than_eight_minutes():
    assert gpu.SECONDS.keys() == gpu.PARTS.keys()
    assert sum(gpu.SECONDS.values()) < 8 * 60 - 20


def test_layers_that_fit_are_found_by_arithmetic(monkeypatch):
    spec, larger = (PRESETS[gpu.REAL.presets[size]] for size in ("8b", "14b"))
    # Of no tokens only what a parameter costs is left, and the loss head's share.
    fixed = 18 * spec.decoder_parameters + 4 * spec.vocab * (spec.width + 4 * DEFAULT_CHUNK)
    assert gpu.bytes_of(spec, None, 0, spec.layers) == pytest.approx(fixed, rel=1e-3)
    assert gpu.bytes_of(spec, larger, 8192, 5) > gpu.bytes_of(spec, None, 8192, 5)

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 0.92 * 80e9}

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    most = gpu.most_layers(spec, larger, 8192)
    assert gpu.bytes_of(spec, larger, 8192, most) <= 0.85 * 0.92 * 80e9 < gpu.bytes_of(spec, larger, 8192, most + 1)
    assert gpu.most_layers(spec, larger, 2_000_000) == 0


def test_a_kernel_that_fails_is_a_row_that_says_why(monkeypatch):
    monkeypatch.setattr(gpu, "LONG_ENOUGH", 0.0)
    rows = [{"part": "attention", **row} for row in gpu.attention(replace(gpu.REHEARSAL, lengths=(128,)))]
    assert [row["name"].split(",")[0] for row in rows] == ["cudnn", "mosaic", "triton", "blockwise"]
    assert all("needs gpu devices" in row["error"] for row in rows[:3])
    assert rows[3]["runs"] == 3 and rows[3]["ms"] > 0
    assert "needs gpu devices" in gpu.line_of(rows[0]) and "TFLOP/s" in gpu.line_of(rows[3])


def test_a_part_that_is_late_is_a_row_that_says_so():
    (row,) = gpu.measure("loss head", 0.01, rehearse=True)
    assert row["error"] == "stopped after its 0 s"
