"""What the compiler has freed goes back to the system."""

import jax

from ministral_jax.distributed import host_memory


def test_a_long_compilation_is_followed_by_one_trim_and_a_short_one_by_none(monkeypatch):
    trims = []
    monkeypatch.setattr(host_memory, "_trim", trims.append)
    monkeypatch.setattr(host_memory, "_LONG", 0.0)
    for _ in range(2):
        host_memory.trim_after_compiling()
    jax.jit(lambda x: x + 1).lower(1.0).compile()
    assert trims == [0]
    monkeypatch.setattr(host_memory, "_LONG", 1e9)
    jax.jit(lambda x: x + 2).lower(1.0).compile()
    assert trims == [0]
