"""Every classic pipeline: imported, stored, loaded in a new process, run, served by a runner."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from comparing import same_image
from diffusers import ModelMixin
from diffusers.schedulers import ScoreSdeVpScheduler
from PIL import Image

import bentoml_diffusers
from bentoml_diffusers import store, testing
from bentoml_diffusers.loading.score_sde_vp import ScoreSdeVpPipeline

STEPS = {"num_inference_steps": 2}
WORDS = {"prompt": "a red circle", **STEPS}
SIZE = {"height": 32, "width": 32}
CALLS = {
    "ddpm": STEPS,
    "ddim": STEPS,
    "pndm": {"num_inference_steps": 4},
    "ldm-text": {**WORDS, **SIZE},
    "ldm": STEPS,
    "score-sde-ve": STEPS,
    "score-sde-vp": STEPS,
    "karras-ve": STEPS,
    "dance-diffusion": {**STEPS, "audio_length_in_s": 512 / 16_000},
    "sd": WORDS,
    "sd-img2img": {**WORDS, "strength": 1.0, "image": (32, 32)},
    "sd-inpaint": {**WORDS, **SIZE, "image": (32, 32), "mask_image": (32, 32)},
    "sdxl": {**WORDS, **SIZE},
    "sd3": {**WORDS, **SIZE, "max_sequence_length": 16},
    "flux": {**WORDS, **SIZE, "max_sequence_length": 16},
    "pixart-sigma": {
        **WORDS,
        **SIZE,
        "max_sequence_length": 16,
        "use_resolution_binning": False,
        "clean_caption": False,
    },
}
REPAIRED = {"score-sde-vp": "library", "karras-ve": "library", "dance-diffusion": "time_embedding"}


def make_arguments(call):
    """Images are given by their size; each is the same in every process."""
    return {
        key: Image.linear_gradient("L").resize(value).convert("RGB")
        if isinstance(value, tuple)
        else value
        for key, value in call.items()
    }


def array_of(output):
    """The first part of an output as one array: images as integers, or audio."""
    first = output.to_tuple()[0] if hasattr(output, "to_tuple") else output[0]
    return np.stack([np.asarray(item) for item in first])


def run_all(tags, path):
    """Runs each stored model by `load_model` and by a runner; writes what comes to a file."""
    results = {}
    for name, tag in tags.items():
        arguments = make_arguments(CALLS[name])
        pipeline = bentoml_diffusers.load_model(tag)
        pipeline.set_progress_bar_config(disable=True)
        direct = pipeline(**arguments, generator=torch.Generator().manual_seed(7))
        runner = bentoml_diffusers.get(tag).to_runner()
        runner.init_local(quiet=True)
        results[f"{name}/direct"] = array_of(direct)
        results[f"{name}/served"] = array_of(runner.run(**arguments, seed=7))
        results[f"{name}/other"] = array_of(runner.run(**arguments, seed=8))
    np.savez(path, **results)


@pytest.fixture(scope="module")
def expected():
    """What each pipeline gives before it is saved."""
    return {}


@pytest.fixture(scope="module")
def tags(tmp_path_factory, expected):
    """All pipelines, saved by diffusers and imported from their folders."""
    found = {}
    for name, call in CALLS.items():
        pipeline = tiny.build(name.removesuffix("-img2img"))
        folder = tmp_path_factory.mktemp(name)
        pipeline.save_pretrained(folder)
        options = {}
        if name == "dance-diffusion":
            make_old(folder)
        if name == "sd-img2img":
            options["pipeline_class"] = "StableDiffusionImg2ImgPipeline"
            from diffusers import StableDiffusionImg2ImgPipeline

            pipeline = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
        model = bentoml_diffusers.import_model(f"classic-{name}", folder, **options)
        generator = torch.Generator().manual_seed(7)
        expected[name] = array_of(pipeline(**make_arguments(call), generator=generator))
        found[name] = str(model.tag)
    return found


def make_old(folder):
    """As checkpoints were before diffusers 0.36: the size of the time's embedding is not said."""
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("time_embedding_dim") == 16
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def results(tags, tmp_path_factory):
    """What two new processes make of them."""
    files = [tmp_path_factory.mktemp("results") / f"{number}.npz" for number in range(2)]
    processes = [start(tags, file) for file in files]
    for process in processes:
        _, messages = process.communicate(timeout=280)
        assert process.returncode == 0, messages[-3000:]
    return [np.load(file) for file in files]


def start(tags, file):
    code = f"import test_store_classic as t; t.run_all({tags!r}, {str(file)!r})"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": _tests_and_package()},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _tests_and_package():
    return os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_new_process_makes_the_same(results, expected, name):
    direct, served, other = (results[0][f"{name}/{by}"] for by in ("direct", "served", "other"))
    # Weights from a file lie elsewhere in memory, where some processors round otherwise.
    assert same_image(direct, expected[name]), "load_model gives another image than before saving"
    assert (served == direct).all(), "a seed of the runner gives another image than its generator"
    assert (other != served).any(), "the seed changes nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CALLS))
