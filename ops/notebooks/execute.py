"""Executes notebooks without Jupyter, and writes their outputs into them.

    python ops/notebooks/execute.py [--dry-run] FILE.ipynb ...

Cells are Python; a line that begins with `!` is a command of the shell, which must succeed. What a cell prints and the
value of its last expression become its outputs: images as PNG, all else as text. `--dry-run` writes nothing.

Start it in the checkout, or in any folder in it: the notebooks look for the checkout from there upwards.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

_MOST_CHARACTERS = 3000  # of one cell's text


def execute(path: Path) -> dict[str, Any]:
    """The notebook with the outputs of its cells, which are executed in order.

    Raises:
        Exception: what a cell raises.
        subprocess.CalledProcessError: a command failed.
    """
    notebook, names, count = json.loads(path.read_text()), {"__name__": "__main__"}, 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        count += 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            value = _run("".join(cell["source"]), names, label=f"{path.name}, cell {count}")
        cell["execution_count"] = count
        cell["outputs"] = _outputs(printed.getvalue(), value, count)
    return notebook


def _run(source: str, names: dict[str, Any], *, label: str) -> Any:
    """Runs a cell. Returns the value of its last expression; None if it ends otherwise."""
    names["_shell"] = _shell
    lines = [
        f"_shell({line[1:].strip()!r}, globals())" if line.startswith("!") else line for line in source.split("\n")
    ]
    tree = ast.parse("\n".join(lines), filename=label)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, label, "exec"), names)
    if last is None:
        return None
    assert isinstance(last, ast.Expr)
    return eval(compile(ast.Expression(last.value), label, "eval"), names)


def _shell(command: str, names: dict[str, Any]) -> None:
    """Runs a command, in which `{name}` is the value of a variable, and prints its output, as IPython does."""
    command = command.format_map({name: value for name, value in names.items() if isinstance(value, (str, int, Path))})
    done = subprocess.run(command, shell=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    print(done.stdout, end="")
    if done.returncode:
        print(done.stdout, end="", file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, command)


def _outputs(printed: str, value: Any, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if printed:
        text = printed
        if len(printed) > _MOST_CHARACTERS:  # whole lines from the first on, which may head a table
            begun = printed[:_MOST_CHARACTERS]
            text = f"{begun.rpartition(chr(10))[0] or begun}\n..."
        found.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None:
        data: dict[str, Any] = {"text/plain": [repr(value)[:_MOST_CHARACTERS]]}
        if isinstance(value, Image.Image):
            buffer = io.BytesIO()
            value.save(buffer, "PNG", optimize=True)
            data = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": ["<image>"]}
        found.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="execute.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.ipynb")
    parser.add_argument("--dry-run", action="store_true", help="execute, and write nothing")
    given = parser.parse_args(arguments)
    for file in given.files:
        executed = execute(file)
        if not given.dry_run:
            file.write_text(json.dumps(executed, indent=1, ensure_ascii=False) + "\n")
        print(f"{file}: executed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
