"""Options that have no effect are refused, at their default value too; an option without a rule can't be declared."""

from typing import Annotated

import pytest
import typer

from cmscale.cli.command import COMMANDS, command
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
        (
            ["sea", "--water", "3", "--size=2", "--water=4"],
            "--water: given twice, as '3' and as '4'; the last one does not override the others: give it once",
        ),
        (["sea", "--oil", "--oil"], "--oil: given twice; the last one does not override the others: give it once"),
        (["sea", "a.b=1", "--oil", "a.b=2"], "a.b: given twice, as '1' and as '2'; the last one does not override"),
        (["sea", "--sand"], "unrecognized arguments: --sand (see paint.py --help)"),
        ([], "the following arguments are required: picture"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str) -> None:
    with pytest.raises(UserError) as refused:
        a_parser().read(arguments)
    assert str(refused.value).startswith(line)


def test_a_parser_reads_command_lines_one_after_the_other() -> None:
    parser = a_parser()
    assert [parser.read(["sea", "--water", text])[0].water for text in ("3", "4")] == [3, 4]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--size", "3", "--size=4"], "--size: given twice, as '3' and as '4'; the last one does not override"),
        (["--size=3", "--dry", "--size=3"], "--size: given twice, as '3' and as '3'; the last one does not override"),
        (["--dry", "--no-dry"], "--dry/--no-dry: given twice; the last one does not override the others"),
        (["--layer", "a", "--layer", "b", "x=1", "x=2", "--dry"], None),
        (["a.b=1", "a.c=1", "--dry", "a.b=2"], "a.b: given twice, as '1' and as '2'; the last one does not override"),
    ],
)
def test_an_option_of_a_command_is_given_once_unless_it_takes_several_values(
    arguments: list[str], line: str | None
) -> None:
    app, seen = typer.Typer(), []

    def paint(
        words: Annotated[list[str] | None, typer.Argument(), USED] = None,
        layer: Annotated[list[str] | None, typer.Option(help="May be repeated."), USED] = None,
        size: Annotated[int, typer.Option(), USED] = 1,
        dry: Annotated[bool, typer.Option("--dry/--no-dry"), USED] = False,
    ) -> None:
        seen.append((words, layer, size, dry))

    command(app)(paint)
    del COMMANDS["paint"]
    program = typer.main.get_command(app)
    if line is None:
        program.main(arguments, standalone_mode=False)
        assert seen == [(["x=1", "x=2"], ["a", "b"], 1, True)]
        return
    with pytest.raises(UserError) as refused:
        program.main(arguments, standalone_mode=False)
    assert str(refused.value).startswith(line)
    assert not seen


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
