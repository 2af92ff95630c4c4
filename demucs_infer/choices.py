"""What options choose among, for modules that answer before PyTorch is imported."""

FORMAT_NAMES = ("wav", "flac", "mp3", "ogg", "opus", "m4a")
CONTAINER_NAMES = ("mp4", "mka", "stem.mp4")  # files of several streams
CODEC_NAMES = ("aac", "alac")
CLIP_MODE_NAMES = ("rescale", "rescale-all", "clamp", "tanh", "none")
OTHER_METHODS = ("none", "add", "minus")
DEFAULT_FILENAME = "{track}/{stem}.{ext}"
ENGINES = ("torch", "openvino")
PRECISIONS = ("float32", "bfloat16", "float16")
