"""Tests that ranks wait together for one that is held up: no collective waits for it, however long it takes."""

import json

from ranks import run_ranks


def test_ranks_look_again_and_again_while_one_is_held_up_and_all_raise_what_one_raised() -> None:
    first, second = (json.loads(out.splitlines()[-1]) for out in run_ranks(2, "together_work:wait"))
    assert (first[0], second[0]) == ("rank 0", "rank 1")
    assert first[1] == second[1] >= 4
    assert second[2] is True  # it had not done at its first look; rank 0 had, unless the machine was busy
    assert first[3:] == second[3:] == ["of rank 1", "goes on"]
