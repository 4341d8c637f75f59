"""Over several ranks the preflight names the node that is not like the others, on all of them."""

import json
from pathlib import Path

from ranks import run_ranks


def test_every_rank_names_the_node_with_other_versions_or_a_wrong_sum(tmp_path: Path) -> None:
    first, second = (json.loads(out.splitlines()[-1]) for out in run_ranks(2, "preflight_work:look", str(tmp_path)))
    assert first == [
        "well",
        "preflight: node2 (rank 1): torch is 1.0, on rank 0 2.0",
        "preflight: node2 (rank 1): RuntimeError: a sum over 2 ranks gave 1.5",
    ]
    assert second == first
