"""Select, rename and clean the tags that go from a track into its stems.

All tags that are read or written pass `clean_tags`, whatever the format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from .log import decoded

MAX_TAG, MAX_TAGS = 10_000, 100  # characters of a tag, and number of tags
# Tags that describe the file and its level. They would be wrong for stems.
OF_THE_FILE = re.compile(
    r"encoder.*|encoded_by|encoding.*|tsse?|tool|.*_brands?|minor_version|creation_time|handler_name"
    r"|name|vendor_id|language|bps|duration|tlen?|length|md5|acoustid_fingerprint"
    r"|(.*[-:_])?itun(norm|smpb|pgap|es_cddb.*)"
    r"|replaygain.*|r128_.*|mp3gain_.*|loudness.*|waveformatextensible_channel_mask"
    r"|id3v2_priv.*|serato.*|traktor.*"
)
# Line breaks and tabs belong to a text. FFmpeg ends it at the first NUL.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class Names(NamedTuple):
    """The names of a tag by format. `mp4` is None if FFmpeg's muxer writes the tag by itself."""

    id3: str
    vorbis: str
    mp4: str | None
    matroska: str


# The columns: our name, which is FFmpeg's if it has one; the frame of ID3v2.4; the Vorbis comment;
# the item of MP4 (-: FFmpeg writes it; four lower-case letters: an atom; others: a free-form name);
# the tag of Matroska; further names that files use, with the frame of ID3v2.2.
_TABLE = """
title         TIT2 TITLE           -            TITLE
artist        TPE1 ARTIST          -            ARTIST
album         TALB ALBUM           -            ALBUM
album_artist  TPE2 ALBUMARTIST     -            ALBUM_ARTIST
composer      TCOM COMPOSER        -            COMPOSER        TCM
track         TRCK TRACKNUMBER     -            PART_NUMBER
disc          TPOS DISCNUMBER      -            DISC            TPA
date          TDRC DATE            -            DATE
genre         TCON GENRE           -            GENRE
comment       COMM COMMENT         -            COMMENT
description   TDES DESCRIPTION     -            DESCRIPTION
lyrics        USLT LYRICS          -            LYRICS          unsyncedlyrics
copyright     TCOP COPYRIGHT       -            COPYRIGHT       TCR
grouping      TIT1 GROUPING        -            GROUPING        TT1
compilation   TCMP COMPILATION     -            COMPILATION     itunescompilation
bpm           TBPM BPM             tmpo         BPM             TBP tempo
initialkey    TKEY INITIALKEY      initialkey   INITIAL_KEY     TKE key
publisher     TPUB LABEL           LABEL        LABEL           TPB organization
isrc          TSRC ISRC            ISRC         ISRC            TRC
subtitle      TIT3 SUBTITLE        SUBTITLE     SUBTITLE        TT3
remixer       TPE4 REMIXER         REMIXER      REMIXED_BY      TP4 mixartist
performer     TPE3 PERFORMER       PERFORMER    PERFORMER
lyricist      TEXT LYRICIST        LYRICIST     LYRICIST        TXT
mood          TMOO MOOD            MOOD         MOOD
media         TMED MEDIA           MEDIA        ORIGINAL_MEDIA_TYPE TMT
title-sort    TSOT TITLESORT       sonm         TITLE-SORT      TST sort_name
artist-sort   TSOP ARTISTSORT      soar         ARTIST-SORT     TSP sort_artist
album-sort    TSOA ALBUMSORT       soal         ALBUM-SORT      TSA sort_album
"""
TAGS: dict[str, Names] = {}
_KNOWN_AS: dict[str, str] = {}
for _name, _id3, _vorbis, _mp4, *_others in map(str.split, _TABLE.strip().splitlines()):
    TAGS[_name] = Names(_id3, _vorbis, None if _mp4 == "-" else _mp4, _others[0])
    _KNOWN_AS |= {_other.lower(): _name for _other in (_name, _id3, _vorbis, _mp4, *_others)}
del _KNOWN_AS["-"]
# Of a stream that is copied.
STREAM_TAGS = ("language", "title", "handler_name", "filename", "mimetype")
LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8}){0,4}")
# FFmpeg's name, with a description and a language.
LYRICS = re.compile(r"(?is)lyrics-(.*-)?([a-z]{3})?")


def clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that a stem gets, under our names, as text for any format.

    Empty and overlong tags are left out. Bytes that are not UTF-8 become U+FFFD. Of several tags
    with the same meaning, the first one counts.
    """
    clean: dict[str, str] = {}
    # Names with a language are surely lyrics. FFmpeg also calls a description "comment".
    names = sorted(tags, key=lambda name: (not LYRICS.fullmatch(name), name == "comment"))
    for name, value in ((name, tags[name]) for name in names):
        name, value = _text(name), _text(value)
        known = "lyrics" if LYRICS.fullmatch(name) else _KNOWN_AS.get(name.lower(), name)
        if known and 0 < len(value) <= MAX_TAG and not OF_THE_FILE.fullmatch(name.lower()):
            clean.setdefault(known, value)
    return dict(list(clean.items())[:MAX_TAGS])


def clean_stream_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the tags of a stream or chapter that is copied, cleaned as those of a track."""
    texts = {name: _text(tags[name]) for name in STREAM_TAGS if name in tags}
    if not LANGUAGE.fullmatch(texts.get("language", "")):
        texts.pop("language", None)
    return {name: text for name, text in texts.items() if 0 < len(text) <= MAX_TAG}


def _text(text: str) -> str:
    return CONTROL.sub("", decoded(text, "replace")).strip()
