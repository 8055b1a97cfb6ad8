"""`lightning pack`: what a user's folder or table becomes, what is left out and why, and going on after a kill."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import CLIP, CONFIGS, SHARED
from test_segments import film

from data.clip import Clip
from data.codec.mp4 import write_mp4
from data.datasets import ClipDataset
from data.pack.sources import find_videos, unique_keys
from data.shards.index import MEASURED, read_index
from data.shards.reader import Shards
from lightning_semgen.commands.pack import pack as pack_videos
from lightning_semgen.errors import UserError

CLIPS = Path(os.environ.get("SEMGEN_CLIPS", SHARED / "clips"))


def mp4(frames: int = 49, side: int = 48) -> bytes:
    """Noise, so that a clip of 128 pixels has some 200 kB."""
    buffer = io.BytesIO()
    write_mp4(np.random.default_rng(0).integers(0, 256, (frames, 3, side, side), np.uint8), buffer)
    return buffer.getvalue()


VIDEO = mp4()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five videos, three with captions in as many ways, and two files that are none."""
    source = tmp_path / "videos"
    for name in ("a.mp4", "sub/a.MP4", "clip.1.mp4", "clip_1.mov", "mute.mkv"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(VIDEO)
    (source / "a.txt").write_text("from a text\n")
    (source / "a.json").write_text('{"place": "here"}')
    (source / "sub/a.json").write_text('{"caption": "from a record", "fps": "guessed"}')
    (source / "captions.jsonl").write_text('{"file": "./clip.1.mp4", "caption": "from a table", "label": 3}\n')
    (source / "empty.mp4").touch()
    (source / "half.mp4").write_bytes(VIDEO[: len(VIDEO) // 2])
    return source


def samples(out: Path, pattern: str = "*.tar") -> dict[str, dict]:
    """The JSON of each sample, by key."""
    infos = {}
    for shard in sorted(out.glob(pattern)):
        with tarfile.open(shard) as tar:
            records = [name for name in tar.getnames() if name.endswith(".json")]
            infos |= {name.removesuffix(".json"): json.load(tar.extractfile(name)) for name in records}
    return infos


def rejected(out: Path) -> dict[str, str]:
    return {row["path"]: row["cause"] for row in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())}


def content(out: Path) -> dict[str, bytes | list]:
    """All that packing wrote, without the times of the shards."""
    return {
        path.name: json.loads(path.read_text())["samples"] if path.name.endswith(".index.json") else path.read_bytes()
        for path in out.iterdir()
    }


def tar(path: Path, members: dict[str, bytes]) -> Path:
    """A shard as others write them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            shard.addfile(entry, io.BytesIO(data))
    return path


def table(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_becomes_shards_that_fit_reads(folder, tmp_path, lightning, capsys):
    out = tmp_path / "shards/mine"
    lightning("pack", str(folder), str(out), small=False)
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert said[:2] == [["packed", "5", "0.00", "h"], ["without", "a", "caption", "2"]]
    assert said[2] == ["rejected", "2", str(out / "rejected.jsonl")] and ["empty", "file", "1"] in said[3:]
    infos = samples(out)
    assert set(infos) == {"a", "sub/a", "clip_1", "clip_1-2", "mute"}
    assert infos["a"]["caption"] == "from a text" and infos["a"]["place"] == "here"
    assert infos["clip_1"]["label"] == 3 and infos["clip_1"]["path"] == "clip.1.mp4"
    assert "caption" not in infos["mute"] and infos["sub/a"]["fps"] == 24
    (row,) = [row for row in read_index(out / "train-000000.tar") if row["key"] == "sub/a"]
    assert [row[name] for name in MEASURED] == [2.042, 48, 48, 24.0, 0, "h264", 49, len(VIDEO)]
    assert rejected(out).keys() == {"empty.mp4", "half.mp4"} and rejected(out)["empty.mp4"] == "empty file"
    shards = Shards(str(out / "*.tar"))
    assert len(shards) == 3 and shards.uncaptioned == 2
    read = {ClipDataset(shards, CLIP)[index]["caption"] for index in range(3)}
    assert read == {"from a text", "from a record", "from a table"}
    assert shards.read(0)["mp4"] == VIDEO


def test_a_table_alone_says_what_is_packed(folder, tmp_path):
    rows = [{"path": "videos/a.mp4", "caption": "one, two", "label": "x"}, {"path": "videos/gone.mp4", "caption": "c"}]
    table(tmp_path / "t.jsonl", *rows)
    (tmp_path / "t.csv").write_text(
        'caption,file,label\n"one, two",videos/a.mp4,x\nc,videos/gone.mp4,\nd,videos/a.txt,'
    )
    pack_videos(tmp_path / "t.jsonl", tmp_path / "one", workers=0)
    pack_videos(tmp_path / "t.csv", tmp_path / "two", workers=0)
    assert samples(tmp_path / "one") == samples(tmp_path / "two")
    assert samples(tmp_path / "one")["videos/a"]["label"] == "x"
    assert rejected(tmp_path / "one") == {"videos/gone.mp4": "no such file"}
    assert rejected(tmp_path / "two")["videos/a.txt"] == "unknown extension: .txt"


def test_a_broken_sidecar_is_named(folder, tmp_path):
    (folder / "mute.json").write_text("[1]")
    (folder / "a.txt").write_bytes(b"caf\xe9")
    pack_videos(folder, tmp_path / "out", workers=0)
    causes = rejected(tmp_path / "out")
    assert causes["mute.mkv"] == causes["a.mp4"] == "its .json or .txt is not readable"


def test_shards_have_a_size_and_a_split_that_stays(tmp_path):
    source = tmp_path / "videos"
    source.mkdir()
    video = mp4(30, 128)
    for number in range(20):
        (source / f"{number}.mp4").write_bytes(video)
    pack_videos(source, tmp_path / "one", shard_size=1, val_share=0.3, workers=0)
    train = sorted((tmp_path / "one").glob("train-*.tar"))
    assert len(train) > 2 and all(abs(path.stat().st_size - 1e6) < len(video) for path in train[:-1])
    held_out = samples(tmp_path / "one", "val-*.tar").keys()
    assert 1 <= len(held_out) <= 12 and len(samples(tmp_path / "one")) == 20
    (source / "0.mp4").unlink()
    for number in (3, 5):
        (source / f"{number}.mp4").rename(source / f"{number}.mkv")
    pack_videos(source, tmp_path / "two", shard_size=1, val_share=0.3, workers=0)
    assert samples(tmp_path / "two", "val-*.tar").keys() == held_out - {"0"}


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    source, whole, killed = tmp_path / "videos", tmp_path / "whole", tmp_path / "killed"
    source.mkdir()
    video = mp4(20, 128)
    for number in range(35):
        (source / f"{number:02d}.mp4").write_bytes(video[:1000] if number % 5 == 4 else video)
    pack_videos(source, whole, shard_size=1, workers=0)
    code = (
        "import sys; from pathlib import Path; from lightning_semgen.commands.pack import pack;"
        "pack(*map(Path, sys.argv[1:]), shard_size=1, workers=1)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(killed)],
        env=os.environ | {"PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    while not (killed / "train-000001.tar").exists():
        assert process.poll() is None
        time.sleep(0.001)
    with pytest.raises(UserError, match="Another `lightning pack` is at work in"):
        pack_videos(source, killed, shard_size=1, workers=0)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in killed.glob("*.tar")}
    assert 2 <= len(done) < len(list(whole.glob("*.tar")))
    # The worst moments: within a shard, and within the line of a cause.
    (killed / "train-000009.tar.0.partial").write_bytes(video)
    with (killed / "rejected.jsonl").open("a") as file:
        file.write('{"path": "34.mp4", "cause": "does not decode')
    pack_videos(source, killed, shard_size=1, workers=0)
    assert content(killed) == content(whole) and all(path.stat().st_mtime_ns == at for path, at in done.items())


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="workers do not inherit the crash")
def test_a_file_that_kills_its_decoder_is_left_out(folder, tmp_path, monkeypatch):
    opened = av.open

    def crash(file, *args, **options):
        return opened(file, *args, **options) if len(file.getvalue()) != 7 else os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(av, "open", crash)
    (folder / "killer.mp4").write_bytes(b"1234567")
    pack_videos(folder, tmp_path / "out", workers=1)
    assert rejected(tmp_path / "out")["killer.mp4"] == "kills the process that decodes it"
    assert len(samples(tmp_path / "out")) == 5


def test_a_worker_that_is_killed_costs_nothing(folder, tmp_path):
    killed = []

    def kill() -> None:
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.001)
        os.kill(workers[0].pid, signal.SIGKILL)
        killed.append(workers[0].pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    pack_videos(folder, tmp_path / "out", workers=2)
    killer.join(5)
    assert (
        killed
        and len(samples(tmp_path / "out")) == 5
        and rejected(tmp_path / "out").keys() == {"empty.mp4", "half.mp4"}
    )


def test_shards_are_packed_anew(folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    pack_videos(folder, one, val_share=0.5, workers=0)
    assert len(list(one.glob("*.tar"))) == 2
    pack_videos(one, two, workers=0)
    assert samples(two) == samples(one)
    pack_videos(one / "{train,val}-*.tar", tmp_path / "three", workers=0)
    pack_videos(one / "train-000000.tar", tmp_path / "four", val_share=0.5, workers=0)
    assert content(tmp_path / "three")["train-000000.tar"] == content(two)["train-000000.tar"]
    assert not list((tmp_path / "four").glob("val-*.tar"))  # the split depends on the same names


def test_foreign_shards_are_sources_too(tmp_path):
    old = tmp_path / "old"
    tar(
        old / "a.tar",
        {"v1.mp4": VIDEO, "v1.txt": b" a text\n", "v2.MKV": VIDEO, "v2.json": b'{"caption": null, "id": 7}'},
    )
    members = {"v1.mp4": VIDEO, "v1.txt": b"a text", "v1.json": b'{"caption": "a record"}'}
    members |= {"v3.jpg": b"", "v3.txt": b"x", "v4.webm": VIDEO[:-20000], "v5.mp4": VIDEO, "v5.json": b"{"}
    tar(old / "b.tar", members)
    pack_videos(old, tmp_path / "new", workers=0)
    infos = samples(tmp_path / "new")
    assert {key: info.get("caption") for key, info in infos.items()} == {"v1": "a text", "v2": None, "v1-2": "a record"}
    assert infos["v2"]["id"] == 7 and infos["v2"]["path"] == "a.tar:v2"
    causes = rejected(tmp_path / "new")
    assert causes.pop("b.tar:v4").startswith(("does not decode", "truncated", "damaged"))
    assert causes == {"b.tar:v3": "no video member", "b.tar:v5": "its .json or .txt is not readable"}
    shards = Shards(str(tmp_path / "new/*.tar"))
    assert len(shards) == 2 and shards.uncaptioned == 1 and shards.read(0)["mp4"] == VIDEO


def test_long_videos_are_packed_in_segments(tmp_path):
    source, out, again = tmp_path / "videos", tmp_path / "out", tmp_path / "again"
    source.mkdir()
    stuck = film(130, "matroska", key_every=250)
    for name, video in {"long.mp4": film(130), "short.mp4": VIDEO, "stuck.mkv": stuck}.items():
        (source / name).write_bytes(video)
        (source / name).with_suffix(".txt").write_text(f"a {name[:-4]} video")
    pack_videos(source, out, segment_seconds=2, workers=0)
    infos = samples(out)
    assert list(infos) == ["long_s000", "long_s001", "long_s002", "short", "stuck"]
    assert [infos[f"long_s00{number}"]["segment"] for number in range(3)] == [[0, 2], [2, 4], [4, 5.417]]
    assert {infos[f"long_s00{number}"]["caption"] for number in range(3)} == {"a long video"}
    assert infos["long_s001"]["path"] == "long.mp4" and "segment" not in infos["short"]
    rows = {row["key"]: row for row in read_index(out / "train-000000.tar")}
    assert [row["frames"] for row in rows.values()] == [48, 48, 34, 49, 130]
    assert all(row["size"] == row["members"]["mp4"][1] for row in rows.values() if "mp4" in row["members"])
    clips = ClipDataset(Shards(str(out / "*.tar")), Clip(25, 32, 48, 24.0, 1.6))
    assert [clips[number]["sample"] for number in range(5)] == list(infos)
    pack_videos(out, again, segment_seconds=1, val_share=0.5, workers=0)
    splits = [{key.partition("_")[0] for key in samples(again, f"{split}-*.tar")} for split in ("train", "val")]
    assert all(splits) and not splits[0] & splits[1]
    assert samples(again)["long_s001_s001"]["segment"] == [3, 4]


def test_no_two_samples_share_a_key():
    assert unique_keys(["a", "a", "a-2", "a"]) == ["a", "a-2", "a-2-2", "a-3"]
    assert unique_keys(["a_s000", "b_s000", "a"]) == ["a_s000-2", "b_s000", "a"]


def test_a_folder_holds_one_packing(folder, tmp_path, lightning, fails):
    out = str(tmp_path / "out")
    lightning("pack", str(folder), out, "--workers=0", small=False)
    lightning("pack", str(folder), out, "--workers=1", small=False)
    assert "with val_share 0.0, not 0.5" in fails("pack", str(folder), out, "--val_share=0.5", small=False)
    assert "with segment_seconds 60.0, not 5.0" in fails("pack", str(folder), out, "--segment_seconds=5", small=False)
    assert "with caption_prompt" in fails("pack", str(folder), out, "--caption_prompt=What?", small=False)
    (folder / "a.txt").write_text("another caption")
    assert "from other videos or captions" in fails("pack", str(folder), out, small=False)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/x.tar").touch()
    assert "not packed there" in fails("pack", str(folder), str(tmp_path / "foreign"), small=False)
    assert "cannot be made a folder" in fails("pack", str(folder), str(folder / "a.txt"), small=False)


def test_bad_input_is_one_sentence(folder, tmp_path, fails):
    def said(source: Path) -> str:
        return fails("pack", str(source), str(tmp_path / "out"), small=False)

    assert "There is no" in said(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "There are no videos in" in said(tmp_path / "empty")
    assert "neither a folder nor" in said(Path(__file__))
    assert "There are no shards at" in said(tmp_path / "none-{0..3}.tar")
    assert "There are no samples in the shards" in said(tar(tmp_path / "shards/void.tar", {}))
    (tmp_path / "shards/void.tar").write_bytes(VIDEO)
    assert "void.tar cannot be read" in said(tmp_path / "shards")
    (tmp_path / "shards/a.mp4").touch()
    assert "both videos and shards" in said(tmp_path / "shards")
    row = {"path": "videos/a.mp4", "caption": "a"}
    assert "t.jsonl, line 2: there is no path" in said(table(tmp_path / "t.jsonl", row, {"caption": "a"}))
    assert "line 2: videos/a.mp4 is listed before" in said(table(tmp_path / "t.jsonl", row, row))
    (tmp_path / "t.csv").write_text("path,caption\nvideos/a.mp4,one, two\n")
    assert "t.csv, line 2: more fields than columns" in said(tmp_path / "t.csv")
    (tmp_path / "t.jsonl").write_text('{"path": "a.mp4"}\n{')
    assert "t.jsonl cannot be read, line 2" in said(tmp_path / "t.jsonl")
    (folder / "captions.csv").touch()
    assert "has both captions.jsonl and captions.csv" in said(folder)
    assert "None of the 1 videos can be used" in said(table(tmp_path / "t.jsonl", {"path": "gone.mp4"}))
    assert "shard_size" in fails("pack", str(folder), str(tmp_path / "new"), "--shard_size=0", small=False)


def test_help_describes_every_option(lightning, capsys):
    lightning("--help", small=False)
    with pytest.raises(SystemExit, match="0"):
        lightning("pack", "--help", small=False)
    said = capsys.readouterr().out
    assert "size of a shard in MB" in said and "folder of videos" in said and "share of the videos" in said
    assert "pack put captioned videos into shards" in " ".join(said.split())


@pytest.mark.skipif(not CLIPS.is_dir(), reason="no folder of wild clips: name one in SEMGEN_CLIPS")
def test_wild_clips_are_found_with_their_captions():
    videos = find_videos(CLIPS)
    assert len({video.key for video in videos}) == len(videos) == 68
    assert sum("caption" in video.info for video in videos) == 40
