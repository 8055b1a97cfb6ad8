"""Shards of any origin: what is unsafe, ambiguous or too large is a rejected sample, what is broken a named shard."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from conftest import CLIP

from data.datasets import ClipDataset, Stream, captions
from data.rejected import Rejected
from data.shards.reader import Shards
from data.shards.tar import MAX_TEXT, TarFile, members
from data.toy.world import toy_clip
from lightning_semgen.errors import UserError

CAPTION = json.dumps({"caption": "a caption"}).encode()


def member(name: str, content: bytes = b"x", **header) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in header.items():
        setattr(info, field, value)
    return info, content


def sample(key: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [member(f"{key}.mp4"), member(f"{key}.json", CAPTION)]


def write_tar(path: Path, *contents: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, content in contents:
            tar.addfile(info, io.BytesIO(content))
    return path


def causes(shards: Shards) -> dict[str, str | None]:
    """Why each sample cannot be read, None of one that can."""
    found = {}
    for index, (_, key, _) in enumerate(shards.samples):
        found[key] = None
        try:
            shards.read(index)
        except Rejected as cause:
            found[key] = str(cause)
    return found


@pytest.mark.parametrize(
    ("bad", "key", "cause"),
    [
        (sample("/etc/a"), "/etc/a", "absolute or .. member name"),
        (sample("../a"), "../a", "absolute or .. member name"),
        (sample("x/../../a"), "x/../../a", "absolute or .. member name"),
        ([member("a.mp4", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), member("a.json", CAPTION)], "a", "plain"),
        ([member("a.mp4", b"", type=tarfile.LNKTYPE, linkname="good.mp4"), member("a.json", CAPTION)], "a", "plain"),
        ([member("a.mp4", b"", type=tarfile.CHRTYPE), member("a.json", CAPTION)], "a", "plain"),
        (sample("a") + [member("a.mp4", b"another")], "a", "two members of one name"),
        ([member("a.mp4"), member("a.json", b" " * MAX_TEXT + CAPTION)], "a", "JSON of more than 16 MB"),
    ],
)
def test_what_is_unsafe_or_ambiguous_is_a_rejected_sample(tmp_path, bad, key, cause):
    path = write_tar(tmp_path / "s.tar", *sample("first"), *bad, *sample("good"))
    for _ in range(2):  # from the tar, and from the index
        shards = Shards(str(path))
        found = causes(shards)
        assert list(found) == ["first", key, "good"] and cause in found.pop(key) and not any(found.values())
    assert len(captions(shards)) == 2


def test_a_rejected_sample_is_replaced_and_counted(tmp_path):
    key, mp4, info = toy_clip("train", 0, 0)
    good = [member(f"{key}.mp4", mp4), member(f"{key}.json", json.dumps(info).encode())]
    stream = Stream(
        ClipDataset(Shards(str(write_tar(tmp_path / "s.tar", *sample("../a"), *good))), CLIP), seed=0, open_shards=1
    )
    delivered = [stream[position] for position in range(2)]
    assert {row["sample"] for row in delivered} == {key}
    assert [row for s in delivered for row in s["rejected"]] == [("../a", "an absolute or .. member name")]


def test_folders_are_passed_over_and_their_names_are_part_of_a_key(tmp_path):
    folder = member("sub", b"", type=tarfile.DIRTYPE)
    shards = Shards(str(write_tar(tmp_path / "s.tar", folder, *sample("sub/a"), *sample("a"))))
    assert causes(shards) == {"sub/a": None, "a": None} and not shards.uncaptioned


def test_a_member_over_the_limit_is_never_read(tmp_path):
    path = tmp_path / "s.tar"
    header = member("huge.mp4")[0]
    header.size = 5 * 10**9
    with path.open("wb") as file:  # a hole: it takes no room on the disk
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.seek(-(-header.size // 512) * 512, io.SEEK_CUR)
        rest = io.BytesIO()
        with tarfile.open(fileobj=rest, mode="w") as tar:
            for info, content in [member("huge.json", CAPTION), *sample("good")]:
                tar.addfile(info, io.BytesIO(content))
        file.write(rest.getvalue())
    shards = Shards(str(path))
    assert causes(shards) == {"huge": "a member of more than 1000 MB (data.max_member_mb)", "good": None}
    assert len(captions(shards)) == 2  # the limit is on what is read
    assert all("more than 0 MB" in cause for cause in causes(Shards(str(path), max_member_mb=0)).values())


def test_an_index_that_is_something_else_is_made_again(tmp_path):
    path = write_tar(tmp_path / "s.tar", *sample("good"))
    for text in ("[1]", "<html>", '{"shard": 3}'):
        (tmp_path / "s.tar.index.json").write_text(text)
        assert causes(Shards(str(path))) == {"good": None}


def damaged(how: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, content in [*sample("first"), *sample("second")]:
            tar.addfile(info, io.BytesIO(content))
    whole = buffer.getvalue()  # 4 members of 2 blocks, then zeros
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 10**9
    negative = whole[:1024] + member("a.mp4", b"", size=-1024)[0].tobuf(tarfile.GNU_FORMAT) + whole[1024:]
    return {
        "cut in a member": whole[: 3 * 512 + 1],
        "cut in a header": whole[: 2 * 1024 + 100],
        "cut between members": whole[: 2 * 1024],
        "a header broken": whole[: 2 * 1024] + b"?" * 512 + whole[2 * 1024 + 512 :],
        "a gigabyte of a name": whole[: 2 * 1024] + long_name.tobuf() + bytes(1024),
        "names without end": whole[: 2 * 1024] + member("l", b"n" * 9, type=tarfile.GNUTYPE_LONGNAME)[0].tobuf() * 4000,
        "a size below zero": negative,
        "compressed": b"\x1f\x8b" + whole,
        "empty": b"",
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        *("cut in a member", "cut in a header", "cut between members", "a header broken", "a gigabyte of a name"),
        *("names without end", "a size below zero", "compressed", "empty"),
    ],
)
def test_a_broken_shard_is_an_error_with_its_name(tmp_path, how):
    (tmp_path / "s.tar").write_bytes(damaged(how))
    with pytest.raises(UserError, match="shard .*s.tar cannot be read"):
        Shards(str(tmp_path / "s.tar"))


def test_no_gigabyte_is_read_on_a_headers_word():
    with (
        TarFile(io.BytesIO(damaged("a gigabyte of a name"))) as file,
        pytest.raises(tarfile.ReadError, match="10{9} b"),
    ):
        list(members(file))
