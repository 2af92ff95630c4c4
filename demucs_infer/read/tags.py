"""Select and clean the tags that go from a track into its stems.

All tags that are read or written pass `clean_tags`, whatever the format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..log import decoded

MAX_TAG, MAX_TAGS = 10_000, 100  # characters of a tag, and number of tags
# Tags that describe the file and its level. They would be wrong for stems.
OF_THE_FILE = re.compile(
    r"encoder.*|encoded_by|encoding.*|tsse|tool|.*_brands?|minor_version|creation_time|handler_name"
    r"|vendor_id|language|bps|duration|tlen|length|md5|acoustid_fingerprint"
    r"|(.*[-:_])?itun(norm|smpb|pgap|es_cddb.*)"
    r"|replaygain.*|r128_.*|mp3gain_.*|loudness.*|waveformatextensible_channel_mask"
    r"|id3v2_priv.*|serato.*|traktor.*"
)
# Line breaks and tabs belong to a text. FFmpeg ends it at the first NUL.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that a stem gets, with lower-case names, as text for any format.

    Empty and overlong tags are left out. Bytes that are not UTF-8 become U+FFFD.
    """
    clean = {_clean(name).lower(): _clean(text) for name, text in tags.items()}
    music = {
        name: text
        for name, text in clean.items()
        if name and 0 < len(text) <= MAX_TAG and not OF_THE_FILE.fullmatch(name)
    }
    return dict(list(music.items())[:MAX_TAGS])


def _clean(text: str) -> str:
    return CONTROL.sub("", decoded(text, "replace")).strip()
