"""What follows after a start of a job: the queue again, a restart, or a stop, and when."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from launchers.decide import Decision, decide
from launchers.judge import SUPERSEDED, Attempt, Ending

FAULT = Attempt("fault", "boom", 10, 1, "node2")


def decided(history: Sequence[Attempt], **other: Any) -> Decision:
    defaults = {"max_restarts": 10, "backoff_seconds": 10, "can_requeue": True, "go_on": "go on so"}
    return decide(history, **{**defaults, **other})


def fault(step: int, *, node: str = "node2") -> Attempt:
    return Attempt("fault", "boom", step, 1, node)


def test_a_finished_job_is_done_whatever_came_before() -> None:
    assert decided([FAULT] * 5 + [Attempt("finished", "", 20)], max_restarts=0) == Decision("done", "finished")


@pytest.mark.parametrize("ending", ["user_error", "no_space", "not_exported"])
def test_what_no_other_start_would_mend_stops_at_once_with_its_message(ending: Ending) -> None:
    assert decided([Attempt(ending, "no such file", 0)]) == Decision("stop", "no such file")


class TestFullDisksOfNodes:
    """Starts that ended as a disk was full that belongs to one node, such as that of its cache."""

    FULL = Attempt("no_space", "data.cache_dir: /scratch on node2: no space left on the device", 10, 1, "node2")

    def test_the_next_start_avoids_the_node_at_once(self) -> None:
        decision = decided([self.FULL])
        assert (decision.action, decision.why, decision.exclude) == ("restart", self.FULL.message, ("node2",))

    def test_another_node_that_is_full_too_is_avoided_as_well(self) -> None:
        other = replace(self.FULL, message=self.FULL.message.replace("node2", "node5"), node="node5")
        assert decided([self.FULL, other]).exclude == ("node2", "node5")

    def test_it_stops_where_the_same_node_is_full_again_as_there_was_no_other(self) -> None:
        assert decided([self.FULL, fault(12), self.FULL]) == Decision("stop", self.FULL.message)

    def test_it_stops_where_each_node_meets_the_same_full_disk(self) -> None:
        full = [replace(self.FULL, message=self.FULL.message.replace("node2", node), node=node) for node in "abc"]
        assert [decided(full[: count + 1]).action for count in range(3)] == ["restart", "restart", "stop"]

    def test_it_uses_up_a_restart_and_needs_a_queue_that_has_other_nodes(self) -> None:
        assert decided([self.FULL], max_restarts=0).action == "stop"
        assert decided([self.FULL], can_requeue=False) == Decision("stop", self.FULL.message)

    def test_a_disk_of_all_nodes_is_no_nodes_even_if_its_path_holds_the_name_of_one(self) -> None:
        full = replace(self.FULL, message="/shared/node2/runs: no space left on the device")
        assert decided([full]) == Decision("stop", full.message)


def test_a_start_that_another_job_took_over_from_stops() -> None:
    assert decided([FAULT, Attempt("superseded", SUPERSEDED, 9)]) == Decision(
        "stop", "another job has started this run since and has taken over; this one has ended and is not started again"
    )


def test_a_cancelled_job_stops_and_says_how_to_continue() -> None:
    assert decided([Attempt("cancelled", "newest", 9)]) == Decision("stop", "cancelled; newest; go on so")


def test_preemptions_use_up_no_restart() -> None:
    history = [Attempt("preempted", "", 10)] * 50
    assert decided(history, max_restarts=0) == Decision("requeue", "preempted; step 10")
    assert decided([Attempt("preempted", "newest", 10)]).why == "preempted; newest"
    assert decided(history).delay_seconds == 0
    assert decided([*history, fault(11)], max_restarts=1).action == "restart"


class TestOutages:
    """Starts that ended as storage did not answer."""

    def away(self, *steps: int) -> list[Attempt]:
        return [Attempt("fault", "rank 0: StorageAway: s3://b: no answer", step, 0, "node0") for step in steps]

    def test_they_use_up_no_restart_and_wait_longer_each_time(self) -> None:
        delays = [decided(self.away(*[9] * number), max_restarts=0).delay_seconds for number in range(1, 6)]
        assert delays == [10, 20, 40, 80, 160]
        assert decided([*self.away(9, 9, 9), fault(9)], max_restarts=1).action == "restart"
        assert decided([*self.away(9, 9, 9), fault(9)], max_restarts=0).why.startswith("failed 1 times")

    def test_they_are_not_taken_for_a_failure_that_repeats_and_exclude_no_node(self) -> None:
        decision = decided(self.away(9, 9))
        assert (decision.action, decision.exclude) == ("restart", ())

    def test_six_without_progress_stop_and_say_how_to_continue(self) -> None:
        assert decided(self.away(*[9] * 5)).action == "restart"
        assert decided(self.away(*[9] * 6)) == Decision(
            "stop",
            "storage did not answer in 6 starts without progress; rank 0: StorageAway: s3://b: no answer; go on so",
        )
        assert decided(self.away(*[9] * 5, 12)).delay_seconds == 10


class TestTimeLimits:
    def limits(self, *steps: int) -> list[Attempt]:
        return [Attempt("time_limit", "newest", step) for step in steps]

    def test_they_requeue_until_three_in_a_row_brought_no_progress(self) -> None:
        assert decided(self.limits(5, 9, 9), max_restarts=0) == Decision("requeue", "time limit; newest")
        stopped = decided(self.limits(5, 9, 9, 9), max_restarts=0)
        assert stopped.action == "stop"
        assert stopped.why == "no progress before the time limit, three times; newest; ask for more --time"
        assert decided(self.limits(9, 9, 9, 12)).action == "requeue"

    def test_starts_of_other_kinds_without_progress_count_too(self) -> None:
        history = [Attempt("preempted", "", 9), fault(9), *self.limits(9)]
        assert decided(history).action == "stop"

    def test_without_a_queue_they_stop(self) -> None:
        assert decided(self.limits(5), can_requeue=False) == Decision("stop", "time limit reached; newest; go on so")

    def test_an_evaluation_makes_progress_by_what_it_measures(self) -> None:
        measured = [Attempt("time_limit", "", 9, measured=f"{n} blocks") for n in (1, 2, 3, 3)]
        assert decided(measured).action == "requeue"
        assert decided([*measured, measured[-1]]).action == "stop"


class TestFaults:
    def test_the_third_without_progress_stops(self) -> None:
        assert [decided([FAULT] * n).action for n in (1, 2, 3)] == ["restart", "restart", "stop"]
        assert decided([FAULT] * 3).why == "3 failures without progress since step 10: boom"
        assert decided([fault(-1)] * 3).why == "3 failures without progress since step 0: boom"
        assert decided([fault(1), fault(1), fault(2)]).action == "restart"

    NOT_FINITE = (
        "RuntimeError: after step 450: 3 consecutive batches without finite loss and gradient, after 2 rollbacks"
    )

    @pytest.mark.parametrize(
        "message",
        [
            NOT_FINITE,
            "RuntimeError: rank 1 is out of luck",
            "KeyError: 'x' at 0x7f00",
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
            "AcceleratorError: CUDA error: device-side assert triggered",
            "RuntimeError: CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm( handle)`",
            "AcceleratorError: CUDA error: invalid argument",
            "RuntimeError: CUDA error: no kernel image is available for execution on the device",
            "RuntimeError: cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        ],
    )
    def test_one_that_repeats_identically_is_not_started_a_third_time_through_a_queue(self, message: str) -> None:
        faults = [Attempt("fault", message, 400, rank, f"node{rank}") for rank in (0, 1)]
        faults[1] = replace(faults[1], message=message.replace("0x7f00", "0x7e01"))
        assert decided(faults[:1]).action == "restart"
        stopped = decided(faults)
        assert stopped.action == "stop"
        assert stopped.why.startswith("the same failure twice at step 400, so a third start would fail too: ")
        assert stopped.why.endswith(faults[1].message)
        assert decided([faults[0], Attempt("preempted", "", 400), faults[1]]).action == "stop"
        assert decided(faults, can_requeue=False).action == "restart"  # this machine has no queue to wait in
        assert decided([faults[0], replace(faults[1], step=410)]).action == "restart"
        assert decided([faults[0], replace(faults[1], message=f"{message} again")]).action == "restart"

    @pytest.mark.parametrize(
        "message",
        [
            "rank 1 on node2: Killed",
            "preflight: node2 (rank 1): RuntimeError: cuda:0: a matrix product is wrong",
            "PreflightFailed: preflight: node2 (rank 1): OSError: no",
            "ConnectionError: s3://bucket: no answer",
            "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:1234",
            "DistBackendError: NCCL error",
            "TimeoutError: rank 1 has not written its part of the checkpoint",
            "OSError: [Errno 116] Stale file handle",
            "AcceleratorError: CUDA error: uncorrectable ECC error encountered",
            "RuntimeError: after step 400: CUDA error: unspecified launch failure",
            "RuntimeError: No CUDA GPUs are available",
            "AcceleratorError: CUDA error: invalid device ordinal",
            "RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle)`",
            "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
            "RuntimeError: CUDA unknown error - this may be due to an incorrectly set up environment",
            "RuntimeError: cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
            "ImportError: libcudart.so.13: cannot open shared object file: No such file or directory",
        ],
    )
    def test_one_whose_cause_may_pass_or_stay_on_its_node_is_started_a_third_time(self, message: str) -> None:
        faults = [Attempt("fault", message, 400, 1, "node2")] * 3
        assert [decided(faults[:n]).action for n in (1, 2, 3)] == ["restart", "restart", "stop"]

    @pytest.mark.parametrize("between", ["preempted", "time_limit"])
    def test_starts_between_them_that_were_no_faults_do_not_count_as_progress(self, between: Ending) -> None:
        other = Attempt(between, "", 10)
        assert decided([FAULT, other, FAULT, other, FAULT]).action == "stop"

    def test_an_evaluation_that_measures_makes_progress(self) -> None:
        faults = [Attempt("fault", "boom", 10, measured=measured) for measured in ("1", "2", "3")]
        assert decided(faults).action == "restart"
        assert decided([faults[0]] * 3).why == "3 failures without progress since 1: boom"

    def test_restarts_are_bounded_even_with_progress(self) -> None:
        assert decided([fault(step) for step in range(4)], max_restarts=4).action == "restart"
        stopped = decided([fault(step) for step in range(5)], max_restarts=4)
        assert stopped == Decision("stop", "failed 5 times (restart.max_restarts 4): boom")
        assert decided([FAULT], max_restarts=0).action == "stop"

    def test_the_pause_doubles_while_nothing_moves_and_starts_anew_after_progress(self) -> None:
        assert [decided([FAULT] * n).delay_seconds for n in (1, 2)] == [10, 20]
        assert decided([fault(1), fault(1), fault(2)]).delay_seconds == 10
        assert decided([FAULT] * 2, backoff_seconds=3).delay_seconds == 6
        assert decided([FAULT], backoff_seconds=0).delay_seconds == 0

    def test_the_pause_has_an_upper_bound(self) -> None:
        assert decided([FAULT], backoff_seconds=300).delay_seconds == 300
        assert decided([FAULT, FAULT], backoff_seconds=200).delay_seconds == 300

    def test_a_node_that_failed_twice_is_excluded_and_one_that_failed_once_is_not(self) -> None:
        assert decided([fault(1, node="a"), fault(2, node="b")]).exclude == ()
        assert decided([fault(1, node="a"), fault(2, node="b"), fault(3, node="a")]).exclude == ("a",)
        both = [fault(step, node=node) for step, node in enumerate("bababa")]
        assert decided(both).exclude == ("a", "b")

    def test_starts_without_a_node_to_blame_and_starts_that_were_no_faults_exclude_none(self) -> None:
        assert decided([fault(1, node=""), fault(2, node="")]).exclude == ()
        preempted = Attempt("preempted", "", 1, node="a")
        assert decided([preempted, preempted, fault(2, node="a")]).exclude == ()
