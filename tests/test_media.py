"""Video and audio: results by name, as files, with their workflow inside, and made again."""

import io
import pickle

import av
import numpy as np
import pytest
import torch
from PIL import Image

from bentoml_diffusers import Engine, Workflow, testing
from bentoml_diffusers.errors import InvalidRequest, InvalidWorkflow, PipelineFailed
from bentoml_diffusers.media import FORMATS, Audio, Video, encode_media, read_text

RATE = 8000
CALL = {"prompt": "a red circle", "num_inference_steps": 2, "height": 32, "width": 32, "seed": 3}
VIDEO_CALL = {**CALL, "num_frames": 5}
SOUND_CALL = {"prompt": "a red circle", "num_inference_steps": 2, "audio_end_in_s": 0.25, "seed": 3}


@pytest.fixture(scope="module")
def ltx():
    with Engine(testing.tiny_ltx()) as engine:
        yield engine


@pytest.fixture(scope="module")
def ltx2():
    with Engine(testing.tiny_ltx2()) as engine:
        yield engine


@pytest.fixture(scope="module")
def stable_audio():
    with Engine(testing.tiny_stable_audio()) as engine:
        yield engine


def make_video(frames=7, height=33, width=47, fps=12.5, seconds=1.0):
    """A square of pure red that moves over a gradient, and a tone of 440 Hz."""
    made = np.zeros((frames, height, width, 3), np.float32)
    made[..., 1] = np.linspace(0, 1, width)
    for index in range(frames):
        made[index, 8:24, 4 * index : 4 * index + 16] = (1, 0, 0)
    return Video(made, fps, make_tone(seconds))


def make_tone(seconds=1.0, channels=1):
    samples = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(RATE * seconds)) / RATE)
    return Audio.of(np.stack([samples] * channels), RATE)


def encode(media, file_format, **metadata):
    return b"".join(encode_media(media, file_format, metadata))


def decode_frames(data):
    """Pixels, the second of each frame, and the codec, read while the file is open."""
    with av.open(io.BytesIO(data)) as file:
        codec = file.streams.video[0].codec_context.codec.canonical_name
        frames = list(file.decode(video=0))
        pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
        return pixels, [frame.time for frame in frames], codec


def decode_samples(data):
    with av.open(io.BytesIO(data)) as file:
        stream = file.streams.audio[0]
        resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=RATE)
        frames = [one for frame in file.decode(audio=0) for one in resampler.resample(frame)]
        return np.concatenate([frame.to_ndarray() for frame in frames], axis=1)


@pytest.mark.parametrize("name", ["mp4", "mp4-av1", "webm"])
def test_a_video_keeps_frames_colors_speed_and_sound(name):
    video = make_video()
    data = encode(video, name)
    frames, times, _codec = decode_frames(data)
    wanted = np.stack(list(video.arrays())).astype(int)
    assert frames.shape == (7, 34, 48, 3)  # codecs want even sides: the edge continues
    assert np.abs(frames[:, :33, :47] - wanted).mean() < 8  # lossy, colors at half the resolution
    center = frames[0, 12:20, 4:12].reshape(-1, 3).mean(0)
    assert np.abs(center - (255, 0, 0)).max() < 12  # another color matrix would be off by 20
    assert np.diff(times) == pytest.approx(1 / 12.5, abs=0.001)
    sound = decode_samples(data)
    spectrum = np.abs(np.fft.rfft(sound[0, :RATE]))
    assert abs(np.argmax(spectrum) * RATE / len(sound[0, :RATE]) - 440) < 2
    assert abs(sound.shape[1] / RATE - 1) < 0.3  # codecs fill up their frames


@pytest.mark.parametrize("name", ["webp", "gif"])
def test_an_animation_keeps_frames_and_duration(name):
    image = Image.open(io.BytesIO(encode(make_video(), name)))
    durations = []
    for index in range(image.n_frames):
        image.seek(index)
        image.load()
        durations.append(image.info["duration"])
    assert image.n_frames == 7
    assert image.size == (47, 33)
    assert abs(sum(durations) - 7 * 80) <= 10


@pytest.mark.parametrize("name", ["wav", "flac", "mp3", "opus"])
def test_sound_keeps_pitch_length_and_channels(name):
    sound = decode_samples(encode(make_tone(channels=2), name))
    wanted = make_tone(channels=2).samples
    assert sound.size // 2 == pytest.approx(wanted.shape[1], abs=RATE * 0.3)
    if name in ("wav", "flac"):  # 16 bits
        assert np.abs(sound.reshape(2, -1) - wanted).max() < 2 / 2**15


def test_a_stream_comes_in_pieces_and_is_whole():
    noise = np.random.default_rng(0).random((150, 64, 64, 3))  # large enough for FFmpeg's buffer
    pieces = list(encode_media(Video(noise, 12.5), "mp4"))
    assert len(pieces) > 2
    assert all(pieces)
    assert len(decode_frames(b"".join(pieces))[0]) == 150


