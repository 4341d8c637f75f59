"""The rank function of the preflight tests: runs the preflight and prints how it ended."""

import json
import os
from pathlib import Path

from small import joined, small_config

from cmscale.runs.folder import RunDir
from cmscale.training import preflight


def look(folder: str) -> None:
    """Runs the preflight three times: without fault, with another torch on rank 1, with a wrong sum on rank 1."""
    world = joined()
    os.environ["SLURMD_NODENAME"] = f"node{world.rank + 1}"
    preflight.PEERS_SECONDS = 0.05
    original = preflight.versions

    def other_torch(config: object, *, with_source: bool) -> dict[str, str]:
        found = original(config, with_source=with_source)  # pyright: ignore[reportArgumentType]
        return found | ({"torch": "1.0"} if world.rank == 1 else {"torch": "2.0"})

    def wrong_sum(run: RunDir, own: object) -> None:
        preflight_collective(run, own)
        if world.rank == 1:
            raise RuntimeError("the sum of 1 over 2 ranks is 1.5")

    preflight_collective = preflight.check_collective
    ends = []
    for name, value in (("versions", original), ("versions", other_torch), ("check_collective", wrong_sum)):
        before = getattr(preflight, name)
        setattr(preflight, name, value)
        try:
            preflight.check(small_config(), RunDir(Path(folder)), world)
            ends.append("well")
        except preflight.PreflightFailed as error:
            ends.append(str(error))
        setattr(preflight, name, before)
    print(json.dumps(ends))
