"""Tags of audio files: what goes from a track into its stems.

Whatever the formats, every tag that is read or written passes `clean_tags`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..log import decoded

MAX_TAG, MAX_TAGS = 10_000, 100  # characters of one tag, and how many are kept
# Names of what is said of the old file and its level, not of the music: stems are other audio.
OF_THE_FILE = re.compile(
    r"encoder.*|encoded_by|encoding.*|tsse|tool|.*_brands?|minor_version|creation_time|handler_name"
    r"|vendor_id|language|bps|duration|tlen|length|md5|acoustid_fingerprint"
    r"|(.*[-:_])?itun(norm|smpb|pgap|es_cddb.*)"
    r"|replaygain.*|r128_.*|mp3gain_.*|loudness.*|waveformatextensible_channel_mask"
    r"|id3v2_priv.*|serato.*|traktor.*"
)
# In values, line breaks and tabs are text; FFmpeg ends one at the first NUL.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Those of `tags` that a stem is to have, under lower-case names, as text for any format.

    Empty and overlong ones are left out, bytes that are no text become U+FFFD.
    """
    clean = {_text(name).lower(): _text(value) for name, value in tags.items()}
    music = {
        name: value
        for name, value in clean.items()
        if name and 0 < len(value) <= MAX_TAG and not OF_THE_FILE.fullmatch(name)
    }
    return dict(list(music.items())[:MAX_TAGS])


def _text(text: str) -> str:
    return CONTROL.sub("", decoded(text, "replace")).strip()
