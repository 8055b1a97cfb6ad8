"""What lies in a tar of any origin, without belief in the sizes and names that its headers give."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

MAX_TEXT = 2**24  # bytes of what indexing reads whole: a header's long name, a sample's JSON


@dataclass(frozen=True)
class Member:
    """A member of a sample: `key.extension` of `size` bytes at `offset`; `problem` says why it cannot be used."""

    key: str
    extension: str
    offset: int
    size: int
    problem: str | None


class TarFile(io.BufferedReader):
    """A tar's bytes, of which no more than MAX_TEXT can be read at once, whatever a header asks for."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_TEXT:
            raise tarfile.ReadError(f"a header or a JSON of {size} bytes")
        return super().read(size)


def members(file: TarFile) -> Iterator[Member]:
    """All members but folders; raises tarfile.ReadError for a tar that is broken or not whole.

    Nothing links or leads out of the tar: a name that would, a link and a device are members with a problem.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.size < 0:  # the next member would lie before this one
                    raise tarfile.ReadError(f"a member of {info.size} bytes")
                if not info.isdir():
                    folder, slash, name = info.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    yield Member(folder + slash + stem, extension, info.offset_data, info.size, _problem(info))
            _check_end(file, tar.offset)
    except (ArithmeticError, RecursionError, LookupError, ValueError) as error:  # tarfile's, of senseless headers
        raise tarfile.ReadError(f"a header that makes no sense, {type(error).__name__}") from error


def _problem(info: tarfile.TarInfo) -> str | None:
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "an absolute or .. member name"
    if not info.isfile() or info.issparse():
        return "a member that is no plain file"
    return None


def _check_end(file: TarFile, end: int) -> None:
    """tarfile takes a broken header and the end of a file, too, for the end of the tar, which is a block of zeros."""
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no member and no end at byte {end}")
