"""Services of pipelines that make video, audio, or images without the usual names."""

import io

import av
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import bentoml_diffusers
from bentoml_diffusers import EmbedOptions, Engine, RequestLimits, Workflow, testing
from bentoml_diffusers.media import Audio, Video, decode_video, encode_media
from bentoml_diffusers.serving.schema import make_request_model
from bentoml_diffusers.tasks import read_task
from bentoml_diffusers.tasks.sizes import fit_area

LIMITS = RequestLimits(default_steps=2, max_frames=33, max_seconds=2, max_pixel_frames=64 * 64 * 33)
CALL = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 3}
VIDEO_CALL = {**CALL, "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}
SOUND_CALL = {**CALL, "audio_end_in_s": 0.25}


@pytest.fixture(scope="module")
def serve(open_service):
    def open_client(name, pipeline):
        model = bentoml_diffusers.save_model(name, pipeline)
        embed = EmbedOptions(workflow=True)
        return open_service(bentoml_diffusers.service(str(model.tag), limits=LIMITS, embed=embed))

    return open_client


@pytest.fixture(scope="class")  # BentoML's metrics are for one service in a process
def ltx2(serve):
    with serve("tiny-ltx2", testing.tiny_ltx2()) as client:
        yield client


@pytest.fixture(scope="class")
def stable_audio(serve):
    with serve("tiny-stable-audio", testing.tiny_stable_audio()) as client:
        yield client


def streams_of(data):
    with av.open(io.BytesIO(data)) as file:
        return [(stream.type, stream.codec_context.codec.canonical_name) for stream in file.streams]


def levels_of(data):
    frames = decode_video(data, LIMITS).frames
    return np.stack([np.asarray(frame, int) for frame in frames])


def refused_fields(answer):
    assert answer.status_code == 400, answer.content[:500]
    return [place for item in answer.json()["detail"] for place in item["loc"]]


class TestVideo:
    def test_a_video_comes_with_its_sound_and_its_workflow(self, ltx2):
        answer = ltx2.post("/txt2video", json=VIDEO_CALL)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
        assert (answer.headers["x-seed"], answer.headers["x-workflow"]) == ("3", "embedded")
        assert streams_of(answer.content) == [("video", "h264"), ("audio", "aac")]
        workflow = Workflow.from_bytes(answer.content)
        with Engine(testing.tiny_ltx2()) as engine:
            own = engine.run("__call__", **VIDEO_CALL, return_workflow=True).workflow
        assert workflow.output == own.output
        replay = ltx2.post(
            "/replay", files={"workflow": answer.content}, data={"output_format": "webm"}
        )
        assert (replay.status_code, replay.headers["content-type"]) == (200, "video/webm")
        assert replay.headers["x-workflow-match"] == "true"

    @pytest.mark.parametrize(
        ("name", "codec", "workflow"),
        [
            ("mp4-av1", "av1", "embedded"),
            ("webm", "vp9", "embedded"),
            ("webp", None, "embedded"),
            ("gif", None, "no-place"),
        ],
    )
    def test_video_formats(self, ltx2, name, codec, workflow):
        answer = ltx2.post("/txt2video", json={**VIDEO_CALL, "output_format": name})
        assert answer.headers["x-workflow"] == workflow
        if codec is None:
            assert Image.open(io.BytesIO(answer.content)).n_frames == 9
        else:
            assert ("video", codec) in streams_of(answer.content)

    def test_accept_chooses_a_format_where_the_request_does_not(self, ltx2):
        headers = {"accept": "text/html, video/webm;q=0.9, */*"}
        answer = ltx2.post("/txt2video", json=VIDEO_CALL, headers=headers)
        assert answer.headers["content-type"] == "video/webm"
        chosen = {**VIDEO_CALL, "output_format": "gif"}
        answer = ltx2.post("/txt2video", json=chosen, headers=headers)
        assert answer.headers["content-type"] == "image/gif"

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"num_frames": 34}, "num_frames"),  # more than the limit
            ({"num_frames": None}, "num_frames"),  # only the model would know how many it makes
            ({"num_frames": 8}, "num_frames"),  # the autoencoder makes 7 or 9
            ({"height": 128, "width": 128}, "num_frames"),  # pixels times frames
            ({"frame_rate": 0}, "frame_rate"),
            ({"frame_rate": 500}, "frame_rate"),
            ({"output_format": "png"}, "output_format"),
            ({"output_format": "wav"}, "output_format"),
        ],
    )
    def test_a_video_that_cannot_be_is_refused_by_its_field(self, ltx2, changes, field):
        assert refused_fields(ltx2.post("/txt2video", json={**VIDEO_CALL, **changes})) == [field]

    def test_a_replay_in_a_format_of_another_kind_is_refused(self, ltx2):
        answer = ltx2.post("/txt2video", json={**VIDEO_CALL, "output_format": "webp"})
        files, data = {"workflow": answer.content}, {"output_format": "png"}
        assert refused_fields(ltx2.post("/replay", files=files, data=data)) == ["output_format"]


