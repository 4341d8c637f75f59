"""Copies of the code: what they hold, which revision they name, and what is refused."""

import json
import os
import py_compile
import subprocess
from pathlib import Path

import pytest

from cmscale.errors import UserError
from cmscale.runs import snapshot
from cmscale.runs.snapshot import CHANGES, ORIGIN, read_code, take_snapshot


def git(folder: Path, *arguments: str) -> str:
    names = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **names}).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of two packages, all committed."""
    folder = tmp_path / "checkout"
    for name, text in {
        "cmscale/errors.py": "VALUE = 1\n",
        "cmscale/report/page.html.j2": "<p>",
        "launchers/job.py": "import os\n",
        "pyproject.toml": "[project]\n",
        "README.md": "none of the code\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(tmp_path, "init", "-q", str(folder))
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    for junk in ("cmscale/.errors.py.swp", "cmscale/__pycache__/old.pyc", "cmscale/report/.cache/page"):
        (folder / junk).parent.mkdir(exist_ok=True)
        (folder / junk).write_text("junk")
    return folder


def test_a_copy_holds_the_code_as_it_is_and_what_git_says_of_it(checkout: Path, tmp_path: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD").strip()
    clean = read_code(checkout)
    assert (clean.revision, clean.diff, clean.untracked) == (commit, "", ())
    assert sorted(clean.files) == [
        "cmscale/errors.py",
        "cmscale/report/page.html.j2",
        "launchers/job.py",
        "pyproject.toml",
    ]
    (checkout / "cmscale" / "errors.py").write_text("VALUE = 2\n")
    (checkout / "cmscale" / "mine.py").write_text("x\n")
    dirty = read_code(checkout)
    assert (dirty.revision, dirty.untracked) == (f"{commit}-dirty", ("cmscale/mine.py",))
    assert "+VALUE = 2" in dirty.diff
    assert dirty.name != clean.name
    copy = take_snapshot(dirty, tmp_path / "code")
    (checkout / "cmscale" / "errors.py").write_text("VALUE = 3\n")
    assert (copy / "cmscale" / "errors.py").read_text() == "VALUE = 2\n"
    assert (copy / CHANGES).read_text() == dirty.diff
    assert json.loads((copy / ORIGIN).read_text()) == dirty.origin
    again = read_code(copy)  # as its job and the evaluations beside it read it
    assert (again.name, again.origin, again.diff) == (dirty.name, dirty.origin, dirty.diff)
    assert take_snapshot(again, tmp_path / "code") == copy
    assert [path.name for path in (tmp_path / "code").iterdir()] == [dirty.name]


def test_an_untracked_module_alone_makes_a_checkout_dirty_and_other_files_do_not(checkout: Path) -> None:
    (checkout / "notes.txt").write_text("x")
    assert not (read_code(checkout).revision or "").endswith("-dirty")
    (checkout / "launchers" / "new.py").write_text("x")
    assert (read_code(checkout).revision or "").endswith("-dirty")


def test_without_a_checkout_of_its_own_there_is_no_revision(checkout: Path, tmp_path: Path) -> None:
    installed = checkout / ".venv" / "site-packages"  # inside of somebody's checkout, which does not track it
    (checkout / ".gitignore").write_text(".venv\n")
    (installed / "cmscale").mkdir(parents=True)
    (installed / "cmscale" / "errors.py").write_text("")
    code = read_code(installed)
    assert (code.revision, code.name[:6]) == (None, "no-git")
    assert (take_snapshot(code, tmp_path / "code") / "cmscale" / "errors.py").exists()


def test_a_copy_that_was_changed_is_seen(checkout: Path, tmp_path: Path) -> None:
    code = read_code(checkout)
    copy = take_snapshot(code, tmp_path)
    (copy / "cmscale" / "errors.py").write_text("VALUE = 9\n")
    assert read_code(copy).revision == f"{code.revision}-edited"
    with pytest.raises(UserError, match="was changed since the code was copied there"):
        take_snapshot(code, tmp_path)


def test_packages_that_hold_more_than_code_are_refused(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_LARGEST", 100)
    (checkout / "cmscale" / "weights.bin").write_bytes(bytes(101))
    with pytest.raises(UserError, match=r"weights\.bin: the packages hold more than"):
        read_code(checkout)


def test_links_are_followed_once(checkout: Path) -> None:
    (checkout / "elsewhere").mkdir()
    (checkout / "elsewhere" / "plugin.py").write_text("x")
    (checkout / "cmscale" / "linked").symlink_to(checkout / "elsewhere")
    (checkout / "elsewhere" / "around").symlink_to(checkout / "cmscale")
    (checkout / "cmscale" / "gone.py").symlink_to("nowhere.py")
    assert "cmscale/linked/plugin.py" in read_code(checkout).files


def test_compiled_modules_are_taken_along_where_they_are_current(checkout: Path, tmp_path: Path) -> None:
    compiled = Path(py_compile.compile(str(checkout / "cmscale" / "errors.py")) or "")
    copy = take_snapshot(read_code(checkout), tmp_path / "one") / "cmscale" / "__pycache__" / compiled.name
    assert copy.read_bytes() == compiled.read_bytes()
    (checkout / "cmscale" / "errors.py").write_text("VALUE = 12345\n")
    later = take_snapshot(read_code(checkout), tmp_path / "two")
    assert not (later / "cmscale" / "__pycache__").exists()
