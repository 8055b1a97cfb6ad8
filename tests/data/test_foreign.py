"""Tables and sidecars of others, with captions under their names; nothing of them is lost without a word."""

import csv
import io
import json
import sys
import warnings
from pathlib import Path

import pytest
from test_pack import VIDEO, samples, table

from data.pack.sources import find_videos
from data.shards.records import merged, plain, with_caption
from lightning_semgen.commands.pack import pack as pack_videos
from lightning_semgen.errors import UserError


@pytest.fixture
def videos(tmp_path) -> Path:
    """Two videos that nothing is said of."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / name).write_bytes(VIDEO)
    return folder


def written(path: Path, rows: list[dict]) -> Path:
    """A table in the form that its name says."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        table(path, *rows)
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue(), encoding="utf-8-sig")
    return path


def captions_of(source: Path) -> dict[str, str | list | None]:
    """By name; whatever is said in a warning fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {video.name: video.info.get("caption") for video in find_videos(source)}


WANTED = {"a.mp4": "a red disc, still", "b.mp4": "a bar"}
NAMES = [
    ("path", "text"),  # Open-Sora
    ("video", "prompt"),  # CogVideoX, DiffSynth
    ("file_name", "text"),  # the Hub
    ("video_path", "caption"),
    ("File", "Caption"),
    (" PATH", "TEXT "),
]


def rows_of(video: str, caption: str) -> list[dict]:
    return [{video: name, caption: text, "num_frames": 49} for name, text in WANTED.items()]


@pytest.mark.parametrize("form", ["csv", "tsv", "json", "jsonl"])
@pytest.mark.parametrize(("video", "caption"), NAMES)
def test_tables_of_others_have_their_captions_found(videos, form, video, caption):
    path = written(videos / f"train.{form}", rows_of(video, caption))
    assert captions_of(path) == WANTED
    assert {found.info["num_frames"] for found in find_videos(path)} <= {49, "49"}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "captions.tsv", "captions.json", "metadata.tsv"])
def test_a_folder_has_its_table_read(videos, name):
    written(videos / name, rows_of("file_name", "text"))
    assert captions_of(videos) == WANTED


def test_a_table_in_a_subfolder_names_what_lies_there(videos, tmp_path):
    written(videos / "metadata.csv", rows_of("file_name", "text"))
    assert captions_of(tmp_path) == {f"videos/{name}": text for name, text in WANTED.items()}


def test_several_captions_are_a_list(videos):
    rows = [{"path": "a.mp4", "captions": ["one", "two"]}, {"path": "b.mp4", "captions": ["three"]}]
    wanted = {"a.mp4": ["one", "two"], "b.mp4": ["three"]}
    assert captions_of(written(videos / "t.jsonl", rows)) == wanted
    texts = [row | {"captions": json.dumps(row["captions"])} for row in rows]
    assert captions_of(written(videos / "t.csv", texts)) == wanted


def test_the_captions_are_in_the_shards(videos, tmp_path):
    pack_videos(written(videos / "t.csv", rows_of("path", "text")), tmp_path / "out", workers=0)
    infos = samples(tmp_path / "out")
    assert {info["path"]: info["caption"] for info in infos.values()} == WANTED
    assert not any("text" in info for info in infos.values())


def test_a_caption_beside_the_video_fills_the_gap_of_a_table(videos):
    (videos / "a.txt").write_text("from a text")
    written(videos / "captions.csv", [{"path": "a.mp4", "caption": "", "id": 7}, {"path": "b.mp4", "caption": "c"}])
    assert captions_of(videos) == {"a.mp4": "from a text", "b.mp4": "c"}
    assert find_videos(videos)[0].info["id"] == "7"


def test_parquet_is_read(videos):
    path = videos / "t.parquet"
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet as files

    columns = {"file_name": list(WANTED), "text": list(WANTED.values()), "raw": [b"x", b"y"]}
    files.write_table(pyarrow.table(columns | {"score": [float("nan"), 1.0]}), path)
    assert captions_of(path) == WANTED
    assert [video.info["score"] for video in find_videos(path)] == [None, 1.0]


def test_parquet_without_pyarrow_is_one_sentence(videos, monkeypatch):
    (videos / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="t.parquet is read by pyarrow, which is not installed: `pip install pyarrow`"):
        find_videos(videos / "t.parquet")


def test_a_table_without_captions_is_told_with_what_was_seen(videos):
    rows = [{"path": "a.mp4", "description": "a red disc"}, {"path": "b.mp4", "description": "a bar"}]
    with pytest.warns(UserWarning, match="No row of .*t.csv has a caption.*path, description.*a red disc") as told:
        find_videos(written(videos / "t.csv", rows))
    assert len(told) == 1


def test_a_table_without_paths_is_told_with_what_was_seen(videos):
    with pytest.raises(UserError, match="t.csv, line 2: there is no path.*columns are videoid, name.*a red disc"):
        find_videos(written(videos / "t.csv", [{"videoid": 7, "name": "a red disc"}]))
    (videos / "void.csv").write_text("path,caption\n")
    with pytest.raises(UserError, match="There are no rows in .*void.csv"):
        find_videos(videos / "void.csv")
    (videos / "t.json").write_text('{"a.mp4": "a red disc"}')
    with pytest.raises(UserError, match="t.json is not a list of rows: its keys are a.mp4"):
        find_videos(videos / "t.json")


def test_missing_files_are_counted_and_the_first_is_named(videos):
    rows = [{"path": f"{name}.mp4", "text": "c"} for name in ("a", "gone", "lost")]
    with pytest.warns(UserWarning, match="2 of the 3 videos that .*t.csv names are missing, the first is gone.mp4"):
        assert len(find_videos(written(videos / "t.csv", rows))) == 3


def test_videos_that_no_row_names_are_told(videos):
    written(videos / "metadata.csv", [{"file_name": "a.mp4", "text": "c"}])
    with pytest.warns(UserWarning, match="1 videos of .* have no caption, and no row of .*metadata.csv.*b.mp4"):
        find_videos(videos)


def test_a_table_that_is_not_read_is_told(videos):
    written(videos / "openvid.csv", rows_of("video", "caption"))
    with pytest.warns(UserWarning, match="2 videos of .* no caption, and .*openvid.csv is not read: .*captions.csv"):
        find_videos(videos)


def test_sidecars_of_others_have_their_captions_found(videos):
    (videos / "a.json").write_text('{"Text": "a red disc, still", "fps": NaN}')
    (videos / "b.json").write_text('{"prompt": "", "captions": ["a bar"]}')
    assert captions_of(videos) == {"a.mp4": "a red disc, still", "b.mp4": ["a bar"]}


def test_names_of_captions():
    assert with_caption({"caption": "a", "text": "b"}) == {"caption": "a", "text": "b"}
    assert with_caption({"caption": None, "prompt": "b", "text": 3}) == {"text": 3, "caption": "b"}
    assert with_caption({"text": "half a letter \ud800"}) == {"text": "half a letter \ud800"}
    assert merged(b"txt", b'{"text": "json"}') == {"caption": "json"}
    assert merged(b"txt", b'{"text": " "}') == {"text": " ", "caption": "txt"}
    assert merged(b"txt", b"[" * 100_000) is None
    assert plain({"a": [float("inf"), True, 2, b"x"], 3: Path("p")}) == {"a": [None, True, 2, None], "3": "p"}