class TestSound:
    @pytest.mark.parametrize("name", [None, "flac", "mp3", "opus"])
    def test_sound(self, stable_audio, name):
        answer = stable_audio.post("/txt2audio", json={**SOUND_CALL, "output_format": name})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("audio/")
        with av.open(io.BytesIO(answer.content)) as file:
            frames = [frame.to_ndarray() for frame in file.decode(audio=0)]
        assert np.abs(np.concatenate(frames, axis=1)).max() > 0
        replay = stable_audio.post("/replay", files={"workflow": answer.content})
        assert replay.headers["x-workflow-match"] == "true"

    def test_too_much_sound_is_refused(self, stable_audio):
        answer = stable_audio.post("/txt2audio", json={**SOUND_CALL, "audio_end_in_s": 3})
        assert refused_fields(answer) == ["audio_end_in_s"]


def test_images_from_noise_alone(serve):
    with serve("tiny-ddpm", testing.tiny_ddpm()) as client:
        answer = client.post("/unconditional", json={"num_inference_steps": 2, "seed": 3})
        assert answer.headers["content-type"] == "image/png", answer.text
        webp = client.post(
            "/unconditional",
            json={"num_inference_steps": 2, "seed": 3},
            headers={"accept": "image/webp"},
        )
    with Engine(testing.tiny_ddpm()) as engine:
        own = engine.run("__call__", num_inference_steps=2, seed=3).images[0]
    assert Image.open(io.BytesIO(answer.content)).tobytes() == own.tobytes()
    assert webp.headers["content-type"] == "image/webp"


@pytest.fixture(scope="module")
def video_file():
    frames = np.random.default_rng(0).random((9, 32, 32, 3))
    return b"".join(encode_media(Video(frames, 8.0, Audio.of(np.zeros(8000), 8000)), "mp4"))


def encode_test_video(count, side, fps=8.0):
    return b"".join(encode_media(Video(np.zeros((count, side, side, 3)), fps), "webm"))


class TestVideoToVideo:
    @pytest.fixture(scope="class")
    def client(self, serve):
        with serve("tiny-video-to-video", tiny_video_to_video()) as client:
            yield client

    def test_frames_of_the_file_are_what_it_starts_from(self, client, video_file):
        data = {**CALL, "height": 32, "width": 32, "num_inference_steps": 4, "strength": 0.5}
        answer = client.post("/video2video", data=data, files={"video": video_file})
        assert answer.status_code == 200, answer.text
        assert streams_of(answer.content) == [("video", "h264")]
        frames = decode_video(video_file, LIMITS).frames
        with Engine(tiny_video_to_video()) as engine:
            (own,) = engine.run("__call__", **data, video=frames).videos
            (other,) = engine.run("__call__", **data, video=frames[::-1]).videos
        made = levels_of(answer.content)
        as_own, as_other = (
            np.abs(made - levels_of(b"".join(encode_media(one, "mp4")))).mean()
            for one in (own, other)
        )
        assert as_own < 1 < as_other  # rounding before a lossy codec
        replay = client.post("/replay", files={"workflow": answer.content})
        assert replay.headers.get("x-workflow-match") == "true", replay.text

    @pytest.mark.parametrize(
        ("make", "why"),
        [
            (lambda: encode_test_video(34, 32, 30.0), "33"),  # frames
            (lambda: encode_test_video(9, 32, 1.0), "seconds"),
            (lambda: encode_test_video(33, 96), "pixels"),
            (lambda: encode_test_video(2, 2064), "2064 x 2064 pixels"),
            (lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n/etc/passwd\n", "not a video"),
            (lambda: b"ffconcat version 1.0\nfile '/etc/passwd'\n", "not a video"),
            (lambda: b"\x89PNG\r\n\x1a\n", "not a video"),
            (lambda: b"\0\0\0\x1cftypisom" + bytes(500), "broken"),
        ],
    )
    def test_a_video_that_is_none_or_too_much_is_refused(self, client, make, why):
        answer = client.post("/video2video", data=CALL, files={"video": make()})
        assert refused_fields(answer) == ["video"]
        assert why in answer.text


def tiny_video_to_video():
    from diffusers import AnimateDiffVideoToVideoPipeline, MotionAdapter

    parts = testing.tiny_stable_diffusion().components
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        channels = tuple(parts["unet"].config.block_out_channels)
        adapter = MotionAdapter(
            block_out_channels=channels,
            motion_layers_per_block=1,
            motion_norm_num_groups=4,
            motion_num_attention_heads=2,
        )
        known = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
        made = AnimateDiffVideoToVideoPipeline(
            **{name: parts[name] for name in known}, motion_adapter=adapter
        )
    made.unet.eval()
    return made


def test_kontext_makes_the_size_that_is_asked_for():
    task = read_task("edit", diffusers.FluxKontextPipeline)
    assert fit_area(task, {"height": 64, "width": 96})["max_area"] == 64 * 96
    assert "max_area" not in fit_area(task, {"height": 64})
    fields = make_request_model(task, RequestLimits()).model_fields
    assert {"height", "width"} <= set(fields)
    assert "max_area" not in fields
