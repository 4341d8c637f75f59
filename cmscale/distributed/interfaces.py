"""Finds the network interface by which the ranks of several nodes reach each other, before they connect.

gloo listens at the address to which its node's own name resolves. Where that is a loopback address (a line of
/etc/hosts on Debian and in many containers), other nodes can't reach it. Then the interface that leads to rank 0's
node is taken, by the variables GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, unless they are set already.
"""

import contextlib
import datetime
import ipaddress
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cmscale.errors import UserError
from cmscale.io.json_text import parse_json

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
MASTER_SECONDS = 15.0
"""How long a rank waits for rank 0 at a loopback address, which can be right only on one machine."""
READ_TIME = datetime.timedelta(seconds=5)
"""How long rank 0 waits until all ranks have read why they end."""


@dataclass(frozen=True)
class Seat:
    """Where a rank can be reached.

    Attributes:
        network: Names the network stack: ranks of equal ones reach each other by loopback addresses.
        address: Where gloo would listen; None if the named interface does not exist.
        interface: The value of GLOO_SOCKET_IFNAME; None if it is not set.
        interfaces: The node's interfaces and their addresses, in words.
    """

    rank: int
    host: str
    network: str
    address: str | None
    interface: str | None
    interfaces: str


@dataclass(frozen=True)
class Verdict:
    """What rank 0 finds from all seats: an error for every rank, or the interface that ranks of its network take."""

    error: str = ""
    interface: str | None = None
    network: str = ""


def agree(store: Any, *, rank: int, num_ranks: int) -> None:
    """Has every rank listen at an address that the others reach. Collective over `store`, before gloo connects.

    Raises:
        UserError: on every rank, if some rank can be reached by no other node; it names the addresses and what to set.
    """
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if GLOO not in os.environ and is_loopback(own_address()):
        use(interface_towards(master, port))
    seat = own_seat(rank)
    store.set(f"seat-{rank}", json.dumps(asdict(seat)))
    if rank == 0:
        found = store.multi_get([f"seat-{number}" for number in range(num_ranks)])
        verdict = judge_seats(
            [Seat(**parse_json(one)) for one in found], lambda address: interface_towards(address, port)
        )
        store.set("verdict", json.dumps(asdict(verdict)))
    verdict = Verdict(**parse_json(store.get("verdict")))
    if verdict.error:
        store.set(f"read-{rank}", "")
        if rank == 0:  # it holds the store
            with contextlib.suppress(RuntimeError):
                store.wait([f"read-{number}" for number in range(num_ranks)], READ_TIME)
        raise UserError(verdict.error)
    if verdict.network == seat.network and GLOO not in os.environ:
        use(verdict.interface)


def judge_seats(seats: Sequence[Seat], towards: Callable[[str], str | None]) -> Verdict:
    """Whether all ranks can reach each other.

    Args:
        seats: Those of all ranks, by rank.
        towards: The interface of rank 0's node that leads to an address; None if there is none.
    """
    first = seats[0]
    for seat in seats:
        if seat.address is None:
            return Verdict(
                f"{GLOO}={seat.interface}: {seat.host} (rank {seat.rank}) has no such interface; it has "
                f"{seat.interfaces}"
            )
    others = [seat for seat in seats if seat.network != first.network]
    if not others:
        return Verdict()
    lost = [seat for seat in others if is_loopback(seat.address)]
    if lost:
        return Verdict(_unreachable(lost[0], first))
    if not is_loopback(first.address):
        return Verdict()
    interface = None if first.interface else towards(others[0].address or "")
    if interface is None:
        return Verdict(_unreachable(first, others[0]))
    return Verdict(interface=interface, network=first.network)


def _unreachable(seat: Seat, other: Seat) -> str:
    why = f"{GLOO} is {seat.interface}" if seat.interface else "its name resolves to it"
    return (
        f"rank {seat.rank} on {seat.host} would listen at {seat.address}, a loopback address ({why}), which rank "
        f"{other.rank} on {other.host} ({other.address}) can't reach; set {GLOO} to the interface between the nodes; "
        f"{seat.host} has {seat.interfaces}"
    )


