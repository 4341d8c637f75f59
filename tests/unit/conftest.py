"""Owns the data sets that several data tests read."""

from pathlib import Path

import pytest
from data_fixtures import COUNT, FORMATS, make, pictures, write_lmdb


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lmdb(tmp_path_factory.mktemp("lsun") / "photo_train_lmdb", pictures(COUNT))


@pytest.fixture(scope="session")
def sets(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    return {format: make(source, str(folder / format), format) for format in FORMATS}
