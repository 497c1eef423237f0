"""By what kept results of tasks know the checkpoint that they are of."""

import pytest

from ministral_jax.runs.evaluate import _identity


@pytest.mark.parametrize("name", ["config.json", "params.json"])
def test_a_directory_of_either_format_is_known_by_its_sizes_and_weights(tmp_path, name):
    (tmp_path / name).write_text("{}")
    (tmp_path / "weights.safetensors").write_bytes(b"0")
    found = _identity(tmp_path)
    assert _identity(tmp_path) == found
    (tmp_path / name).write_text("[]")
    other = _identity(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"00")
    assert len({found, other, _identity(tmp_path)}) == 3
