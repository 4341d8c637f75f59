"""A set of samples is complete or not there, continues with what is missing, and belongs to one command at a time."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmscale.config.draw_request import format_of
from cmscale.distributed.world import World
from cmscale.errors import UserError
from cmscale.evaluation.sample_files import open_images
from cmscale.generation.sample_set import Making, opened
from cmscale.generation.set_files import sample_name, write_pictures
from cmscale.io.place import Place
from cmscale.runs.sample_sets import Format, place_of_seed, set_place, stored_parts

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)


def making(place: object, *, format: Format = "npz", key: str = "k", **more: Any):
    kind = {"machine": {"device": "cpu"}, "count": len(PIXELS), "part_size": 4, "world": World()}
    return opened(set_place(Place(str(place)), format), key=key, **{**kind, **more})


def draw(opened_set: Making, *, parts: int = 9) -> list[range]:
    drawn = opened_set.missing()[:parts]
    for part in drawn:
        opened_set.commit(part, PIXELS[part.start : part.stop])
    return drawn


def written(place: Path, **how: Any) -> None:
    with making(place, **how) as each:
        draw(each)
        each.finish({})


@pytest.mark.parametrize("name", ["samples", "ema_0.9999", "v1.2", "a.foo/", "run-2026.01.02", "there.foo", ".hidden"])
def test_folders_may_have_dots_in_their_names(name: str, tmp_path: Path) -> None:
    (tmp_path / "there.foo").mkdir()
    assert format_of(Place(f"{tmp_path}/{name}"), None, option="--out") == "png"


@pytest.mark.parametrize("name", ["a.foo", "samples.mp3", "s3://bucket/a.npy", "x.NPZ2"])
def test_a_name_with_the_ending_of_an_unknown_file_is_no_folder(name: str) -> None:
    with pytest.raises(UserError, match=r"--out .*: the file's name must end in \.npz, or name a folder"):
        format_of(Place(name), None, option="--out")


def test_a_name_that_leaves_no_room_for_the_record_is_refused_before_samples_are_drawn(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--out .*\.npz\.json: .*File name too long"):
        set_place(Place(tmp_path / f"{'n' * 240}.npz"), "npz").check("--out")


@pytest.mark.parametrize("format", ["npz", "png", "tar"])
def test_an_interrupted_set_goes_on_with_what_is_missing(format: Format, tmp_path: Path) -> None:
    place = tmp_path / ("x.npz" if format == "npz" else "x")
    with making(place, format=format) as each:
        assert draw(each, parts=2) == [range(4), range(4, 8)]
    assert not place.exists()
    assert stored_parts([set_place(Place(str(place)), format)]) == 2
    with making(place, format=format) as each:
        assert draw(each) == [range(8, 10)]
        record = each.finish({"seed": 0})
    assert (record.count, record.image_size, record.protocol) == (10, 4, {"seed": 0})
    assert not Path(f"{place}.parts").exists()
    with making(place, format=format) as each:
        assert each.known == record


def test_pictures_that_are_not_all_there_are_not_measured(tmp_path: Path) -> None:
    place = tmp_path / "x"
    with making(place, format="png") as each:
        draw(each)
        write_pictures(each.place.folder, each._parts.rows, range(4), threads=1)  # and is killed
    with pytest.raises(UserError, match="x: is not drawn to its end"):
        open_images(place)
    with making(place, format="png") as each:
        each.finish({})
    assert open_images(place).count == 10
    (place / sample_name(3)).unlink()
    with pytest.raises(UserError, match=r"holds 9 images, its samples\.json says 10; draw the samples again"):
        open_images(place)


def test_a_folder_of_several_seeds_is_measured_when_all_are_whole(tmp_path: Path) -> None:
    written(tmp_path / "seed0", format="png")
    with making(tmp_path / "seed1", format="png") as each:
        draw(each, parts=1)
        with pytest.raises(UserError, match="seed1: is not drawn to its end"):
            open_images(tmp_path)
        draw(each)
        each.finish({})
    assert open_images(tmp_path).count == 20
    (tmp_path / "seed0" / sample_name(3)).unlink()
    with pytest.raises(UserError, match=r"seed0: holds 9 images, its samples\.json says 10"):
        open_images(tmp_path)


@pytest.mark.parametrize("format", ["npz", "png"])
@pytest.mark.parametrize("content", ['{"samples": [{"filepath": "a.png"}]}', '{"sha256": "'])
def test_a_record_that_is_none_may_be_removed(content: str, format: Format, tmp_path: Path) -> None:
    place = tmp_path / ("x.npz" if format == "npz" else "x")
    written(place, format=format)
    record = set_place(Place(str(place)), format).record
    Path(record).write_text(content)
    words = rf"{record}: not a valid .*: if it is damaged or of another program, remove it"
    with pytest.raises(UserError, match=words), making(place, format=format):
        pass
    if format == "png" and content.startswith('{"sha256"'):
        for folder in (place, tmp_path):
            with pytest.raises(UserError, match=words):
                open_images(folder)
    elif format == "png":
        assert open_images(place).count == 10  # a folder of images beside which another program wrote


@pytest.mark.parametrize("key", ["k", "other"])
def test_parts_that_a_killed_command_left_after_the_record_are_removed(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr("cmscale.generation.parts.Parts.remove", lambda _: None)
        written(tmp_path / "x.npz")
    assert (tmp_path / "x.npz.parts").exists()
    with making(tmp_path / "x.npz", key=key) as each:
        assert (each.known is None) == (key == "other")
        assert stored_parts([each.place]) == 0


def test_an_array_is_replaced_by_another_one_and_recognised_by_its_content(tmp_path: Path) -> None:
    place = tmp_path / "x.npz"
    written(place)
    written(place, key="other")
    with making(place) as each:
        assert each.known is None
    written(place)
    np.savez(place, arr_0=PIXELS)  # by another program: the record beside it is of another file
    with making(place) as each:
        assert each.known is None


def test_a_second_command_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    with making(tmp_path / "x.npz") as first:
        draw(first)
        with pytest.raises(UserError, match=r"x\.npz: process \d+ on .* works on it"), making(tmp_path / "x.npz"):
            pass
        first.finish({})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz", "x.npz.json"]


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("parts", "parts of other samples, which another command began"),
        ("set", "holds other samples; give another place, or remove the folder"),
        ("file", "is not empty; give another place, or empty it"),
    ],
)
def test_other_samples_and_files_are_not_mixed_with(before: str, words: str, tmp_path: Path) -> None:
    place = tmp_path / "x"
    if before == "parts":
        with making(place, format="png", key="other") as each:
            draw(each, parts=1)
    if before == "set":
        written(place, format="png", key="other")
    if before == "file":
        place.mkdir()
        (place / "photo.png").touch()
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=words), making(place, format="png"):
        pass
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == left


def test_parts_of_another_kind_of_machine_are_drawn_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with making(tmp_path / "x.npz") as each:
        draw(each, parts=2)
    with making(tmp_path / "x.npz", machine={"device": "H200"}) as each:
        assert len(each.missing()) == 3
    assert "begun on another kind of machine; drawn anew" in capsys.readouterr().err


def test_a_command_that_was_taken_over_publishes_nothing(tmp_path: Path) -> None:
    with ExitStack() as stack:
        each = stack.enter_context(making(tmp_path / "x.npz"))
        draw(each)
        owners = tmp_path / "x.npz.parts" / "owners"
        (owners / "owner-000002.json").write_bytes(
            (owners / "owner-000001.json").read_bytes().replace(b'"token": "', b'"token": "0')
        )
        with pytest.raises(UserError, match="has taken over; this command ends and publishes nothing"):
            each.finish({})
    assert not (tmp_path / "x.npz").exists()


def test_the_sets_of_several_seeds_have_places_of_their_own() -> None:
    assert place_of_seed(Place("a.b/x.npz"), 3, 1) == "a.b/x.npz"
    assert place_of_seed(Place("a.b/x.npz"), 3, 2) == "a.b/x-seed3.npz"
    assert place_of_seed(Place("s3://b/grid.png"), 3, 2) == "s3://b/grid-seed3.png"
    assert place_of_seed(Place("a.b/set"), 3, 2) == "a.b/set/seed3"


def test_a_set_may_be_drawn_into_the_folder_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    written(Path(), format="png")
    for place in (".", "./"):
        with making(place, format="png") as each:
            assert each.known is not None
    assert len(list((tmp_path / "here").glob("*.png"))) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
