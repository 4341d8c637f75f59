"""Commands on configs: `config explain`, `config diff`, `schema`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from cmscale.cli.command import TableConsole, command
from cmscale.cli.json_output import print_json
from cmscale.cli.options import JsonOption
from cmscale.commands.use import USED
from cmscale.errors import UserError
from cmscale.io.place import Place

app = typer.Typer()
config_app = typer.Typer(help="Explains the keys of configs, and compares configs.")
app.add_typer(config_app, name="config")


def _completed(incomplete: str) -> list[str]:
    """The keys and sections that begin so, for the shell."""
    from cmscale.config.keys import known_keys, sections

    return sorted(name for name in {*sections(), *known_keys()} if name.startswith(incomplete))


@command(config_app, group="config")
def explain(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY]...", help="A key (train.seed or seed), or a section.", autocompletion=_completed),
        USED,
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Explains keys: effect, unit, values, default, source. Without KEY: sections."""
    from cmscale.config.keys import all_keys, sections

    if not names:
        if as_json:
            print_json(sections())
            return
        _print_pairs(sections().items())
        return
    found = [key for name in names for key in _named(name)]
    if as_json:
        print_json([_as_json(key) for key in dict.fromkeys(found)])
        return
    if len(names) == 1 and names[0] in sections():
        keys = [key for key in all_keys() if key.name.startswith(f"{names[0]}.")]
        _print_pairs((_with_kinds(key), key.description) for key in keys)
        return
    print("\n\n".join(_in_full(key) for key in dict.fromkeys(found)))


def _named(name: str) -> list[Any]:
    """The keys that a user names: by their dotted name, by the leaf alone, or by their section."""
    from cmscale.config.keys import MAPPINGS, all_keys, sections
    from cmscale.config.mistakes import suggestion
    from cmscale.config.renamed import RENAMED

    wanted = RENAMED.get(name, name).partition("=")[0]
    wanted = next((mapping for mapping in MAPPINGS if wanted.startswith(f"{mapping}.")), wanted)
    found = [key for key in all_keys() if key.name == wanted]
    if not found and wanted in sections():
        found = [key for key in all_keys() if key.name.startswith(f"{wanted}.")]
    if not found:
        found = [key for key in all_keys() if key.name.partition(".")[2] == wanted]
    if not found:
        raise UserError(f"{name}: no such key or section{suggestion(wanted)}")
    return found


def _with_kinds(key: Any) -> str:
    return f"{key.name} ({', '.join(key.kinds)})" if key.kinds else key.name


def _default(key: Any) -> str:
    from cmscale.config.keys import written

    return "none: it must be given" if key.is_required else written(key.default)


def _in_full(key: Any) -> str:
    losses = "it changes the losses: a resumed run keeps its value" if key.changes_losses else "may change at a resume"
    rows = [
        ("unit", key.unit),
        ("allowed", key.allowed),
        ("default", _default(key)),
        ("source", key.source),
        ("effect", losses),
    ]
    lines = [_with_kinds(key), f"  {key.description}", *(f"  {name:8} {value}" for name, value in rows if value)]
    return "\n".join(lines)


def _as_json(key: Any) -> dict[str, Any]:
    content = dataclasses.asdict(key)
    if key.is_required:
        del content["default"]
    return content | {"required": key.is_required}


def _print_pairs(pairs: Any) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in pairs:
        table.add_row(name, text)
    TableConsole().print(table)


@command(config_app, group="config")
def diff(
    configs: Annotated[
        list[Place],
        typer.Argument(metavar="A B", help="Config files, runs, checkpoints, exported files or model cards."),
        USED,
    ],
    as_json: JsonOption = False,
) -> None:
    """Shows in which keys configs differ. Those that change the losses come first."""
    from cmscale.config.compare import compared
    from cmscale.runs.configs import config_of

    if len(configs) < 2:
        raise UserError(f"{configs[0]}: is one config; give two or more to compare")
    found = compared([config_of(place) for place in configs])
    if as_json:
        print_json([dataclasses.asdict(each) for each in found])
        return
    if not found:
        print("no difference")
        return
    print_differences(found, names=[str(place) for place in configs])


def print_differences(found: Any, *, names: Sequence[str]) -> None:
    """Prints differences in two tables: those that change the losses, and the others."""
    from cmscale.config.keys import written

    console = TableConsole()
    tables = []
    for changes, title in ((True, "changes the losses"), (False, "does not change the losses")):
        rows = [each for each in found if each.changes_losses == changes]
        if not rows:
            continue
        table = Table(box=None)
        table.add_column(title, no_wrap=True)
        for name in names:
            table.add_column(name, overflow="fold")
        for each in rows:
            table.add_row(each.key, *(written(value) for value in each.values))
        tables.append(table)
    for number, table in enumerate(tables):
        if number:
            console.print()
        console.print(table)


@command(app)
def schema() -> None:
    """Prints the JSON Schema of a config file, for editors."""
    from cmscale.config import json_schema

    print_json(json_schema())
