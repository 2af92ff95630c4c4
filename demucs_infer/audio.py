"""Reading, converting and writing audio files.

Shapes: `[C, T]` samples between -1 and 1, as float32. The work is done in `io`.
"""

from .io.decode import AudioFile
from .io.encode import ClipMode, encode_mp3, save_audio
from .io.pcm import (
    as_dtype_pcm,
    convert_audio,
    convert_audio_channels,
    f32_pcm,
    i16_pcm,
    prevent_clip,
)

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
