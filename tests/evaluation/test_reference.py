"""Every reference format is read and written as its own programs do; measuring is one pass over blocks."""

import dataclasses
import os
import pickle
import pickletools
import sys
import zipfile

import numpy as np
import pytest
import torch
from evaluation_fixtures import build_cheap_features, write_dataset
from PIL import Image

import cmscale.evaluation.reference
from cmscale.errors import UserError
from cmscale.evaluation.blocks import BlockStore
from cmscale.evaluation.features.extractor import build_features
from cmscale.evaluation.measure import image_blocks, left_out, measure
from cmscale.evaluation.reference.adm import write_adm
from cmscale.evaluation.reference.edm import write_edm
from cmscale.evaluation.reference.edm2 import write_edm2
from cmscale.evaluation.reference.reference import reference_from_images, subset_indices
from cmscale.evaluation.reference.registry import read_reference, reference_formats, reference_writers
from cmscale.evaluation.sample_files import open_images
from cmscale.evaluation.session import load_reference
from cmscale.evaluation.statistics import Moments
from cmscale.runs.manifests import read_document
from cmscale.runs.named_files import check_reference
from cmscale.runs.results import EvaluationResult, Metric, combine
from data_prep.prepare import main as prepare
from data_prep.reference import main as command

EXTRACTOR = build_cheap_features()
IMAGES = np.random.default_rng(0).integers(0, 256, size=(140, 8, 8, 3), dtype=np.uint8)
POOLED = np.concatenate([found["pooled"] for _, found in image_blocks(IMAGES, EXTRACTOR)]).astype("f8")
MEAN, COVARIANCE = POOLED.mean(axis=0), np.cov(POOLED, rowvar=False)


@pytest.fixture
def reference():
    return reference_from_images(
        IMAGES, EXTRACTOR, name="images", count=140, preprocess="adm", encoding="png", subset=50
    )


def test_statistics_of_images_are_those_of_all_and_the_subset_a_fixed_draw(reference) -> None:
    np.testing.assert_allclose(reference.pooled.mean, MEAN, rtol=1e-12)
    np.testing.assert_allclose(reference.pooled.covariance, COVARIANCE, rtol=1e-9, atol=1e-12)
    chosen = subset_indices(140, 50)
    assert len(set(chosen)) == 50
    assert np.array_equal(reference.subset, POOLED[chosen].astype("f4"))
    assert (reference.count, reference.image_size) == (140, (8, 8))


def test_a_written_reference_reads_back_whole_and_adms_reader_understands_it(reference, tmp_path) -> None:
    path = tmp_path / "reference.npz"
    write_adm(path, reference, (IMAGES[i] for i in subset_indices(140, 50)))
    with np.load(path, allow_pickle=False) as archive:
        assert np.array_equal(archive["arr_0"], IMAGES[subset_indices(140, 50)])
        np.testing.assert_allclose(archive["mu"], MEAN, rtol=1e-12)
        assert archive["sigma"].shape == (16, 16)
    again = read_reference(path, EXTRACTOR)
    assert np.array_equal(again.pooled.covariance, reference.pooled.covariance)
    assert np.array_equal(again.subset, reference.subset)
    assert (again.count, again.preprocess, again.encoding, again.features) == (140, "adm", "png", "inception")
    assert list(tmp_path.iterdir()) == [path]


def test_adms_evaluator_finds_all_its_keys_and_can_stream_the_images(reference, tmp_path) -> None:
    """It reads mu, sigma, mu_s and sigma_s without pickle, and arr_0's rows behind a header of version 1.0."""
    spatial = Moments(MEAN[:7], COVARIANCE[:7, :7])
    whole = dataclasses.replace(reference, spatial=spatial)
    write_adm(tmp_path / "r.npz", whole, (IMAGES[i] for i in subset_indices(140, 50)))
    with np.load(tmp_path / "r.npz", allow_pickle=False) as archive:
        found = {key: archive[key] for key in archive.files}
    assert {found[key].dtype for key in ("mu", "sigma", "mu_s", "sigma_s")} == {np.dtype("f8")}
    assert [found[key].shape for key in ("mu", "sigma", "mu_s", "sigma_s")] == [(16,), (16, 16), (7,), (7, 7)]
    with zipfile.ZipFile(tmp_path / "r.npz").open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        assert (shape, fortran_order, dtype) == ((50, 8, 8, 3), False, np.uint8)
        assert file.read(192) == IMAGES[subset_indices(140, 50)[0]].tobytes()


