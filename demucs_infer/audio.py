"""Read, convert and write audio files.

Shapes: `[C, T]` samples between -1 and 1, as float32.
"""

from .read.decode import AudioFile
from .read.pcm import (
    as_dtype_pcm,
    convert_audio,
    convert_audio_channels,
    f32_pcm,
    i16_pcm,
    prevent_clip,
)
from .write.encode import ClipMode, encode_mp3, save_audio

__all__ = [
    "AudioFile",
    "ClipMode",
    "as_dtype_pcm",
    "convert_audio",
    "convert_audio_channels",
    "encode_mp3",
    "f32_pcm",
    "i16_pcm",
    "prevent_clip",
    "save_audio",
]
