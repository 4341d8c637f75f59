"""Tests of the preflight on several ranks: every rank names the faulty node."""

import json
from pathlib import Path

from ranks import run_ranks


def test_every_rank_names_the_node_with_other_versions_or_a_wrong_sum(tmp_path: Path) -> None:
    first, second = (json.loads(out.splitlines()[-1]) for out in run_ranks(2, "preflight_work:look", str(tmp_path)))
    assert first == [
        "well",
        "preflight: node2 (rank 1): torch is 1.0, but 2.0 on rank 0",
        "preflight: node2 (rank 1): RuntimeError: the sum of 1 over 2 ranks is 1.5",
    ]
    assert second == first
