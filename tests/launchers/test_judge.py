"""How a start of a job is judged, from reports of its ranks and from what the cluster saw."""

from typing import Any

import pytest

from launchers.decide import Decision, decide
from launchers.follow import show_end
from launchers.judge import SUPERSEDED, Attempt, RankEnd, RankFailure, judge


def judged(*states: str, status: int = 0, **other: Any) -> Attempt:
    """A start whose ranks 0, 1, ... reported these states, in this order."""
    ends = [RankEnd(rank, f"node{rank}", state, f"rank {rank}: {state}") for rank, state in enumerate(states)]  # pyright: ignore[reportArgumentType]
    return judge(ends, **{"status": status, "first_failure": None, "step": 3, "leaving": None, **other})


def test_a_start_finished_only_if_every_rank_did_and_the_status_is_0() -> None:
    assert judged("finished", "finished") == Attempt("finished", "", 3)
    assert judged("finished", "finished").rank == 0
    assert judged("finished", "running").ending == "fault"
    assert judged("finished", "preempted").ending == "preempted"
    assert judged("finished", "finished", status=1).ending == "fault"


def test_a_start_without_all_its_copies_stops_with_status_1_and_is_not_repeated(capsys) -> None:
    attempt = judged("not_exported", "finished")
    assert attempt == Attempt("not_exported", "rank 0: not_exported", 3, 0, "node0")
    limits = {"max_restarts": 9, "backoff_seconds": 0, "can_requeue": True, "go_on": ""}
    assert decide([attempt], **limits) == Decision("stop", "rank 0: not_exported")
    assert show_end(attempt.ending, attempt.message, log=None) == 1
    assert capsys.readouterr().err == "finished, not exported: rank 0: not_exported\n"
    assert judged("not_exported", "running").ending == "fault"
    assert judged("not_exported", "finished", status=1).ending == "fault"


def test_a_start_without_any_report_is_a_fault_that_names_the_status() -> None:
    assert judged(status=7) == Attempt("fault", "the processes ended with status 7 and no rank reported a reason", 3)
    assert judged().ending == "fault"


def test_a_start_is_preempted_if_ranks_left_by_themselves() -> None:
    assert judged("preempted", "preempted") == Attempt("preempted", "", 3)
    assert judged("preempted", "preempted", status=1).ending == "fault"
    assert judged("preempted", "running").ending == "fault"


def test_one_users_mistake_decides_whatever_else_was_seen() -> None:
    failure = RankFailure(0, "node0", "Killed")
    for other in ({}, {"leaving": "preempted"}, {"leaving": "cancelled"}, {"first_failure": failure}):
        attempt = judged("fault", "user_error", "finished", status=2, **other)
        assert attempt == Attempt("user_error", "rank 1: user_error", 3, 1, "node1")


def test_a_full_disk_is_that_of_the_node_that_the_message_names_whichever_rank_reports_it_first() -> None:
    message = "data.cache_dir: /scratch on n1: no space left on the device"
    ends = [RankEnd(1, "n2", "no_space", message), RankEnd(0, "n1", "no_space", message)]
    of_a_node: dict[str, Any] = {"status": 1, "first_failure": None, "step": 3}
    assert judge(ends, leaving=None, **of_a_node) == Attempt("no_space", message, 3, 1, "n1")
    assert judge(ends, leaving="cancelled", **of_a_node).ending == "cancelled"


def test_a_full_disk_is_one_rank_s_end() -> None:
    for other in ({}, {"leaving": "preempted"}, {"first_failure": RankFailure(0, "node0", "Killed")}):
        attempt = judged("fault", "no_space", "finished", status=1, **other)
        assert attempt == Attempt("no_space", "rank 1: no_space", 3, 1, "node1")
    assert judged("no_space", "user_error", status=2).ending == "user_error"


def test_a_start_that_was_superseded_on_any_rank_is() -> None:
    for other in ({}, {"leaving": "preempted"}, {"first_failure": RankFailure(0, "node0", "Killed")}, {"status": 1}):
        assert judged("fault", "superseded", "finished", **other) == Attempt("superseded", SUPERSEDED, 3)


