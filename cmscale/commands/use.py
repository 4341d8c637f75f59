"""States where each option of a command is used. An option that is given where it is not used is refused.

Every option carries a `Use` beside its declaration; the builders of command lines refuse to build without one.

    USED                                      wherever it is given
    Use(task=("inpaint",))                    only where the aspect `task` of the situation is `inpaint`
    Use(needs=("slurm",))                     only together with --slurm
    Use(excludes=("times",))                  not beside --sampling-times, which decides the same

A command states its situation as soon as it knows it: `given.refuse_unused(task=task, source=kind)`. The values are
the words of the messages. An option counts as given at its default value too, if it is on the command line.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from cmscale.errors import UserError

_KEY = re.compile(r"\w+(\.[\w-]+)+")  # of a config: `train.seed`


class Use:
    """Where an option is used.

    Attributes:
        aspects: The values that an aspect of the situation must have, by aspect.
        needs: Options without which it has no effect.
        excludes: Options beside which it has no effect.
    """

    def __init__(
        self, *, needs: tuple[str, ...] = (), excludes: tuple[str, ...] = (), **aspects: tuple[str, ...]
    ) -> None:
        self.needs = needs
        self.excludes = excludes
        self.aspects = aspects

    def why_unused(self, situation: Mapping[str, str]) -> str | None:
        """Why the option has no effect in a situation; None if it has one, as far as the situation is known."""
        for aspect, values in self.aspects.items():
            actual = situation.get(aspect)
            if actual is not None and actual not in values:
                return f"has no effect on {actual}, only on {' or '.join(values)}"
        return None


USED = Use()
"""The option is used wherever it is given."""


def refuse_empty(flag: str, value: object) -> None:
    """Refuses an empty text, which would count as no value: the script that calls a command left a variable unset.

    Raises:
        UserError: the value is one.
    """
    if value == "":
        raise UserError(f"{flag}: got an empty text; give a value, or leave the option out")


def given_twice(flag: str, values: Sequence[str] = ()) -> UserError:
    """The error of an option that is given more than once: only one of its values could count.

    Args:
        values: What was given, in order; nothing for a switch.
    """
    told = "".join(f"{', as ' if not index else ' and as '}{value!r}" for index, value in enumerate(values[:2]))
    return UserError(f"{flag}: given twice{told}; the last one does not override the others: give it once")


def refuse_repeated(words: Iterable[str]) -> None:
    """Refuses a key of the config that is given twice among a command's arguments; names of files are no keys.

    Raises:
        UserError: only one of its values could count.
    """
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and _KEY.fullmatch(key) and not Path(word).exists():
            if key in values:
                raise given_twice(key, [values[key], value])
            values[key] = value


class Given:
    """The options on a command line.

    Args:
        uses: The `Use` of every option of the command, by its name.
        flags: What a user calls each of them, by name: `--batch-size`.
        given: The names of the options that were given.
    """

    def __init__(self, uses: Mapping[str, Use], flags: Mapping[str, str], given: Iterable[str]) -> None:
        self._uses = {name: uses[name] for name in given}
        self._flags = flags

    def __contains__(self, name: str) -> bool:
        return name in self._uses

    def __iter__(self) -> Iterator[str]:
        return iter(self._uses)

    def refuse_unused(self, **situation: str) -> None:
        """Refuses options that have no effect: beside the other options, and in this situation.

        Args:
            situation: Values by aspect. Rules about other aspects are left to a later call.

        Raises:
            UserError: the first such option, and where it would be used.
        """
        for name, use in self._uses.items():
            flag = self._flags[name]
            for other in use.needs:
                if other not in self:
                    raise UserError(f"{flag}: has no effect without {self._flags[other]}; leave it out")
            for other in use.excludes:
                if other in self:
                    raise UserError(f"{flag}: has no effect beside {self._flags[other]}; leave out one of them")
            if why := use.why_unused(situation):
                raise UserError(f"{flag}: {why}; leave it out")