def test_two_processes_make_the_same_bits_of_one_stored_model(results, name):
    for by in ("direct", "served"):
        one, other = (result[f"{name}/{by}"] for result in results)
        assert (one == other).all()


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="it is an option of MKL")
def test_strictly_reproducible_weights_may_lie_anywhere():
    code = "import test_store_classic as t; t.run_saved_and_loaded()"
    environment = {**os.environ, "PYTHONPATH": _tests_and_package(), "MKL_CBWR": "AUTO,STRICT"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True)


def run_saved_and_loaded():
    call = {**CALLS["flux"], "output_type": "np"}
    pipeline = tiny.build("flux")
    before = pipeline(**call, generator=torch.Generator().manual_seed(7)).images
    loaded = bentoml_diffusers.load_model(bentoml_diffusers.save_model("strict", pipeline))
    after = loaded(**call, generator=torch.Generator().manual_seed(7)).images
    assert (before == after).all(), np.abs(before - after).max()


@pytest.mark.parametrize("name", sorted(CALLS))
def test_only_what_needs_it_is_repaired(tags, name):
    record = store.read_record(Path(bentoml_diffusers.get(tags[name]).path))
    assert bool(record.repairs) == (name in REPAIRED)
    assert REPAIRED.get(name, "") in " ".join(record.repairs)
    assert record.class_name
    assert record.components
    assert store.verify(bentoml_diffusers.get(tags[name])).is_intact


def test_a_repaired_model_is_the_same_when_imported_again(tags, tmp_path, name):
    tiny.build("karras-ve").save_pretrained(tmp_path)
    first = bentoml_diffusers.import_model(name, tmp_path)
    assert bentoml_diffusers.import_model(name, tmp_path).tag == first.tag


def test_the_source_is_not_repaired(tmp_path, name):
    tiny.build("karras-ve").save_pretrained(tmp_path)
    before = (tmp_path / "model_index.json").read_bytes()
    bentoml_diffusers.import_model(name, tmp_path, link="hard")
    assert (tmp_path / "model_index.json").read_bytes() == before


def test_saved_from_memory_they_load_too(name):
    for kind in REPAIRED:
        model = bentoml_diffusers.save_model(f"{name}-{kind}", tiny.build(kind))
        assert type(bentoml_diffusers.load_model(model)) is type(tiny.build(kind))


def test_given_latents_reproduce_a_image(model, run_local, pixels):
    latents = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(3))
    call = {**WORDS, "guidance_scale": 1.0}
    run = run_local(model)
    one, two = (pixels(run(**call, latents=latents, seed=seed)) for seed in (1, 2))
    direct = pixels(bentoml_diffusers.load_model(model)(**call, latents=latents).images[0])
    assert (one == two).all()
    assert (one == direct).all()
    assert (pixels(run(**call, seed=1)) != one).any()


class Gaussian(ModelMixin):
    """The exact noise predictor of data that are normal, with a known mean and spread."""

    def __init__(self, mean, spread, scheduler):
        super().__init__()
        self.mean, self.spread, self.scheduler = mean, spread, scheduler
        self.times = []
        self.register_buffer("where", torch.zeros(1))

    def forward(self, sample, time):
        self.times.append(float(time[0]))
        t = time[0] / 999.0
        low, high = self.scheduler.config.beta_min, self.scheduler.config.beta_max
        kept = torch.exp(-0.25 * t**2 * (high - low) - 0.5 * t * low)
        variance = (kept * self.spread) ** 2 + 1 - kept**2
        noise = (1 - kept**2).sqrt() * (sample - kept * self.mean) / variance
        return type("Output", (), {"sample": noise})


def test_the_vp_sampler_reaches_the_distribution_of_its_data():
    """With the exact score the SDE ends at the data: here N(0.3, 0.2 squared) per pixel."""
    scheduler = ScoreSdeVpScheduler()
    pipeline = ScoreSdeVpPipeline(testing.tiny_ddpm().unet, scheduler)
    exact = Gaussian(0.3, 0.2, scheduler)
    exact.config = pipeline.unet.config
    pipeline.unet = exact
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(64, num_inference_steps=300, generator=generator, output_type="np").images
    data = images * 2 - 1
    # 64 x 192 samples: standard errors 0.002; the rest is the size of the steps.
    assert abs(data.mean() - 0.3) < 0.02
    assert abs(data.std() - 0.2) < 0.02
    assert exact.times[0] == pytest.approx(999.0)
    assert exact.times[-1] == pytest.approx(0.999, rel=1e-3)


def test_the_vp_sampler_takes_latents_and_refuses_wrong_ones():
    pipeline = tiny.build("score-sde-vp")
    latents = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(3))
    one, two = (
        pipeline(
            num_inference_steps=2,
            latents=latents,
            generator=torch.Generator().manual_seed(5),
            output_type="np",
            return_dict=False,
        )[0]
        for _ in range(2)
    )
    assert (one == two).all()
    with pytest.raises(ValueError, match="latents: got shape"):
        pipeline(num_inference_steps=2, latents=latents[:, :1])
