"""How a rank ends: at once, and without folders in TMPDIR that nobody removes."""

import os
import subprocess
import sys
from pathlib import Path

_ENDS = """
import sys, tempfile, threading, time
from cmscale.io.process import exit_at_once
kept = tempfile.TemporaryDirectory("wandb-media")
of_an_export = tempfile.TemporaryDirectory(dir=sys.argv[1])
print(kept.name)
threading.Thread(target=time.sleep, args=(600,)).start()
exit_at_once(3)
"""


def test_what_libraries_keep_in_tmpdir_until_python_ends_is_removed_at_once_too(tmp_path: Path) -> None:
    """wandb makes two folders when it is imported; a node would have two more with every start."""
    own, elsewhere = tmp_path / "own", tmp_path / "elsewhere"
    own.mkdir()
    elsewhere.mkdir()
    environment = {**os.environ, "TMPDIR": str(own)}
    ended = subprocess.run(
        [sys.executable, "-c", _ENDS, elsewhere],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 3, ended.stderr
    assert Path(ended.stdout.strip()).parent == own
    assert list(own.iterdir()) == []
    assert len(list(elsewhere.iterdir())) == 1  # where storage may hang, which must not delay the end
