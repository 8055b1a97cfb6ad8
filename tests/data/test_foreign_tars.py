"""Tars of others: captions in .txt and under other names, and numbers that only `lightning pack` is believed."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, SHARED, see
from test_foreign import written
from test_pack import VIDEO, samples, tar
from test_segments import film

from data.buckets import split_into
from data.clip import Clip
from data.datasets import ClipDataset, References, captions
from data.encoded.cuts import CutClips, Stretches
from data.pack.probe import probe
from data.rejected import Rejected
from data.selection import Selection
from data.shards.index import index_path
from data.shards.reader import Shards
from data.shards.records import FORMAT, MEASURED, MEASURED_BY
from data.shards.writer import write_shard
from lightning_semgen.commands.pack import pack as pack_videos
from lightning_semgen.errors import UserError
from lightning_semgen.evaluation.adherence import Adherence, directions_of

MEASURES = probe(VIDEO)  # of a video of 2.04 s at 24 fps
SMALL = Clip(5, 16, 16, 24.0, 24.0)


def shards_of(folder: Path, **members: bytes | dict) -> Shards:
    """A tar of samples a, b, …: `a_json` is its JSON, `a_txt` its text."""
    contents = {name.replace("_", "."): content for name, content in members.items()}
    contents = {name: json.dumps(c).encode() if isinstance(c, dict) else c for name, c in contents.items()}
    return Shards(str(tar(folder / "s.tar", contents)))


def told(shards: Shards) -> dict[str, str]:
    clips = ClipDataset(shards, SMALL)
    return {clips[place]["sample"]: clips[place]["caption"] for place in range(len(clips))}


def test_captions_of_foreign_tars_are_read(tmp_path):
    record = {"prompt": "from JSON", "duration": 4000, "fps": "25/1"}
    videos = {f"{key}_mp4": VIDEO for key in "abcde"}
    texts = {"a_txt": b"from a text\n", "b_json": record, "c_json": record, "c_txt": b"not this", "d_txt": b" "}
    shards = shards_of(tmp_path, **videos, **texts, e_json={"key": "1", "caption": None}, e_TXT=b"from a text, too")
    wanted = {"a": "from a text", "b": "from JSON", "c": "from JSON", "e": "from a text, too"}
    assert told(shards) == wanted and shards.uncaptioned == 1
    assert [info["caption"] for info in captions(shards)] == list(wanted.values())


def test_fit_reads_a_foreign_tar(tmp_path, monkeypatch, lightning, shards):
    see(shards, tmp_path)
    monkeypatch.chdir(tmp_path)
    ours = Shards(str(shards / "shards/toy/heldout-000000.tar"))
    contents = {}
    for place in range(8):
        members = ours.read(place)
        contents |= {f"{place}.mp4": members["mp4"], f"{place}.txt": json.loads(members["json"])["caption"].encode()}
        contents[f"{place}.json"] = b'{"duration": NaN, "fps": Infinity, "status": "success", "directions": 4}'
    tar(tmp_path / "foreign/train-0.tar", contents)
    data = ["--data.train_shards=foreign/*.tar", "--data.val_shards=foreign/*.tar"]
    lightning("fit", "-c", str(CONFIGS / "dim8.yaml"), *data, "--model.compressor_steps=1", "--trainer.max_steps=2")
    assert list(tmp_path.glob("runs/**/last.ckpt"))


def test_a_tar_without_captions_is_told_with_what_was_seen(tmp_path):
    with pytest.raises(UserError, match=r"None of the 1 samples .*KEY.txt.*a.mp4, a.json with description, id"):
        shards_of(tmp_path, a_mp4=VIDEO, a_json={"description": "x", "id": 3})


def test_a_text_over_the_limit_is_a_rejected_sample(tmp_path):
    shards = shards_of(tmp_path, a_mp4=VIDEO, a_txt=b"x" * (2**24 + 1), b_mp4=VIDEO, b_txt=b"x")
    assert shards.problems == {0: "a TXT of more than 16 MB"}


def test_an_old_index_is_made_again(tmp_path):
    path = shards_of(tmp_path, a_mp4=VIDEO, a_txt=b"x").paths[0]
    index = json.loads(index_path(path).read_text())
    assert index["format"] == FORMAT
    for old in ({}, {"format": FORMAT - 1}):
        rows = [row | {"caption": False} for row in index["samples"]]
        index_path(path).write_text(json.dumps({"shard": index["shard"], "samples": rows} | old))
        assert len(Shards(str(path))) == 1 and json.loads(index_path(path).read_text()) == index


# Numbers


LIES = [
    {"duration": 4000.0, "fps": 24.0},  # of the film that the clip is from
    {"duration": 2042, "fps": 24},  # milliseconds
    {"duration": "2.042", "fps": "24"},
    {"duration": True, "fps": True},
    *({"duration": number, "fps": 24.0} for number in (float("nan"), float("inf"), -3.0, 1e300, 10**400, None, [2])),
    *({"duration": 2.042, "fps": number} for number in (float("nan"), float("inf"), -24.0, 0.001, 1e300)),
    MEASURES | {"duration": 4000.0},
    MEASURES | {"size": 7},  # of another file
    MEASURES | MEASURED_BY | {"duration": float("inf")},
    MEASURES | MEASURED_BY | {"duration": 4000.0, "size": 7},  # made smaller since it was packed
]


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_numbers_of_others_are_not_believed(tmp_path, lie):
    shards = shards_of(tmp_path, a_mp4=VIDEO, a_json={"caption": "c"} | lie)
    assert not set(index_rows(shards)[0]) & set(MEASURED)
    clips = ClipDataset(shards, SMALL, selection=Selection(min_duration=2.0, min_fps=23.0))
    assert {len(clips.sample(0, key)["frames"]) for key in range(20)} == {5}
    assert clips.selection.room(VIDEO, lie, SMALL) == clips.selection.room(VIDEO, {}, SMALL) > 40
    stretch = Stretches(clips, 2.0)[0]
    assert stretch["starts"][-1] + SMALL.duration < 2.042


def index_rows(shards: Shards) -> list[dict]:
    return [row for path in shards.paths for row in Shards.rows(path)]


@pytest.mark.parametrize("mark", [{}, MEASURED_BY], ids=["format 1", "marked"])
def test_numbers_of_pack_are_believed(tmp_path, mark):
    shards = shards_of(tmp_path, a_mp4=VIDEO, a_json={"caption": "c"} | MEASURES | mark)
    assert {name: index_rows(shards)[0][name] for name in MEASURED} == MEASURES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.selection.declared", lambda video: pytest.fail("the container was read"))
        assert Selection().room(VIDEO, MEASURES | mark, SMALL) > 40


def test_what_pack_writes_is_marked_and_has_no_nan(tmp_path):
    record = {"caption": "c", "duration": float("nan"), "score": float("inf"), "segment": [float("nan"), 3]}
    tar(tmp_path / "old/s.tar", {"a.mp4": VIDEO, "a.json": json.dumps(record).encode()})
    pack_videos(tmp_path / "old", tmp_path / "out", workers=0)
    (info,) = samples(tmp_path / "out").values()
    assert info["measured_by"] == f"lightning pack {FORMAT}" and info["duration"] == 2.042 and info["score"] is None
    assert not any(word in path.read_bytes() for path in (tmp_path / "out").iterdir() for word in (b"NaN", b"Infinity"))
    with pytest.raises(ValueError):
        write_shard(tmp_path / "nan.tar", [{"__key__": "a", "json": {"score": float("nan")}}])


def test_segments_of_others_are_not_believed(tmp_path):
    for name, record in (("foreign", {"segment": [100, 200]}), ("ours", probe(film(130)) | {"segment": [100, 200]})):
        tar(tmp_path / name / "s.tar", {"a.mp4": film(130), "a.json": json.dumps(record).encode()})
        pack_videos(tmp_path / name, tmp_path / f"{name}_out", segment_seconds=2, workers=0)
    begins = {n: [i["segment"][0] for i in samples(tmp_path / f"{n}_out").values()] for n in ("foreign", "ours")}
    assert begins == {"foreign": [0, 2, 4], "ours": [100, 102, 104]}


def test_buckets_look_at_a_video_whose_numbers_are_not_believed(tmp_path):
    records = {"a_json": {"caption": "c"} | MEASURES, "b_json": {"caption": "c"} | MEASURES | {"duration": 0.01}}
    shards = shards_of(tmp_path, a_mp4=VIDEO, b_mp4=VIDEO, c_mp4=b"broken", **records, c_txt=b"c")
    (bucket,) = split_into([SMALL], ClipDataset(shards, SMALL))
    assert [key for _, key, _ in bucket.shards.samples] == ["a", "b", "c"]
    with pytest.raises(UserError, match="does not say how long"):
        split_into([SMALL], ClipDataset(shards_of(tmp_path, b_mp4=VIDEO, b_json=records["b_json"]), SMALL))


def test_directions_of_others_are_not_counted():
    ours = {"colour": "red", "shape": "bar"}
    for told in (4, "left", ["north"], [3], None, [["left"]]):
        assert directions_of({"directions": told}) == [] == directions_of({"direction": [told]})
    metric = Adherence()
    film = torch.zeros(1, 9, 3, 48, 48, dtype=torch.uint8)
    for info in (ours | {"directions": 4}, ours | {"direction": 3.5}, {"colour": [1], "shape": 2, "direction": "left"}):
        metric.update(film, [info])
    assert not metric.count
    metric.update(film, [ours | {"direction": "left"}])
    assert metric.count == 1


@pytest.mark.skipif(not (SHARED / "cases/base.mp4").exists(), reason="the shared cases are not there")
@pytest.mark.parametrize("how", ["open_sora.csv", "metadata.jsonl", "metadata.csv", "t.tsv", "t.json", "tar"])
def test_shared_cases_have_their_captions_found(tmp_path, how):
    video, source = (SHARED / "cases/base.mp4").read_bytes(), tmp_path / "in" / how
    source.parent.mkdir()
    if how == "tar":
        members = {"v.mp4": video, "v.txt": b"a test picture", "v.json": b'{"duration": 4000, "fps": 24}'}
        source = tar(tmp_path / "in/s.tar", members)
        assert told(Shards(str(source))) == {"v": "a test picture"}
    else:
        (source.parent / "v.mp4").write_bytes(video)
        names = ("path", "text") if how == "open_sora.csv" else ("file_name", "text")
        written(source, [{names[0]: "v.mp4", names[1]: "a test picture", "num_frames": "96"}])
        source = source.parent if how.startswith("metadata") else source
    pack_videos(source, tmp_path / "out", workers=0)
    assert told(Shards(str(tmp_path / "out/*.tar"))) == {"v": "a test picture"}
    (info,) = samples(tmp_path / "out").values()
    assert info["duration"] == pytest.approx(4, abs=0.05) and info["fps"] == pytest.approx(24, abs=0.1)


@pytest.mark.parametrize("starts", [{}, {"starts": []}, {"starts": 3}, {"starts": "0123"}], ids=str)
def test_a_stretch_without_starts_is_rejected(tmp_path, starts):
    shards = shards_of(tmp_path, a_json={"caption": "c"} | starts)
    with pytest.raises(Rejected, match="no starts"):
        CutClips(shards, SMALL, Selection(), {}).sample(0, 1)


def test_a_container_that_lasts_for_years_is_rejected(monkeypatch):
    monkeypatch.setattr("data.selection.declared", lambda video: {"duration": 1e300, "fps": 24.0})
    with pytest.raises(Rejected, match="lasts for years"):
        Selection().begin(VIDEO, {}, SMALL, 1)


def test_a_reference_with_several_captions_has_the_first(tmp_path):
    (tmp_path / "a.mp4").write_bytes(VIDEO)
    (tmp_path / "a.json").write_text('{"captions": ["one", "two"]}')
    assert [row["caption"] for row in References(tmp_path, SMALL, None, 0)] == ["one"]
