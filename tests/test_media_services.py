"""Services of pipelines that make video, audio, or images without the usual names."""

import io

import av
import numpy as np
import pytest
from PIL import Image

import bentoml_diffusers
from bentoml_diffusers import EmbedOptions, Engine, RequestLimits, Workflow, testing

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


def refused_fields(answer):
    assert answer.status_code == 400, answer.text
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
