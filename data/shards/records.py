"""What a sample's .json and .txt say of it, whoever wrote them."""

import json
import math

CAPTIONS = ("caption", "text", "prompt", "captions")  # the names that a caption goes by, the surest first
MEASURED = ("duration", "width", "height", "fps", "rotation", "codec", "frames", "size")  # see `probe`
FORMAT = 2  # of indexes, and of what `lightning pack` writes; 1 had no number
MEASURED_BY = {"measured_by": f"lightning pack {FORMAT}"}


def has_caption(info: dict) -> bool:
    """Whether `caption` is a text, or a list of such, none of them empty."""
    return is_caption(info.get("caption"))


def is_caption(value: object) -> bool:
    captions = value if isinstance(value, list) else [value]
    return bool(captions) and all(isinstance(text, str) and text.strip() and _encodes(text) for text in captions)


def _encodes(text: str) -> bool:
    """Not where half of a character is missing, of which no text encoder can make anything."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def with_caption(info: dict) -> dict:
    """The same with the caption under `caption`, where it goes by another of CAPTIONS, in whatever case."""
    if has_caption(info):
        return info
    names: dict[str, list[str]] = {}
    for name in info:
        names.setdefault(str(name).strip().lower(), []).append(name)
    for name in (own for known in CAPTIONS for own in names.get(known, [])):
        if is_caption(info[name]):
            return {own: value for own, value in info.items() if own not in (name, "caption")} | {"caption": info[name]}
    return info


def merged(text: bytes | None, record: bytes | None) -> dict | None:
    """What a .txt, the caption, and a .json say together, the latter first; None where they are broken."""
    try:
        info = plain(json.loads(record.decode("utf-8-sig"))) if record is not None else {}
        if not isinstance(info, dict):
            return None
        info = with_caption(info)
        if text is not None and not has_caption(info):
            info |= {"caption": text.decode("utf-8-sig").strip()}
        return info
    except (ValueError, RecursionError):
        return None


def plain(value: object) -> object:
    """A value as JSON can hold it: None in place of NaN, infinite numbers and bytes; other kinds as text."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bytes):
        return None
    return value if isinstance(value, str | int) else str(value)


def measured_by_pack(info: dict, size: int) -> dict:
    """Of MEASURED what `lightning pack` found in a video of `size` bytes; empty where somebody else wrote the numbers.

    Those of other tools have other senses and units. Format 1 had no mark: there the numbers must agree.
    """
    facts = {name: info.get(name) for name in MEASURED}
    numbers = [facts[name] for name in ("duration", "width", "height", "rotation", "frames")]
    numbers += [facts["fps"]] * (facts["fps"] is not None)  # it is None of a single frame without a duration
    if not all(map(_is_number, numbers)) or not isinstance(facts["codec"], str):
        return {}
    if facts["size"] != size or not facts["width"] or not facts["height"]:  # another size: encoded again since then
        return {}
    marked = str(info.get("measured_by")).startswith("lightning pack ")
    return facts if marked or _agree(facts["frames"], facts["duration"], facts["fps"]) else {}


def _agree(frames: int, duration: float, fps: float | None) -> bool:
    """Whether there are as many frames as the seconds and the rate make, both of which are rounded."""
    if not duration:
        return frames == 1
    return fps is not None and abs(fps * duration - frames) <= 1e-3 * (fps + duration)


def _is_number(value: object) -> bool:
    """Whether it is one that a video can have; NaN is not below anything."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9
