"""The rank function of the tests of waiting together: rank 1 is held up through several looks, then fails."""

import json
import threading

from small import joined

from cmscale.distributed import collectives


def wait() -> None:
    """Prints what each of three calls returned or raised, and how many looks the first took on this rank."""
    world = joined()
    looks, enough = [], threading.Event()
    look = collectives.any_rank

    def looking(flag: bool) -> bool:
        looks.append(flag)
        waits = look(flag)
        if len(looks) == 4:
            enough.set()
        return waits

    def held_up() -> str:
        if world.rank == 1:
            assert enough.wait(120)  # the other rank has taken part in four looks, too
        return f"rank {world.rank}"

    def failing() -> None:
        if world.rank == 1:
            raise ValueError("of rank 1")

    collectives.LOOK_SECONDS = 0.05
    collectives.any_rank = looking
    ends = [collectives.together(held_up), len(looks), looks[0]]
    try:
        collectives.together(failing)
    except ValueError as error:
        ends.append(str(error))
    ends.append(collectives.together(lambda: "goes on"))
    print(json.dumps(ends))