def await_master(master: str, port: int, *, rank: int, ranks_per_node: int, seconds: float = MASTER_SECONDS) -> None:
    """Waits for rank 0 where its name resolves to a loopback address on another node than its own.

    That is right if all "nodes" are one machine, as in tests; else nobody will ever answer.

    Raises:
        UserError: nobody answers within the time.
    """
    if rank < ranks_per_node or not is_loopback(_resolved(master)):
        return
    if is_loopback(os.environ.get("SLURM_LAUNCH_NODE_IPADDR")):  # Slurm itself runs on loopback addresses
        return
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), socket.create_connection((master, port), timeout=1.0):
            return
        if time.monotonic() > until:
            raise UserError(
                f"rank {rank} on {socket.gethostname()}: MASTER_ADDR {master} resolves to {_resolved(master)} here, a "
                f"loopback address, and nobody answers at port {port}; set MASTER_ADDR to the address of rank 0's node "
                f"between the nodes, and {GLOO} to the interface; this node has {describe_interfaces()}"
            )
        time.sleep(0.2)


def own_seat(rank: int) -> Seat:
    name = os.environ.get(GLOO)
    address = own_address() if name is None else address_of(name.split(",")[0])
    return Seat(rank, socket.gethostname(), network_id(), address, name, describe_interfaces())


def use(interface: str | None) -> None:
    """Has gloo and NCCL take an interface, unless the user named one."""
    if interface is not None:
        os.environ.setdefault(GLOO, interface)
        os.environ.setdefault(NCCL, interface)


def own_address() -> str:
    """The address to which this node's name resolves, if it is this node's; a loopback address otherwise."""
    local = {address for addresses in _addresses().values() for address in addresses}
    with contextlib.suppress(OSError):
        for *_, where in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            address = str(where[0]).partition("%")[0]
            if address in local or is_loopback(address):
                return address
    return "127.0.0.1"


def interface_towards(address: str, port: int) -> str | None:
    """The interface from which packets to an address leave; None if there is none but loopback. Nothing is sent."""
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, where in socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(where)
                own = str(probe.getsockname()[0]).partition("%")[0]
            names = [name for name, addresses in _addresses().items() if own in addresses]
            if names and not is_loopback(own):
                return names[0]
    return None


def address_of(interface: str) -> str | None:
    """The first address of an interface; None if there is no such interface."""
    return next(iter(_addresses().get(interface, ())), None)


def is_loopback(address: str | None) -> bool:
    with contextlib.suppress(ValueError):
        return address is not None and ipaddress.ip_address(address).is_loopback
    return False


def network_id() -> str:
    """Names the network stack of this process: the running kernel and its network namespace."""
    parts = []
    for path, read in (("/proc/sys/kernel/random/boot_id", Path.read_text), ("/proc/self/ns/net", os.readlink)):
        with contextlib.suppress(OSError):
            parts.append(str(read(Path(path))).strip())
    return " ".join(parts) or socket.gethostname()


def describe_interfaces() -> str:
    """The interfaces of this node and their addresses: `eth0 10.0.0.2, lo 127.0.0.1`."""
    return ", ".join(f"{name} {addresses[0]}" for name, addresses in sorted(_addresses().items()) if addresses)


def _addresses() -> dict[str, list[str]]:
    """The addresses of each interface of this node, IPv4 first."""
    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        of_ip = [each for each in addresses if each.family in (socket.AF_INET, socket.AF_INET6)]
        of_ip.sort(key=lambda each: each.family != socket.AF_INET)
        found[name] = [each.address.partition("%")[0] for each in of_ip]
    return found


def _resolved(name: str) -> str:
    with contextlib.suppress(OSError):
        return socket.gethostbyname(name)
    return name
