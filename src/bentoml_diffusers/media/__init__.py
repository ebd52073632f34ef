"""Images, video and audio as values, and as files: what pipelines make, encoded and decoded."""

from bentoml_diffusers.media.decoders import decode_video
from bentoml_diffusers.media.encoders import encode_media, has_codecs, import_av, write_media
from bentoml_diffusers.media.formats import (
    ANIMATIONS,
    FORMATS,
    AudioFormat,
    VideoFormat,
    format_of,
)
from bentoml_diffusers.media.texts import UnreadableMedia, find_container, read_text
from bentoml_diffusers.media.values import Audio, Video

__all__ = [
    "ANIMATIONS",
    "FORMATS",
    "Audio",
    "AudioFormat",
    "UnreadableMedia",
    "Video",
    "VideoFormat",
    "decode_video",
    "encode_media",
    "find_container",
    "format_of",
    "has_codecs",
    "import_av",
    "read_text",
    "write_media",
]
