"""The only door to FFmpeg's readers: one file, and nothing that the file names.

A playlist, an image sequence or a session description makes FFmpeg open other files or the
network. Two walls are before that, and each holds alone:

- FFmpeg refuses every format that is not in `DEMUXERS`, whatever the file is called, before the
  format's reader runs (`format_whitelist`). What a later FFmpeg adds is refused until it is here.
- FFmpeg gets an open file and no path, and may open nothing by itself (`protocol_whitelist`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, BinaryIO

import av

from .claims import Honest

# Readers of FFmpeg (`ffmpeg -demuxers`) that read sound out of one file, by what they read.
DEMUXERS = " ".join(
    [
        # music and speech
        "aa aac aax ac3 ac4 act adx aea aiff alaw amr amrnb amrwb apac ape aptx aptx_hd ast au",
        "avr bit bonk caf codec2 daud dfpwm dsf dss dts dtshd eac3 epaf flac g722 g723_1 g726",
        "g726le g728 g729 gsm hca hcom iamf iff ilbc ircam kvag laf lc3 loas mlp mmf mp3 mpc",
        "mpc8 mtaf mulaw nistsphere oma osq pvf qcp qoa rka rso s337m s8 s16le sbc sds sdx shn",
        "sln sox spdif tak truehd tta u8 u16le voc vqf w64 wav wavarc wsd wv wve xwma",
        # films, radio and television
        "asf asf_o avi av1 cavsvideo dhav dv dxa flv gxf hxvs ivf ivr kux live_flv lmlm4 lvf",
        "lxf matroska mov mpeg mpegts mpegvideo mxf nsv nut nuv ogg pva rm swf ty webm wtv",
        # the sound of games
        "3dostr 4xm acm adf adp ads afc aix alp apc apm argo_asf argo_brp argo_cvg avs",
        "bethsoftvid bfi bfstm bink binka bmv boa brstm c93 cdxl dcstr derf dsicin ea ea_cdata",
        "film_cpk frm fsb fwse gdv genh hnm idcin ipmovie iss jv luodat mca mgsts mm moflex msf",
        "msp mtv musx mv mvi mxg nsp paf pmp pp_bnk psxstr redspark rl2 roq rpl rsd scd sdns",
        "sdr2 sga siff simbiosis_imx smjpeg smk smush sol svag svs thp tiertexseq tmv txd usm",
        "vag vividas vivo vmd vpk wady wc3movie wsaud wsvqa xa xmd xmv xvag yop",
    ]
).split()
MAX_FRAME = 2**21  # samples of one frame: Monkey's Audio has the longest, with 1 179 648


# Pictures that MP4 holds: looked at only where they are to be copied, for their size.
PICTURES = tuple("av1 h264 hevc libdav1d mjpeg mpeg1video mpeg2video mpeg4 vp9 vvc".split())


@cache
def _walls(pictures: Sequence[str]) -> dict[str, str]:
    return {
        "format_whitelist": ",".join(DEMUXERS),
        "protocol_whitelist": "none",
        # Pictures are not looked at: some of a few bytes take gigabytes.
        "codec_whitelist": ",".join(
            [*filter(_decodes_sound, sorted(av.codecs_available)), *pictures]
        ),
    }


def _decodes_sound(name: str) -> bool:
    try:
        return av.Codec(name, "r").type == "audio"
    except ValueError:  # it encodes only
        return False


class _Named:
    """A file object under a name of its own: FFmpeg looks at the suffix of it, among others."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        honest = Honest(file)
        self.read, self.seek, self.tell = honest.read, honest.seek, honest.tell


def open_audio(file: BinaryIO, name: str, pictures: Sequence[str] = ()) -> Any:
    """An open file as PyAV's container. Raises what PyAV raises; `file` stays the caller's.

    `pictures` are kinds of them that may be looked at, too.
    """
    container = av.open(
        _Named(file, name), "r", container_options=dict(_walls(pictures)), metadata_errors="replace"
    )
    for stream in container.streams.audio:
        if stream.codec_context is not None:
            stream.codec_context.options = {"max_samples": str(MAX_FRAME)}
    return container