@pytest.mark.parametrize("name", FORMATS)
def test_a_text_comes_back_from_each_container(name):
    media = make_tone() if FORMATS[name].video is None else make_video()
    text = '{"prompt": "ein Stück für €", "n": "' + "x" * 100_000 + '"}'
    assert read_text(encode(media, name, **{FORMATS[name].text_key: text})) == text
    assert read_text(encode(media, name)) is None
    if FORMATS[name].video is not None:
        assert len(decode_frames(encode(media, name, **{FORMATS[name].text_key: text}))[0]) == 7


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sound_that_is_no_number_is_not_encoded(value):
    with pytest.raises(PipelineFailed, match="NaN or infinity"):
        encode(Audio.of(np.full((1, 800), value), RATE), "wav")


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_a_video_is_the_same_in_each_output_type(ltx, kind):
    (video,) = ltx.run("__call__", **VIDEO_CALL, output_type=kind, frame_rate=12).videos
    (plain,) = ltx.run("__call__", **VIDEO_CALL, output_type="pil", frame_rate=12).output[0]
    assert (len(video), video.size, video.fps, video.audio) == (5, (32, 32), 12, None)
    assert [one.tobytes() for one in video.images] == [one.tobytes() for one in plain]


def test_each_video_of_several_prompts_is_one(ltx):
    result = ltx.run("__call__", **{**VIDEO_CALL, "prompt": ["a star", "a square"]})
    assert [len(video) for video in result.videos] == [5, 5]
    assert result.images == []


def test_video_and_sound_come_together_by_name(ltx2):
    result = ltx2.run("__call__", **VIDEO_CALL, max_sequence_length=16)
    assert list(result.named_output) == ["frames", "audio"]
    (video,), (audio,) = result.videos, result.audios
    assert (video.fps, video.audio.sampling_rate, audio.samples.shape[0]) == (24, RATE, 2)
    assert audio.seconds == pytest.approx(video.seconds, rel=0.2)
    assert np.array_equal(audio.samples, result.output[1][0].numpy())
    assert "with sound" in repr(result)


def test_sound_has_its_sampling_rate(stable_audio):
    result = stable_audio.run("__call__", **SOUND_CALL)
    (audio,) = result.audios
    assert (audio.samples.shape, audio.sampling_rate) == ((2, 2000), RATE)
    assert result.videos == result.images == []


def test_latents_are_latents(ltx, stable_audio):
    result = ltx.run("__call__", **VIDEO_CALL, output_type="latent")
    assert torch.equal(result.latents, result.output[0])
    assert result.videos == result.images == []
    sound = stable_audio.run("__call__", **SOUND_CALL, output_type="latent")
    assert isinstance(sound.latents, torch.Tensor)
    assert sound.audios == []


def test_a_result_pickles(ltx2):
    result = ltx2.run("__call__", **VIDEO_CALL, max_sequence_length=16)
    again = pickle.loads(pickle.dumps(result))
    assert repr(again.videos) == repr(result.videos)
    assert np.array_equal(again.audios[0].samples, result.audios[0].samples)


@pytest.mark.parametrize(
    "name", ["a.mp4", "a.webm", "a.webp", "a.wav", "a.flac", "a.opus", "a.mp3"]
)
def test_a_file_replays_what_it_holds(ltx2, tmp_path, name):
    call = {**VIDEO_CALL, "max_sequence_length": 16}
    result = ltx2.run("__call__", **call, return_workflow=True)
    assert result.save(tmp_path / name) == [tmp_path / name]
    assert [file.name for file in tmp_path.iterdir()] == [name]
    workflow = Workflow.load(tmp_path / name)
    assert workflow == result.workflow
    assert ltx2.replay(workflow).replay.matches


def test_what_has_no_place_for_a_workflow_has_it_beside(ltx, tmp_path):
    result = ltx.run("__call__", **VIDEO_CALL, return_workflow=True)
    result.save(tmp_path / "a.gif")
    assert Workflow.load(tmp_path / "a.json") == result.workflow
    with pytest.raises(InvalidWorkflow):
        Workflow.load(tmp_path / "a.gif")


def test_files_of_several_results_are_numbered(ltx, tmp_path):
    result = ltx.run("__call__", **{**VIDEO_CALL, "prompt": ["a star", "a square"]})
    result.save(tmp_path / "a.mp4", codec="av1")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a-0.mp4", "a-1.mp4"]
    frames, _times, codec = decode_frames((tmp_path / "a-1.mp4").read_bytes())
    assert (len(frames), codec) == (5, "av1")


@pytest.mark.parametrize("name", ["a.png", "a.wav", "a.txt", "a"])
def test_a_suffix_for_something_else_is_refused(ltx, tmp_path, name):
    with pytest.raises(InvalidRequest, match="path: got"):
        ltx.run("__call__", **VIDEO_CALL).save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_images_are_saved_as_before(tmp_path):
    with Engine(testing.tiny_stable_diffusion()) as engine:
        result = engine.run("txt2img", **CALL, num_images_per_prompt=2, return_workflow=True)
        latents = engine.run("txt2img", **CALL, output_type="latent")
    assert len(result.save(tmp_path / "a.png")) == 2
    assert Image.open(tmp_path / "a-1.png").tobytes() == result.images[1].tobytes()
    assert Workflow.load(tmp_path / "a-1.png") == result.workflow
    assert torch.equal(latents.latents, latents.output[0])
    with pytest.raises(InvalidRequest, match="path"):
        result.save(tmp_path / "a.mp4")
