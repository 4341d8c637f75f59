"""How ranks of several nodes choose the addresses at which they listen, and what they say if there is none."""

import os
import socket
import time
from dataclasses import replace

import pytest

from cmscale.distributed import interfaces
from cmscale.distributed.interfaces import Seat, Verdict, await_master, judge_seats, network_id, own_seat
from cmscale.errors import UserError

FIRST = Seat(0, "node1", "net 1", "10.0.0.1", None, "eth0 10.0.0.1, lo 127.0.0.1")
SECOND = Seat(1, "node2", "net 2", "10.0.0.2", None, "eth0 10.0.0.2, lo 127.0.0.1")


def judged(*seats: Seat, towards: str | None = None) -> Verdict:
    return judge_seats(seats, lambda address: towards if address == SECOND.address else None)


def test_ranks_with_addresses_of_their_own_or_on_one_machine_need_nothing() -> None:
    assert judged(FIRST, SECOND) == Verdict()
    loopback = replace(FIRST, address="127.0.1.1")
    assert judged(loopback, replace(loopback, rank=1)) == Verdict()


def test_rank_0_takes_the_interface_that_leads_to_the_others() -> None:
    loopback = replace(FIRST, address="127.0.1.1")
    assert judged(loopback, SECOND, towards="eth0") == Verdict(interface="eth0", network="net 1")
    error = judged(loopback, SECOND).error
    assert "rank 0 on node1 would listen at 127.0.1.1, a loopback address (its name resolves to it)" in error
    assert "which rank 1 on node2 (10.0.0.2) can't reach; set GLOO_SOCKET_IFNAME to the interface" in error
    assert "node1 has eth0 10.0.0.1" in error


def test_another_rank_that_found_no_interface_is_named_and_so_is_what_the_user_set() -> None:
    assert "rank 1 on node2 would listen at ::1" in judged(FIRST, replace(SECOND, address="::1")).error
    chosen = replace(SECOND, address="127.0.0.1", interface="lo")
    assert "(GLOO_SOCKET_IFNAME is lo)" in judged(FIRST, chosen).error
    missing = judged(FIRST, replace(SECOND, address=None, interface="eth9")).error
    assert missing.startswith("GLOO_SOCKET_IFNAME=eth9: node2 (rank 1) has no such interface; it has eth0 10.0.0.2")


def test_a_master_at_a_loopback_address_where_nobody_answers_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_LAUNCH_NODE_IPADDR", raising=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        await_master("127.0.0.1", port, rank=0, ranks_per_node=1, seconds=0.0)  # rank 0 itself
        await_master("192.0.2.1", port, rank=1, ranks_per_node=1, seconds=0.0)  # no loopback address
        began = time.monotonic()
        with pytest.raises(UserError, match=r"MASTER_ADDR 127\.0\.0\.1 .* nobody answers .*GLOO_SOCKET_IFNAME"):
            await_master("127.0.0.1", port, rank=1, ranks_per_node=1, seconds=0.3)
        assert time.monotonic() - began < 60
        listener.listen()
        await_master("127.0.0.1", port, rank=1, ranks_per_node=1, seconds=0.0)
    assert interfaces.MASTER_SECONDS <= 20


def test_this_machine_has_a_seat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    seat = own_seat(0)
    assert seat.network == network_id()
    assert seat.address
    assert "lo 127.0.0.1" in seat.interfaces
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_seat(0).address == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-one")
    assert own_seat(0).address is None
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    interfaces.use("eth7")  # what the user set stays
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("no-such-one", "eth1")
