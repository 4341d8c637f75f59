"""Reads options under the names that they had in earlier releases, with a notice.

One idea has one name in all commands: `--samples` a number of images, `--checkpoint` a run's checkpoint, `--steps` the
steps of a sampler, `--sampling-times` its noise levels, `--time` a time limit, `--weights` weights of a network by
their name, `--features-weights` the file of a feature network.
"""

import sys
from collections.abc import Collection, Sequence

from cmscale.errors import UserError

FORMER = {
    "--num": "--samples",
    "--count": "--samples",
    "--limit": "--samples",
    "--images": "--samples",
    "--folder": "--out",
    "--step": "--checkpoint",
    "--times": "--sampling-times",
    "--weights": "--features-weights",
}
"""Former name -> the current one, where a command has the current one and no option of the former name."""


def with_current_names(arguments: Sequence[str], known: Collection[str]) -> list[str]:
    """The words of a command line with former names of options replaced; one line on stderr says so.

    Args:
        known: The options of the command.

    Raises:
        UserError: an option is given under both of its names.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    given = {word.partition("=")[0] for word in arguments[:end]}
    found = {}
    current = list(arguments)
    for index, word in enumerate(arguments[:end]):
        name, equals, value = word.partition("=")
        if name not in known and FORMER.get(name) in known:
            if FORMER[name] in given:
                raise UserError(f"{name}: is the former name of {FORMER[name]}, which is given too; leave out {name}")
            found[name] = FORMER[name]
            current[index] = f"{FORMER[name]}{equals}{value}"
    if found:
        named = ", ".join(f"{old} is now {new}" for old, new in found.items())
        print(f"notice: {named}; write that", file=sys.stderr)
    return current
