"""Names of torch that differ between versions: either name serves, and none is an error that names the version."""

import datetime

import pytest
import torch
import torch.distributed as dist

from cmscale.distributed import compat
from cmscale.io.packages import UnsupportedVersion


@pytest.mark.parametrize("name", ["all_gather_single", "all_gather_into_tensor"])
def test_the_flat_gather_has_either_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.delattr(dist, "all_gather_single", raising=False)
    monkeypatch.delattr(dist, "all_gather_into_tensor", raising=False)
    with pytest.raises(UnsupportedVersion, match=r"^torch \d.*'all_gather_into_tensor'"):
        compat.all_gather_flat(torch.zeros(2), torch.zeros(1))
    monkeypatch.setattr(dist, name, lambda gathered, own: called.append((len(gathered), len(own))), raising=False)
    compat.all_gather_flat(torch.zeros(2), torch.zeros(1))
    assert called == [(2, 1)]


@pytest.mark.parametrize("home", [dist, dist.distributed_c10d])
def test_the_timeout_of_a_group_is_set_by_either_name(home: object, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.delattr(dist, "set_timeout", raising=False)
    monkeypatch.delattr(dist.distributed_c10d, "_set_pg_timeout", raising=False)
    with pytest.raises(UnsupportedVersion, match="'_set_pg_timeout'"):
        compat.set_timeout("group", datetime.timedelta(minutes=1))
    name = "set_timeout" if home is dist else "_set_pg_timeout"
    monkeypatch.setattr(home, name, lambda *given: called.append(given), raising=False)
    compat.set_timeout("group", datetime.timedelta(minutes=1))
    assert called == [(datetime.timedelta(minutes=1), "group")]


def test_without_torchs_list_of_groups_no_group_is_left_unbounded_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(dist.distributed_c10d, "_world")
    with pytest.raises(UnsupportedVersion, match="distributed_c10d has no attribute '_world'"):
        compat.process_groups()