@pytest.mark.parametrize("dtype", ["f2", "f8", "i4"])
def test_features_of_a_file_are_converted_to_float32_or_refused(reference, tmp_path, dtype: str) -> None:
    arrays = {"mu": MEAN, "sigma": COVARIANCE}
    np.savez(tmp_path / "r.npz", **arrays, features_0=np.ones((5, 16), dtype=dtype))
    found = read_reference(tmp_path / "r.npz", EXTRACTOR).subset
    assert found is not None
    assert found.dtype == np.float32
    np.savez(tmp_path / "words.npz", **arrays, features_0=np.full((5, 16), "a"))
    with pytest.raises(UserError, match="features_0 must be numbers"):
        read_reference(tmp_path / "words.npz", EXTRACTOR)


def test_edms_evaluator_finds_mean_and_covariance_and_nothing_else(reference, tmp_path) -> None:
    write_edm(tmp_path / "edm.npz", reference)
    with (tmp_path / "edm.npz").open("rb") as file:
        found = dict(np.load(file))
    assert {key: (value.dtype, value.shape) for key, value in found.items()} == {
        "mu": (np.dtype("f8"), (16,)),
        "sigma": (np.dtype("f8"), (16, 16)),
    }
    np.testing.assert_allclose(found["sigma"], COVARIANCE, rtol=1e-9, atol=1e-12)  # unbiased, as theirs
    assert np.array_equal(read_reference(tmp_path / "edm.npz", EXTRACTOR).pooled.covariance, found["sigma"])
    with pytest.raises(UserError, match="Inception statistics, not dinov2_vitl14"):
        write_edm(tmp_path / "edm.npz", dataclasses.replace(reference, features="dinov2_vitl14"))
    assert [path.name for path in tmp_path.iterdir()] == ["edm.npz"]


def test_edm2s_evaluator_finds_both_metrics_in_a_pickle_that_any_numpy_reads(reference, tmp_path) -> None:
    path = tmp_path / "edm2.pkl"
    write_edm2(path, reference)
    write_edm2(path, dataclasses.replace(reference, pooled=Moments(MEAN + 1, COVARIANCE), features="dinov2_vitl14"))
    found = pickle.loads(path.read_bytes())
    assert set(found) == {"num_images", "source", "fid", "fd_dinov2"}
    assert (type(found["num_images"]), found["num_images"]) == (int, 140)
    for key, mean in (("fid", MEAN), ("fd_dinov2", MEAN + 1)):
        assert (found[key]["mu"].dtype, found[key]["sigma"].dtype) == (np.dtype("f8"), np.dtype("f8"))
        np.testing.assert_allclose(found[key]["mu"], mean, rtol=1e-12)
        np.testing.assert_allclose(found[key]["sigma"], COVARIANCE, rtol=1e-9, atol=1e-12)
    names = [arg for opcode, arg, _ in pickletools.genops(path.read_bytes()) if opcode.name == "SHORT_BINUNICODE"]
    assert {name for name in names if "numpy" in name or "multiarray" in name} == {"numpy"}  # not numpy.(_)core
    again = read_reference(path, EXTRACTOR)
    assert np.array_equal(again.pooled.covariance, reference.pooled.covariance)
    assert again.count == 140
    assert list(tmp_path.iterdir()) == [path]


