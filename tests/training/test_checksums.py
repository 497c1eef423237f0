"""What process 0 learns of the files that several processes have written."""

import json
from pathlib import Path

import pytest

from ministral_jax.distributed.processes import RETRY, Unreachable
from ministral_jax.files import file_digest
from ministral_jax.training import checksums as module
from ministral_jax.training.checksums import checksums, damage


class Peers:
    """Processes that have told already what they found."""

    def __init__(self, *found):
        self.found = found

    def told(self, waiting):
        waiting()
        return [json.dumps(files) for files in self.found]


def test_what_a_peer_wrote_is_kept_though_process_0_does_not_see_it_yet(tmp_path):
    for name in ("manifest", "ocdbt.process_1/d/seen"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    unseen = {"ocdbt.process_1/d/unseen": [3, "ab"], "ocdbt.process_2/d/unseen": [4, "cd"]}
    peers = Peers({"ocdbt.process_1/d/unseen": unseen["ocdbt.process_1/d/unseen"]}, unseen)
    files = checksums(tmp_path, peers, lambda: None)
    here = {name: [len(name), file_digest(tmp_path / name)] for name in ("manifest", "ocdbt.process_1/d/seen")}
    assert files == here | unseen and [Path(name) for name in files] == sorted(map(Path, files))
    assert damage(tmp_path, files) == "ocdbt.process_2/d/unseen is missing"


def test_where_the_network_fails_all_processes_stop_to_be_started_again(tmp_path, monkeypatch):
    """A process that raised before it told the others would leave them waiting."""
    told = []
    monkeypatch.setattr(module, "first_problem", lambda problem: told.append(problem) or problem)
    monkeypatch.setattr(module, "is_remote", lambda path: True)

    def fail(path):
        raise OSError(5, "HttpError: 503", str(path))

    monkeypatch.setattr(module, "file_digest", fail)
    (tmp_path / "a").write_text("a")
    with pytest.raises(Unreachable, match=r"/a could be checked: HttpError: 503$") as stop:
        damage(tmp_path, {"a": [1, "ab"]})
    assert stop.value.code == RETRY and len(told) == 1 and told[0]
