"""What a request in OpenAI's form asks for, in the words of the native API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.serving.codecs import decode_image, decode_transparency, fit_image
from bentoml_diffusers.serving.dialects.names import (
    EDIT,
    GENERATION,
    MASKED_EDIT,
    UnsupportedOperation,
    add_loras,
    find_task,
)
from bentoml_diffusers.serving.dialects.openai.errors import FieldsRefused
from bentoml_diffusers.serving.dialects.openai.fields import IGNORED, REFUSED, EditRequest
from bentoml_diffusers.serving.options import STEP_SHARES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.options import RequestLimits
    from bentoml_diffusers.serving.dialects.names import ServedModel
    from bentoml_diffusers.serving.dialects.openai.fields import ImageRequest
    from bentoml_diffusers.serving.reader import RequestModel

_EMPTY_PROMPT = "a variation"  # a native request has none without; see `Order.complete`


@dataclass(frozen=True, kw_only=True)
class Order:
    """A translated request.

    Attributes:
        task: Of the service.
        values: By the names of its native fields.
        request: As it came.
        loras: That the name of the model stands for.
        is_prompted: False for a variation, which has no prompt.
        kind: What events of its stream are called.
    """

    task: str
    values: Mapping[str, Any]
    request: ImageRequest
    loras: tuple[str, ...] = ()
    is_prompted: bool = True
    kind: str = "image_edit"

    @property
    def names(self) -> dict[str, str]:
        """What the request calls native fields, for errors."""
        from_model = bool(self.loras) and "lora_weights" not in self._extra
        known = {"mask_image": "mask"}
        if self.request.sides is not None:
            known |= {"height": "size", "width": "size"}
        return {**known, "lora_weights": "model"} if from_model else known

    def complete(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the checked arguments as they are run."""
        return dict(arguments) if self.is_prompted else {**arguments, "prompt": ""}

    @property
    def _extra(self) -> Mapping[str, Any]:
        return self.request.model_extra or {}


@dataclass(frozen=True)
class Translator:
    """Translates requests for one service.

    Attributes:
        requests: What the service takes, by task.
        model: What clients call its model.
        quality_steps: Steps by quality, where an operator chose them.
    """

    requests: Mapping[str, type[RequestModel]]
    model: ServedModel
    quality_steps: Mapping[str, int]

    def generation(self, request: ImageRequest) -> Order:
        """Translates a request of ``/v1/images/generations``.

        Raises:
            FieldsRefused: 400, a field that cannot be.
            UnknownModel: 404, another model.
            UnsupportedOperation: 400, the model does not do it.
        """
        task, sides = find_task(self.requests, GENERATION), request.sides
        size = {} if sides is None else {"width": sides[0], "height": sides[1]}
        return self._order(request, task, size, kind="image_generation")

    def edit(self, request: EditRequest) -> Order:
        """Translates a request of ``/v1/images/edits``. Decodes images.

        Raises:
            FieldsRefused: 400, a field that cannot be, or a broken image.
            UnknownModel: 404, another model.
            UnsupportedOperation: 400, the model does not do it.
        """
        task = find_task(self.requests, MASKED_EDIT if request.mask else EDIT)
        return self._order(request, task, _read_images(request, self.requests[task].limits))

    def variation(self, request: EditRequest) -> Order:
        """Translates a request of ``/v1/images/variations``: an edit without a prompt.

        Raises:
            FieldsRefused: 400, a field that cannot be, or a broken image.
            UnknownModel: 404, another model.
            UnsupportedOperation: 400, the model does not do it.
        """
        task = find_task(self.requests, EDIT)
        if "strength" not in self.requests[task].model_fields:  # it only follows instructions
            raise UnsupportedOperation("variations", self.requests)
        images = _read_images(request, self.requests[task].limits)
        values = {**images, "prompt": _EMPTY_PROMPT}
        return self._order(request, task, values, is_prompted=False)

    def _order(
        self, request: ImageRequest, task: str, values: Mapping[str, Any], **more: Any
    ) -> Order:
        loras, extra = self.model.read(request.model), _read_extra(request)
        twice = sorted(set(extra) & set(values))
        if twice:
            raise FieldsRefused([((twice[0],), "is given by another field, too")])
        own = {"prompt": request.prompt, "n": request.n, **self._choose_steps(task, request)}
        whole = {**own, **values, **extra, **add_loras(loras, extra)}
        return Order(task=task, values=whole, request=request, loras=loras, **more)

    def _choose_steps(self, task: str, request: ImageRequest) -> dict[str, int]:
        """Returns the steps for a quality; nothing where the model knows best."""
        model = self.requests[task]
        field = model.model_fields.get("num_inference_steps")
        if request.quality == "auto" or field is None:
            return {}
        steps = self.quality_steps.get(request.quality)
        if steps is None:
            steps = max(1, round(field.default * STEP_SHARES[request.quality]))
        return {"num_inference_steps": min(steps, model.limits.max_steps)}


def _read_extra(request: ImageRequest) -> dict[str, Any]:
    """Returns the native fields of a request.

    Raises:
        FieldsRefused: 400, one of those that cannot be done.
    """
    extra = {
        name: value for name, value in (request.model_extra or {}).items() if value is not None
    }
    for name in extra:
        if name in REFUSED:
            raise FieldsRefused.unsupported(name, REFUSED[name])
    return {name: value for name, value in extra.items() if name not in IGNORED}


def _read_images(request: EditRequest, limits: RequestLimits) -> dict[str, Any]:
    """Returns the image in the size that is asked for, cropped to its shape, and its mask.

    Raises:
        FieldsRefused: 400, a broken image, or one beyond the limits.
    """
    images = {"image": _decode("image", decode_image, request.image[0], limits)}
    if request.mask is not None:
        images["mask_image"] = _decode("mask", decode_transparency, request.mask, limits)
        sizes = [f"{one.width} x {one.height}" for one in images.values()]
        if len(set(sizes)) > 1:
            text = f"{sizes[1]} pixels, but image is {sizes[0]}"
            raise FieldsRefused([(("mask",), text)])
    if request.sides is None:
        return images
    return {
        name: _decode("size", fit_image, image, request.sides, limits)
        for name, image in images.items()
    }


def _decode(name: str, decode: Any, *arguments: Any) -> Any:
    try:
        return decode(*arguments)
    except ValueError as err:
        raise FieldsRefused([((name,), str(err))]) from err