def test_an_edm2_file_of_other_images_or_other_features_is_not_written_over(reference, tmp_path) -> None:
    path = tmp_path / "edm2.pkl"
    write_edm2(path, reference)
    before = path.read_bytes()
    for changes, message in (
        ({"count": 139}, "of other images than these 139"),
        ({"name": "another data set of 140"}, "of other images than these 140"),
        ({"features": "efficientnet_lite0"}, "not efficientnet_lite0; use --format adm"),
    ):
        other = dataclasses.replace(reference, **changes)
        with pytest.raises(UserError, match=message):
            write_edm2(path, other)
        with pytest.raises(UserError, match=message):
            reference_writers()["edm2"].check(path, str(other.features), other.count, other.name)
    assert path.read_bytes() == before


def test_the_command_writes_edms_and_edm2s_formats(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "images").mkdir()
    for number, image in enumerate(IMAGES[:12]):
        Image.fromarray(image).save(tmp_path / "images" / f"{number:05d}.png")
    source = ["--source", f"folder:{tmp_path / 'images'}", "--format", "webdataset", "--image-size", "8"]
    dataset = str(tmp_path / "dataset")
    assert prepare([*source, "--encoding", "png", "--out", dataset]) == 0
    monkeypatch.setattr("cmscale.evaluation.features.extractor.build_features", lambda *_, **__: EXTRACTOR)
    ((_, features),) = image_blocks(IMAGES[:12], EXTRACTOR)
    pooled = features["pooled"].astype("f8")
    for format, name in (("edm", "edm.npz"), ("edm2", "edm2.pkl")):
        out = tmp_path / name
        capsys.readouterr()
        assert command([dataset, "--out", str(out), "--format", format, "--device", "cpu"]) == 0
        assert capsys.readouterr().out == f"{out}: 12 images of 8 px, inception\n"
        found = read_reference(out, EXTRACTOR).pooled
        np.testing.assert_allclose(found.mean, pooled.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(pooled, rowvar=False), rtol=1e-9, atol=1e-12)
    for wrong in (
        ["--format", "edm2", "--out", str(tmp_path / "x.npz")],
        ["--format", "edm", "--out", str(tmp_path / "x.npz"), "--features", "dinov2"],
        ["--format", "edm2", "--out", str(tmp_path / "x.pkl"), "--features", "efficientnet"],
    ):
        capsys.readouterr()
        assert command([dataset, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.long
def test_the_command_measures_a_prepared_data_set(tmp_path, capsys) -> None:
    (tmp_path / "images").mkdir()
    for number, image in enumerate(IMAGES[:12]):
        Image.fromarray(image).save(tmp_path / "images" / f"{number:05d}.png")
    dataset, out = tmp_path / "dataset", tmp_path / "reference.npz"
    source = ["--source", f"folder:{tmp_path / 'images'}", "--format", "mds", "--image-size", "8"]
    assert prepare([*source, "--encoding", "png", "--out", str(dataset)]) == 0
    arguments = ["--features", "efficientnet", "--device", "cpu", "--subset", "7", "--out", str(out)]
    assert command([str(dataset), *arguments]) == 0
    assert "12 images of 8 px, efficientnet_lite0, 7 kept as arr_0" in capsys.readouterr().out
    extractor = build_features("efficientnet")
    found = read_reference(out, extractor)
    assert (found.count, found.features) == (12, "efficientnet_lite0")
    assert (found.preprocess, found.encoding) == ("adm", "png")
    images = torch.from_numpy(IMAGES[:12]).permute(0, 3, 1, 2).contiguous()
    np.testing.assert_allclose(found.pooled.mean, extractor(images)["pooled"].mean(axis=0), rtol=1e-5, atol=1e-6)
    assert measure(image_blocks(IMAGES[:12], extractor), num_samples=12, reference=found)["fid"] < 1e-6
    assert command([str(tmp_path / "absent"), *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_adms_npz_gives_the_features_of_its_images(tmp_path) -> None:
    np.savez(
        tmp_path / "adm.npz",
        arr_0=IMAGES[:30],
        mu=MEAN,
        sigma=COVARIANCE,
        mu_s=MEAN[:4],
        sigma_s=COVARIANCE[:4, :4],
    )
    found = read_reference(tmp_path / "adm.npz", EXTRACTOR)
    np.testing.assert_allclose(found.subset, POOLED[:30], rtol=1e-6)
    assert found.spatial is not None
    assert found.spatial.width == 4
    assert found.describe()["subset"] == 30


def test_edms_npz_and_torch_fidelitys_cache_give_their_statistics(tmp_path) -> None:
    np.savez(tmp_path / "edm.npz", mu=MEAN, sigma=COVARIANCE)
    torch.save({"mu": MEAN.astype("f4"), "sigma": COVARIANCE}, tmp_path / "cache.pt")
    for name in ("edm.npz", "cache.pt"):
        found = read_reference(tmp_path / name, EXTRACTOR)
        np.testing.assert_allclose(found.pooled.mean, MEAN, rtol=1e-6)
        assert np.array_equal(found.pooled.covariance, COVARIANCE)
        assert found.subset is None


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_edm2s_pickle_gives_its_statistics(tmp_path, protocol: int) -> None:
    content = {
        "num_images": np.int64(140),
        "fid": {"mu": MEAN, "sigma": COVARIANCE},
        "fd_dinov2": {"mu": MEAN[:3]},
    }
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_reference(tmp_path / "edm2.pkl", EXTRACTOR)
    assert np.array_equal(found.pooled.mean, MEAN)
    assert found.count == 140


class _Malice:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pt"])
def test_nothing_in_a_pickle_is_executed(tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"fid": {"mu": MEAN, "sigma": _Malice()}, "mu": _Malice(), "sigma": COVARIANCE}
    if name.endswith(".pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(UserError):
        read_reference(tmp_path / name, EXTRACTOR)
    assert not (tmp_path / "executed").exists()


def test_a_reference_of_another_width_kind_or_format_is_refused_in_a_line(reference, tmp_path) -> None:
    np.savez(tmp_path / "wide.npz", mu=np.ones(17), sigma=np.eye(17))
    with pytest.raises(UserError, match="width 17, inception gives 16"):
        read_reference(tmp_path / "wide.npz", EXTRACTOR)
    np.savez(tmp_path / "other.npz", mu=MEAN, sigma=COVARIANCE, features=np.array("efficientnet_lite0"))
    with pytest.raises(UserError, match="holds efficientnet_lite0 features, the evaluation uses inception"):
        read_reference(tmp_path / "other.npz", EXTRACTOR)
    np.savez(tmp_path / "nan.npz", mu=MEAN * np.nan, sigma=COVARIANCE)
    with pytest.raises(UserError, match="NaN"):
        read_reference(tmp_path / "nan.npz", EXTRACTOR)
    np.savez(tmp_path / "objects.npz", mu=np.array([{}, 1], dtype=object), sigma=COVARIANCE)
    with pytest.raises(UserError, match="plain arrays"):
        read_reference(tmp_path / "objects.npz", EXTRACTOR)
    (tmp_path / "note.txt").write_text("no statistics")
    with pytest.raises(UserError, match=r"unknown format; known are: \.npz with mu and sigma, and images"):
        read_reference(tmp_path / "note.txt", EXTRACTOR)
    with pytest.raises(UserError, match="no such file"):
        read_reference(tmp_path / "absent.npz", EXTRACTOR)


def test_a_folder_and_an_npz_of_the_same_images_measure_alike(reference, tmp_path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(IMAGES[:70]):
        Image.fromarray(image).save(folder / f"{number:05d}.png")
    np.savez_compressed(tmp_path / "samples.npz", arr_0=IMAGES[:70])
    results = []
    for path in (folder, tmp_path / "samples.npz"):
        images = open_images(path)
        assert (images.count, images.height, images.width) == (70, 8, 8)
        results.append(measure(image_blocks(images.read(), EXTRACTOR), num_samples=70, reference=reference))
    assert results[0] == results[1]
    assert results[0]["precision"] > 0.8
    assert set(results[0]) >= {"fid", "kid", "inception_score", "precision", "recall", "density", "coverage"}
    assert "sfid" not in results[0]


def test_files_that_are_not_finished_samples_are_refused(tmp_path) -> None:
    np.savez(tmp_path / "float.npz", arr_0=IMAGES.astype("f4"))
    with pytest.raises(UserError, match="must be uint8"):
        open_images(tmp_path / "float.npz")
    np.savez(tmp_path / "none.npz", other=IMAGES)
    with pytest.raises(UserError, match="no arr_0"):
        open_images(tmp_path / "none.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images there"):
        open_images(tmp_path / "empty")
    (tmp_path / "mixed").mkdir()
    Image.fromarray(IMAGES[0]).save(tmp_path / "mixed" / "a.png")
    Image.fromarray(IMAGES[0][:4]).save(tmp_path / "mixed" / "b.png")
    with pytest.raises(UserError, match="different sizes"):
        open_images(tmp_path / "mixed")


def test_the_same_samples_measure_the_same_to_the_bit_from_any_number_of_ranks(reference, tmp_path) -> None:
    found = []
    for num_ranks in (1, 2, 3):
        store = BlockStore(tmp_path / str(num_ranks), identity={}, num_samples=140)
        todo = store.missing()
        for rank in reversed(range(num_ranks)):
            for block in todo[rank::num_ranks]:
                images = torch.from_numpy(IMAGES[block.start : block.stop]).permute(0, 3, 1, 2)
                store.commit(block, EXTRACTOR(images))
        found.append(measure(store.read(), num_samples=140, reference=reference))
    assert found[0] == found[1] == found[2]
    assert found[0]["fid"] < 1e-9 * np.trace(COVARIANCE)  # the reference's own images


def test_without_images_the_metrics_that_need_them_are_left_out_with_a_reason(tmp_path) -> None:
    np.savez(tmp_path / "edm.npz", mu=MEAN, sigma=COVARIANCE)
    reference = read_reference(tmp_path / "edm.npz", EXTRACTOR)
    found = measure(image_blocks(IMAGES[:20], EXTRACTOR), num_samples=20, reference=reference)
    assert set(found) == {"fid", "inception_score", "inception_score_split_std", "inception_score_adm"}
    assert any("KID, precision, recall" in line for line in left_out(found, reference=reference))


def test_fewer_than_two_samples_are_refused(reference) -> None:
    with pytest.raises(UserError, match="at least 2"):
        measure(image_blocks(IMAGES[:1], EXTRACTOR), num_samples=1, reference=reference)


def test_other_preprocessing_or_encoding_is_reported_and_so_is_what_could_not_be_compared(reference) -> None:
    assert reference.mismatches(preprocess="adm", encoding="png", size=(8, 8)) == []
    assert reference.mismatches(preprocess="edm", encoding="jpeg", size=(8, 8)) == [
        "reference and training data differ in preprocessing: adm against edm",
        "reference and training data differ in encoding: png against jpeg",
    ]
    assert reference.mismatches(preprocess=None, encoding=None, size=(8, 8), of="samples") == [
        "preprocessing and encoding of reference and samples could not be compared: not known of the samples"
    ]
    turned = dataclasses.replace(reference, exif="apply")
    assert turned.mismatches(preprocess="adm", encoding="png", size=(8, 8), exif="apply") == []
    assert turned.mismatches(preprocess="adm", encoding="png", size=(8, 8)) == []
    assert turned.mismatches(preprocess="adm", encoding="png", size=(8, 8), exif="ignore") == [
        "reference and training data differ in what was done with EXIF orientations: apply against ignore"
    ]
    silent = dataclasses.replace(reference, preprocess=None, encoding=None, image_size=None)
    lines = silent.mismatches(preprocess="adm", encoding=None, size=(8, 8), of="samples")
    compared = "of reference and samples could not be compared: not known of"
    assert lines == [
        f"preprocessing and image size {compared} the reference",
        f"encoding {compared} the reference and the samples",
    ]


WIDE = np.random.default_rng(1).integers(0, 256, size=(20, 32, 48, 3), dtype=np.uint8)


def test_both_sides_of_images_are_compared_whatever_the_reference_is(reference, tmp_path) -> None:
    """Images of 32 x 48 pixels (height first): a folder, an `.npz`, statistics that this program and ADM's write."""
    wide = reference_from_images(WIDE, EXTRACTOR, name="wide", count=20, subset=9)
    write_adm(tmp_path / "ours.npz", wide, (WIDE[i] for i in subset_indices(20, 9)))
    write_adm(tmp_path / "bare.npz", dataclasses.replace(wide, subset=None), ())
    np.savez(tmp_path / "theirs.npz", arr_0=WIDE, mu=MEAN, sigma=COVARIANCE)
    np.savez(tmp_path / "images.npz", arr_0=WIDE)
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(WIDE):
        Image.fromarray(image).save(tmp_path / "folder" / f"{number}.png")
    for name in ("ours.npz", "bare.npz", "theirs.npz", "images.npz", "folder"):
        found = read_reference(tmp_path / name, EXTRACTOR)
        assert found.describe()["image_size"] == [32, 48], name
        found.refuse_other_size((32, 48), of="the samples")
        for other in ((48, 32), (32, 32), (48, 48)):
            with pytest.raises(
                UserError, match=rf"of 32 x 48 px \(height x width\), the model has {other[0]} x {other[1]}"
            ):
                found.refuse_other_size(other, of="the model")
    turned = reference_from_images(WIDE.reshape(20, 48, 32, 3), EXTRACTOR, name="turned", count=20, subset=9)
    assert turned.sha256 != wide.sha256  # the same bytes
    np.savez(tmp_path / "old.npz", mu=MEAN, sigma=COVARIANCE, image_size=np.array(256))  # as 0.1.0 wrote it
    assert read_reference(tmp_path / "old.npz", EXTRACTOR).image_size == (256, 256)
    for size in (np.array([1, 2, 3]), np.array(8.5), np.array("8"), np.array(0)):
        np.savez(tmp_path / "odd.npz", mu=MEAN, sigma=COVARIANCE, image_size=size)
        with pytest.raises(UserError, match="image_size must be"):
            read_reference(tmp_path / "odd.npz", EXTRACTOR)
    np.savez(tmp_path / "odd.npz", arr_0=WIDE, mu=MEAN, sigma=COVARIANCE, image_size=np.array(32))
    with pytest.raises(UserError, match="arr_0 holds images of 32 x 48 px, unlike its image_size"):
        read_reference(tmp_path / "odd.npz", EXTRACTOR)


def test_a_result_holds_each_metric_in_three_parts_and_reads_back(reference) -> None:
    sets = [
        measure(image_blocks(IMAGES[at : at + 40], EXTRACTOR), num_samples=40, reference=reference)
        for at in (0, 40, 80)
    ]
    result = EvaluationResult(
        step=500,
        weights="ema_0.9999432",
        nfe=1,
        num_samples=40,
        seeds=(0, 1, 2),
        features="inception",
        score_name="FID",
        reference=reference.describe(),
        seconds=1.5,
        metrics=combine(sets),
    )
    assert read_document(EvaluationResult, result.to_bytes(), origin="test") == result
    assert result.fid.values == tuple(found["fid"] for found in sets)
    assert result.fid.std == pytest.approx(np.std(result.fid.values, ddof=1))
    assert Metric.of([3.0]) == Metric(mean=3.0, std=0.0, values=(3.0,))


TOY = """
import json
from pathlib import Path

import numpy as np

from cmscale.evaluation.reference.reference import reference_from_arrays
from cmscale.evaluation.reference.registry import ReferenceFormat, ReferenceWriter


def write(path, reference, images):
    path.write_text(json.dumps({"mu": reference.pooled.mean.tolist(), "sigma": reference.pooled.covariance.tolist()}))


FORMAT = ReferenceFormat(
    description=".json with mu and sigma",
    suffixes=(".json",),
    matches=lambda _: True,
    read=lambda path, extractor: reference_from_arrays(path, json.loads(path.read_text()), extractor),
    writer=ReferenceWriter(suffix=".json", write=write),
)
"""


def test_a_format_in_a_new_file_is_read_and_written_by_the_commands(tmp_path, monkeypatch, capsys) -> None:
    package = cmscale.evaluation.reference
    (tmp_path / "formats").mkdir()
    (tmp_path / "formats" / "plain.py").write_text(TOY)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / "formats")])
    monkeypatch.setattr("cmscale.evaluation.features.extractor.build_features", lambda *_, **__: EXTRACTOR)
    dataset = write_dataset(tmp_path, count=12)
    out = tmp_path / "reference.json"
    try:
        assert command([str(dataset), "--out", str(out), "--format", "plain", "--device", "cpu"]) == 0
        assert capsys.readouterr().out.endswith("12 images of 8 px, inception\n")
        check_reference(str(out), key="--reference")
        assert load_reference(str(out), EXTRACTOR).pooled.width == 16
        (tmp_path / "formats" / "empty.py").write_text("")
        with pytest.raises(TypeError, match=r"reference\.empty: defines no FORMAT"):
            reference_formats()
    finally:
        for name in ("plain", "empty"):
            if sys.modules.pop(f"{package.__name__}.{name}", None):
                delattr(package, name)


def test_exactly_one_format_matches_each_kind_of_file(reference, tmp_path) -> None:
    write_adm(tmp_path / "adm.npz", reference, (IMAGES[i] for i in subset_indices(140, 50)))
    write_adm(tmp_path / "no_images.npz", dataclasses.replace(reference, subset=None), ())
    write_edm(tmp_path / "edm.npz", reference)
    write_edm2(tmp_path / "edm2.pkl", reference)
    np.savez(tmp_path / "images.npz", arr_0=IMAGES[:9])
    torch.save({"mu": MEAN, "sigma": COVARIANCE}, tmp_path / "torch_fidelity.pt")
    found = {
        path.name: [
            name for name, each in reference_formats().items() if path.suffix in each.suffixes and each.matches(path)
        ]
        for path in tmp_path.iterdir()
    }
    assert found == {
        "adm.npz": ["adm"],
        "no_images.npz": ["adm"],
        "edm.npz": ["edm"],
        "edm2.pkl": ["edm2"],
        "images.npz": ["images"],
        "torch_fidelity.pt": ["torch_fidelity"],
    }
    assert all(read_reference(path, EXTRACTOR).pooled.width == 16 for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["edm.npz", "adm.npz", "edm2.pkl", "torch_fidelity.pt"])
def test_a_matrix_that_is_no_covariance_is_refused_in_every_format(tmp_path, name: str) -> None:
    upper = np.triu(COVARIANCE)
    for matrix, said in ((upper, "not symmetric"), (-COVARIANCE, "not positive"), (COVARIANCE * np.inf, "infinity")):
        statistics = {"mu": MEAN, "sigma": matrix}
        if name.endswith(".npz"):
            np.savez(tmp_path / name, **statistics, **({"arr_0": IMAGES[:9]} if name == "adm.npz" else {}))
        elif name.endswith(".pkl"):
            (tmp_path / name).write_bytes(pickle.dumps({"fid": statistics}))
        else:
            torch.save(statistics, tmp_path / name)
        with pytest.raises(UserError, match=f"mu and sigma: .*{said}"):
            read_reference(tmp_path / name, EXTRACTOR)
    np.savez(tmp_path / "s.npz", mu=MEAN, sigma=COVARIANCE, mu_s=MEAN[:4], sigma_s=-COVARIANCE[:4, :4])
    with pytest.raises(UserError, match=r"mu_s and sigma_s: .*not positive"):
        read_reference(tmp_path / "s.npz", EXTRACTOR)
