"""Options that have no effect are refused, at their default value too; an option without a rule can't be declared."""

from typing import Annotated

import pytest
import typer

from cmscale.cli.command import command
from cmscale.commands.parser import CommandParser, whole_number
from cmscale.commands.use import USED, Given, Use
from cmscale.errors import UserError


def a_parser() -> CommandParser:
    parser = CommandParser(prog="paint.py")
    parser.add("picture", use=USED)
    parser.add("layers", use=Use(needs=("oil",)), nargs="*", metavar="LAYER")
    parser.add("--oil", use=USED, action="store_true", help="oil")
    parser.add("--water", use=Use(excludes=("oil",)), type=whole_number(0), default=3)
    parser.add("--size", use=Use(canvas=("linen", "wood")), type=whole_number(1), default=8)
    return parser


def test_an_option_counts_as_given_at_its_default_value_and_only_then() -> None:
    values, given = a_parser().read(["sea"])
    assert (list(given), values.water, values.size, values.oil) == (["picture"], 3, 8, False)
    values, given = a_parser().read(["sea", "--size", "8", "--water=3"])
    assert (sorted(given), values.water, values.size) == (["picture", "size", "water"], 3, 8)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["sea", "--oil", "--water", "3"], "--water: has no effect beside --oil; leave out one of them"),
        (["sea", "blue"], "blue: has no effect without --oil; leave it out"),
        (["sea", "--water", "-1"], "argument --water: got '-1'; it should be a whole number of at least 0"),
        (["sea", "--water", "٣"], "argument --water: got '٣'; it should be a whole number of at least 0"),
        (["sea", "--sand"], "unrecognized arguments: --sand (see paint.py --help)"),
        ([], "the following arguments are required: picture"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str) -> None:
    with pytest.raises(UserError) as refused:
        a_parser().read(arguments)
    assert str(refused.value).startswith(line)


def test_a_rule_about_the_situation_is_checked_when_the_situation_is_known() -> None:
    _, given = a_parser().read(["sea", "--size", "8"])
    given.refuse_unused(season="winter")
    given.refuse_unused(canvas="wood")
    with pytest.raises(UserError, match="--size: has no effect on paper, only on linen or wood; leave it out"):
        given.refuse_unused(canvas="paper")
    Given({"size": Use(canvas=("wood",))}, {"size": "--size"}, []).refuse_unused(canvas="paper")


def test_an_option_without_a_rule_can_not_be_declared() -> None:
    with pytest.raises(TypeError, match="use"):
        CommandParser(prog="paint.py").add("--frame")  # pyright: ignore[reportCallIssue]

    def paint(frame: Annotated[int, typer.Option()] = 1) -> None: ...

    with pytest.raises(TypeError, match=r"paint: frame needs .* a Use"):
        command(typer.Typer())(paint)