def test_the_first_reported_mistake_is_named() -> None:
    ends = [RankEnd(2, "b", "user_error", "first"), RankEnd(0, "a", "user_error", "second")]
    assert judge(ends, status=2, first_failure=None, step=0, leaving=None).message == "first"


@pytest.mark.parametrize("leaving", ["preempted", "time_limit", "cancelled"])
def test_errors_of_ranks_while_the_cluster_ends_the_job_are_no_fault(leaving: str) -> None:
    failure = RankFailure(1, "node1", "Terminated")
    attempt = judged("fault", "running", status=143, leaving=leaving, first_failure=failure)
    assert attempt == Attempt(leaving, "newest checkpoint: step 3", 3)  # pyright: ignore[reportArgumentType]
    assert judged("running", leaving=leaving, step=-1).message == "no checkpoint yet"
    assert judged("running", leaving=leaving, step=0).message == "newest checkpoint: step 0"


def test_a_job_that_finished_while_the_cluster_was_ending_it_has_finished() -> None:
    assert judged("finished", "finished", leaving="preempted").ending == "finished"


def test_a_killed_rank_is_named_and_not_those_that_lost_it() -> None:
    ends = [RankEnd(0, "node1", "fault", "connection closed by peer"), RankEnd(1, "node2", "running")]
    attempt = judge(ends, status=137, first_failure=RankFailure(1, "node2", "Killed"), step=0, leaving=None)
    assert attempt == Attempt("fault", "rank 1 on node2: Killed", 0, 1, "node2")


@pytest.mark.parametrize("state", ["running", "finished", "preempted"])
def test_a_failed_rank_without_an_error_of_its_own_is_named_by_what_the_cluster_saw(state: str) -> None:
    attempt = judged("fault", state, status=1, first_failure=RankFailure(1, "node1", "exit status 1"))
    assert (attempt.message, attempt.rank) == ("rank 1 on node1: exit status 1", 1)


def test_a_rank_that_failed_before_its_first_report_is_named() -> None:
    attempt = judged("running", status=1, first_failure=RankFailure(5, "node9", "Exited with exit code 1"))
    assert (attempt.message, attempt.rank, attempt.node) == ("rank 5 on node9: Exited with exit code 1", 5, "node9")


def test_the_rank_that_failed_first_reports_its_own_error() -> None:
    attempt = judged("fault", "fault", status=1, first_failure=RankFailure(1, "node1", "Exited with exit code 1"))
    assert attempt == Attempt("fault", "rank 1: fault", 3, 1, "node1")


def test_without_the_clusters_view_the_earliest_fault_is_named() -> None:
    ends = [RankEnd(1, "b", "fault", "first"), RankEnd(0, "a", "fault", "second"), RankEnd(2, "c", "running")]
    attempt = judge(ends, status=1, first_failure=None, step=4, leaving=None)
    assert attempt == Attempt("fault", "first", 4, 1, "b")


def test_a_rank_whose_storage_was_away_explains_what_the_others_report() -> None:
    """Its peers lose it in a collective, and may be seen to fail first."""
    ends = [
        RankEnd(0, "a", "fault", "RuntimeError: connection closed by peer"),
        RankEnd(1, "b", "fault", "StorageAway: s3://b"),
    ]
    for failure in (None, RankFailure(0, "a", "exit status 1")):
        attempt = judge(ends, status=1, first_failure=failure, step=3, leaving=None)
        assert (attempt.ending, attempt.rank, attempt.node) == ("fault", 1, "b")
        assert "StorageAway" in attempt.message


@pytest.mark.parametrize(("named", "node"), [("n7", "n7"), ("n[1,3-5]", ""), ("n1,gpu2", "")])
def test_of_several_nodes_that_failed_alike_none_is_to_blame(named: str, node: str) -> None:
    failure = RankFailure(1, named, "Killed")
    attempt = judge([RankEnd(1, "n1", "running")], status=137, first_failure=failure, step=0, leaving=None)
    assert (attempt.node, attempt.rank) == (node, 1)
    assert f"on {named}: Killed" in attempt.message
