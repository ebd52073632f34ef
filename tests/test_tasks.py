"""What a call takes and gives: tasks of classes, and the options of a request."""

import dataclasses
import inspect

import diffusers
import pytest

import bentoml_diffusers
from bentoml_diffusers import Engine, ModelOptions, RequestOptions, errors, testing
from bentoml_diffusers.tasks import (
    OPTION_NAMES,
    OPTION_PLACES,
    find_tasks,
    list_classic_tasks,
    read_task,
)
from bentoml_diffusers.workflow import Workflow


def list_classes():
    """Every pipeline class that diffusers exports and that can be called."""
    found = {}
    for name in dir(diffusers):
        if "Pipeline" not in name:
            continue
        cls = getattr(diffusers, name)
        is_pipeline = isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)
        if is_pipeline and any("__call__" in vars(base) for base in cls.__mro__):
            found[cls.__name__] = cls
    return found


class TestEveryClass:
    @pytest.fixture(scope="class")
    def tasks(self):
        return {name: read_task("__call__", cls) for name, cls in list_classes().items()}

    def test_each_has_a_task(self, tasks):
        assert len(tasks) > 250
        for name, task in tasks.items():
            parameters = inspect.signature(task.pipeline_class.__call__).parameters
            named = [item for item in parameters.values() if item.kind not in (2, 4)]
            assert list(task.inputs) == [item.name for item in named][1:], name

    def test_types_are_known(self, tasks):
        """Names whose type nothing says; a new one is looked at by a person once."""
        kinds = {}
        for task in tasks.values():
            for item in task.inputs.values():
                kinds.setdefault(item.name, set()).add(item.kind)
        # Lists of strings in Blip Diffusion, images in Versatile Diffusion.
        assert {"string"} <= kinds["prompt"] <= {"string", "structure", "image"}
        assert {"integer"} <= kinds["num_inference_steps"] <= {"integer", "structure"}
        assert {"mask"} <= kinds["mask_image"] <= {"mask", "tensor"}
        assert kinds["generator"] == {"generator"}
        assert kinds["strength"] == {"number"}
        opaque = {name for name, found in kinds.items() if found == {"other"}}
        assert opaque >= {"callback_on_step_end", "callback"}
        assert not {"image", "height", "width", "guidance_scale", "negative_prompt"} & opaque

    def test_outputs_are_known(self, tasks):
        kinds = {name: task.output.kind for name, task in tasks.items()}
        assert kinds["StableDiffusionPipeline"] == kinds["FluxKontextPipeline"] == "image"
        assert kinds["KandinskyCombinedPipeline"] == "image"
        assert kinds["WanPipeline"] == kinds["LTXImageToVideoPipeline"] == "video"
        assert kinds["AudioLDM2Pipeline"] == kinds["StableAudioPipeline"] == "audio"
        assert kinds["FluxPriorReduxPipeline"] == "other"
        assert sum(kind == "other" for kind in kinds.values()) <= 20

    def test_most_inputs_say_what_they_mean(self, tasks):
        texts = [item.description for task in tasks.values() for item in task.inputs.values()]
        assert sum(bool(text) for text in texts) > 0.8 * len(texts)
        task = tasks["StableDiffusionPipeline"]
        assert task.inputs["guidance_scale"].description.startswith("A higher guidance scale")
        assert task.output.others == ("nsfw_content_detected",)


class TestTasksOfAPipeline:
    def test_sister_classes(self):
        found = list_classic_tasks(diffusers.StableDiffusionPipeline)
        assert {name: task.pipeline_class.__name__ for name, task in found.items()} == {
            "txt2img": "StableDiffusionPipeline",
            "text2img": "StableDiffusionPipeline",
            "img2img": "StableDiffusionImg2ImgPipeline",
            "inpaint": "StableDiffusionInpaintPipeline",
        }
        assert found["inpaint"].inputs["mask_image"].is_required
        assert not found["txt2img"].inputs["height"].is_required

    @pytest.mark.parametrize("name", ["FluxPriorReduxPipeline", "KandinskyV22PriorPipeline"])
    def test_none_of_other_outputs(self, name):
        assert not list_classic_tasks(getattr(diffusers, name))

    def test_methods_of_a_class(self):
        class Mega(diffusers.StableDiffusionPipeline):
            def generate(self, prompt, steps: int = 3, *, image=None, generator=None, **more):
                """Another method."""

        task = find_tasks(Mega.__new__(Mega)).find("generate")
        kinds = {name: (item.kind, item.is_required) for name, item in task.inputs.items()}
        assert kinds == {
            "prompt": ("string", True),
            "steps": ("integer", False),
            "image": ("image", False),
            "generator": ("generator", False),
        }
        assert task.takes("anything")
        assert task.output.kind == "other"

    @pytest.mark.parametrize("name", ["_check", "__init__", "txt3img"])
    def test_unknown(self, name):
        with pytest.raises(errors.InvalidRequest, match=r"^task: "):
            find_tasks(testing.tiny_stable_diffusion()).find(name)

    def test_annotations_that_cannot_be_read(self):
        class Broken(diffusers.StableDiffusionPipeline):
            def __call__(self, prompt: "Unknown", height: int = 8):  # noqa: F821
                """Like code from elsewhere."""

        task = read_task("__call__", Broken)
        assert (task.inputs["prompt"].kind, task.inputs["height"].kind) == ("string", "integer")


class TestRequestOptions:
    @pytest.fixture(scope="class")
    def engine(self):
        with Engine(testing.tiny_stable_diffusion()) as engine:
            yield engine

    def test_as_an_object_and_as_keywords(self, engine):
        call = {"prompt": "a red circle", "num_inference_steps": 1}
        options = RequestOptions(seed=3, exclusive=True)
        assert engine.run("txt2img", **call, options=options).seeds == (3,)
        assert engine.run("txt2img", **call, options=options, seed=4).seeds == (4,)

    @pytest.mark.parametrize("method", ["submit", "run", "arun", "stream"])
    def test_help_shows_each(self, method):
        shown = inspect.signature(getattr(Engine, method)).parameters
        assert set(shown) >= OPTION_NAMES | {"task", "options", "arguments"}
        assert shown["exclusive"].default is False

    @pytest.mark.parametrize("function", [Engine.from_model, bentoml_diffusers.service])
    def test_help_shows_the_options_of_a_model(self, function):
        fields = {item.name for item in dataclasses.fields(ModelOptions)}
        assert set(inspect.signature(function).parameters) >= fields

    def test_what_decides_about_the_image_has_a_place_in_a_workflow(self):
        assert set(OPTION_PLACES) < OPTION_NAMES
        for place in OPTION_PLACES.values():
            assert place.partition(".")[0] in Workflow.model_fields

    @pytest.mark.parametrize("value", [0, -1, True, "soon", float("nan")])
    def test_timeout(self, value):
        with pytest.raises(errors.InvalidRequest, match="timeout_s"):
            RequestOptions(timeout_s=value)
