"""Says of a path where no run is what is there, and what may be meant."""

from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.reading import files_in
from cmscale.runs.folder import RunDir

_MOST_NAMED = 3


def no_run(path: Path | str) -> UserError:
    """The error that no run is at a local path."""
    return UserError(f"{path}: {_what_is_there(Path(path))}")


def run_meant(path: Path | str) -> str:
    """What to add to a message that no run is at a path: that one of this name is among the runs."""
    among = Path("runs", path)
    return f"; did you mean {among}?" if not Path(path).exists() and is_run(among) else ""


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return RunDir(folder).config.is_file()


def named_runs(folder: Path) -> str:
    """The first runs in a folder, `a, b, c, ...`, but for those that may not be read; empty if it holds none."""
    found = [config.parent.name for config in files_in(folder, f"*/{RunDir(folder).config.name}")]
    return ", ".join(found[:_MOST_NAMED]) + (", ..." if len(found) > _MOST_NAMED else "")


def _what_is_there(path: Path) -> str:
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        whole = path.parent if is_run(path.parent) else "a run's folder"
        return f"not a run but a config; give {whole}, or use cmscale config diff for configs"
    if path.is_dir() and (named := named_runs(path)):
        return f"not a run but a folder of runs ({named}); give one of them"
    if inside := next((parent for parent in list(path.absolute().parents)[:3] if is_run(parent)), None):
        return f"not a run but in the run {inside}; give that"
    return f"not a run (no config.yaml){run_meant(path)}"
