"""Files that an option names are refused if they are of another kind, and only then."""

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import small_config, small_model
from safetensors.torch import save_file

from cmscale.config import dump_config, parse_config
from cmscale.config.published import published
from cmscale.errors import UserError
from cmscale.runs.named_files import check_reference, check_weights_file


def test_weights_may_be_safetensors_where_these_are_read(tmp_path: Path) -> None:
    path = tmp_path / "vgg.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    check_weights_file(str(path), key="method.lpips_weights", safetensors=True)
    with pytest.raises(UserError, match=r"is no file of weights \(\.pth, \.pt\)"):
        check_weights_file(str(path), key="--features-weights")
    renamed = path.rename(tmp_path / "vgg.bin")
    with pytest.raises(UserError, match=r"is no file of weights \(\.pth, \.pt, \.safetensors\)"):
        check_weights_file(str(renamed), key="method.lpips_weights", safetensors=True)


def test_statistics_whose_archive_is_of_an_unknown_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=np.zeros(2))
    check_reference(str(path), key="--reference")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 0xFF  # the version that is needed to read it
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged, or not an \.npz of plain arrays"):
        check_reference(str(path), key="--reference")


def test_a_folder_that_has_by_chance_the_name_of_an_exported_models_data_is_no_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = small_config(small_model(), {"kind": "ct"})
    config = published(parse_config(dump_config(tree), [f"data.path={tmp_path}/train"]))
    for name in ("train", config.data.path):
        Path(name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"data\.path: \(elsewhere\)/train: .* name alone .*; give --reference"):
        check_reference(config.data.path, key="data.path", is_needed=False)
