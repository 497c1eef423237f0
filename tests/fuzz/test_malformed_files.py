"""Files spoilt by a seed are read or refused, by a process that has little memory; `make fuzz` reads many more."""

from __future__ import annotations

import fuzzer


def test_malformed_files_are_read_or_refused_in_one_sentence():
    found = list(fuzzer.outcomes(0, 500, seed=0))
    assert [record["number"] for record in found] == [*range(500)]
    ends = [record["end"] for record in found]
    failed = [record for record in found if record["end"] not in (fuzzer.READ, fuzzer.REFUSED)]
    assert not failed, failed[:5]
    assert ends.count(fuzzer.READ) > 50 and ends.count(fuzzer.REFUSED) > 250
