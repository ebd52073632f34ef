"""Converts arguments of a pipeline to JSON and blobs, and back.

Types that JSON lacks become an object with ``$kind``: image, tensor, array, tuple, generator,
dtype, device. Nothing is ever imported or called by a name in it.
"""

from __future__ import annotations

import contextlib
import enum
import io
import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors import numpy as array_files
from safetensors import torch as tensor_files

from bentoml_diffusers.errors import InvalidWorkflow
from bentoml_diffusers.workflow.files import KIND, LOCAL, Generator, name_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic import JsonValue

    from bentoml_diffusers.workflow.files import Bounds

_KEY = "value"  # name of the single tensor in a blob
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_RAW_MODES = ("CMYK", "F", "HSV", "I", "LAB", "RGBX", "YCbCr")
_PNG_LEVEL = 3
_UNREADABLE = (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError)


class UnsupportedValue(Exception):
    """A value that cannot be recorded; the text describes it."""


class Encoder:
    """Writes values as JSON, and collects their blobs and generators.

    Attributes:
        blobs: By sha256.
        generators: Each generator once, however often it occurs.
    """

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.generators: list[Generator] = []
        self._seen: list[torch.Generator] = []

    def encode_all(
        self, arguments: Mapping[str, Any]
    ) -> tuple[dict[str, JsonValue], dict[str, str]]:
        """Returns the arguments that can be recorded, and descriptions of the others."""
        kept: dict[str, JsonValue] = {}
        unsupported: dict[str, str] = {}
        for name, value in arguments.items():
            with self._noting(name, unsupported):
                kept[name] = self.encode(value)
        return kept, unsupported

    @contextlib.contextmanager
    def _noting(self, name: str, unsupported: dict[str, str]) -> Iterator[None]:
        try:
            yield
        except UnsupportedValue as reason:
            unsupported[name] = str(reason)

    def encode(self, value: Any) -> JsonValue:
        """Returns a value as JSON.

        Raises:
            UnsupportedValue: It, or a part of it, cannot be recorded.
        """
        if value is None or type(value) in (bool, int, str):
            return value  # type: ignore[no-any-return]
        if isinstance(value, enum.Enum) and isinstance(value, (str, int)):
            return self.encode(value.value)  # which compares equal to an integer
        if isinstance(value, np.generic) and value.ndim == 0:
            return self.encode(value.item())
        for kind, write in _WRITERS:
            if isinstance(value, kind):
                return write(self, value)  # type: ignore[no-any-return]
        raise UnsupportedValue(_describe(value))

    def _keep(self, data: bytes) -> str:
        name = name_of(data)
        self.blobs[name] = data
        return name

    def _write_float(self, value: float) -> JsonValue:
        return value if math.isfinite(value) else {KIND: "float", "value": repr(float(value))}

    def _write_list(self, value: list[Any]) -> JsonValue:
        return [self.encode(item) for item in value]

    def _write_tuple(self, value: tuple[Any, ...]) -> JsonValue:
        if type(value) is not tuple:
            raise UnsupportedValue(_describe(value))
        return {KIND: "tuple", "items": self._write_list(list(value))}

    def _write_dict(self, value: dict[Any, Any]) -> JsonValue:
        if all(isinstance(key, str) for key in value) and KIND not in value:
            return {key: self.encode(item) for key, item in value.items()}
        items: list[JsonValue] = [[self.encode(key), self.encode(value[key])] for key in value]
        return {KIND: "dict", "items": items}

    def _write_image(self, value: Image.Image) -> JsonValue:
        about: dict[str, JsonValue] = {"mode": value.mode, "size": list(value.size)}
        if value.mode in _RAW_MODES:
            return {KIND: "pixels", "blob": self._keep(value.tobytes()), **about}
        if value.mode not in _PNG_MODES:
            raise UnsupportedValue(f"an image of mode {value.mode}")
        clean = value.copy()  # without the metadata of its source file
        known = value.info.get("transparency")
        clean.info = {} if known is None else {"transparency": known}
        buffer = io.BytesIO()
        clean.save(buffer, "PNG", compress_level=_PNG_LEVEL)
        return {KIND: "image", "blob": self._keep(buffer.getvalue()), **about}

    def _write_tensor(self, value: torch.Tensor) -> JsonValue:
        try:
            data = tensor_files.save({_KEY: value.detach().cpu().contiguous()})
        except _UNREADABLE as err:
            raise UnsupportedValue(f"a tensor of {value.dtype}, {value.layout}: {err}") from err
        return {
            KIND: "tensor",
            "blob": self._keep(data),
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "device": value.device.type,
        }

    def _write_array(self, value: np.ndarray[Any, Any]) -> JsonValue:
        plain = value.astype(value.dtype.newbyteorder("="), order="C")
        try:
            data = array_files.save({_KEY: plain})
        except _UNREADABLE as err:
            raise UnsupportedValue(f"an array of {value.dtype}: {err}") from err
        about: dict[str, JsonValue] = {"dtype": str(plain.dtype), "shape": list(plain.shape)}
        return {KIND: "array", "blob": self._keep(data), **about}

    def _write_generator(self, value: torch.Generator) -> JsonValue:
        if not any(value is one for one in self._seen):
            self._seen.append(value)
            self.generators.append(self._describe_generator(value))
        index = next(index for index, one in enumerate(self._seen) if one is value)
        return {KIND: "generator", "index": index}

    def _describe_generator(self, value: torch.Generator) -> Generator:
        device, seed, state = value.device.type, value.initial_seed(), value.get_state()
        fresh = torch.Generator(value.device).manual_seed(seed).get_state()
        if torch.equal(state, fresh):
            return Generator(device=device, seed=seed)
        return Generator(device=device, seed=seed, state=self._write_bytes(bytes(state.numpy())))

    def _write_bytes(self, value: bytes) -> dict[str, JsonValue]:
        return {KIND: "bytes", "blob": self._keep(value)}

    def _write_dtype(self, value: torch.dtype) -> JsonValue:
        return {KIND: "dtype", "name": str(value).removeprefix("torch.")}

    def _write_device(self, value: torch.device) -> JsonValue:
        return {KIND: "device", "name": value.type}


_WRITERS: Sequence[tuple[type, Any]] = (
    (float, Encoder._write_float),
    (list, Encoder._write_list),
    (tuple, Encoder._write_tuple),
    (dict, Encoder._write_dict),
    (Image.Image, Encoder._write_image),
    (torch.Tensor, Encoder._write_tensor),
    (np.ndarray, Encoder._write_array),
    (torch.Generator, Encoder._write_generator),
    (bytes, Encoder._write_bytes),
    (torch.dtype, Encoder._write_dtype),
    (torch.device, Encoder._write_device),
)


class Decoder:
    """Converts values of a workflow back.

    Args:
        blobs: By sha256.
        generators: The workflow's generators.
        device: The pipeline's: values from a device of this type go there, all others to the CPU.
        bounds: Limits on the size of images.
    """

    def __init__(
        self,
        blobs: Mapping[str, bytes],
        generators: Sequence[Generator] = (),
        device: str = "cpu",
        bounds: Bounds = LOCAL,
    ) -> None:
        self._blobs = blobs
        self._generators = generators
        self._device = device
        self._bounds = bounds
        self._made: dict[int, torch.Generator] = {}

    def decode_all(self, arguments: Mapping[str, JsonValue]) -> dict[str, Any]:
        """Returns the arguments.

        Raises:
            InvalidWorkflow: 400, a value that :class:`Encoder` would not write.
        """
        return {
            name: self.decode(value, f"workflow.arguments.{name}")
            for name, value in arguments.items()
        }

    def decode(self, value: Any, field: str) -> Any:
        """Returns a value.

        Raises:
            InvalidWorkflow: 400, a value that :class:`Encoder` would not write.
        """
        if isinstance(value, list):
            return [self.decode(item, f"{field}[{index}]") for index, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if KIND not in value:
            return {key: self.decode(item, f"{field}.{key}") for key, item in value.items()}
        read = _READERS.get(str(value[KIND]))
        if read is None:
            raise InvalidWorkflow(f"{field}.{KIND}", value[KIND], f"one of {', '.join(_READERS)}")
        try:
            return read(self, value, field)
        except InvalidWorkflow:
            raise
        except (*_UNREADABLE, OSError, SyntaxError, IndexError) as err:
            what = f"{type(err).__name__}: {err}"
            raise InvalidWorkflow(field, what, f"a complete {value[KIND]}") from err

    def _read_blob(self, value: dict[str, Any], field: str) -> bytes:
        data = self._blobs.get(value["blob"])
        if data is None:
            raise InvalidWorkflow(field, None, f"the blob {value['blob']}, which is missing")
        return data

    def _read_float(self, value: dict[str, Any], _field: str) -> float:
        return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[value["value"]]

    def _read_tuple(self, value: dict[str, Any], field: str) -> tuple[Any, ...]:
        return tuple(self.decode(list(value["items"]), field))

    def _read_dict(self, value: dict[str, Any], field: str) -> dict[Any, Any]:
        return dict(self.decode(list(value["items"]), field))

    def _read_image(self, value: dict[str, Any], field: str) -> Image.Image:
        data = io.BytesIO(self._read_blob(value, field))
        with warnings.catch_warnings():
            # Pillow warns above 89 million pixels; our own limit is checked below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            try:
                image = Image.open(data, formats=["PNG"])
            except (UnidentifiedImageError, Image.DecompressionBombError) as err:
                raise ValueError(str(err)) from err
        self._check_pixels(image.size, field)
        image.load()
        if image.mode != value["mode"] or list(image.size) != value["size"]:
            raise InvalidWorkflow(field, (image.mode, image.size), "mode and size as recorded")
        return image.copy()  # not from a file

    def _read_pixels(self, value: dict[str, Any], field: str) -> Image.Image:
        width, height = value["size"]
        self._check_pixels((width, height), field)
        if value["mode"] not in _RAW_MODES:
            raise InvalidWorkflow(f"{field}.mode", value["mode"], f"one of {', '.join(_RAW_MODES)}")
        return Image.frombytes(value["mode"], (width, height), self._read_blob(value, field))

    def _check_pixels(self, size: tuple[int, int], field: str) -> None:
        width, height = size
        most = self._bounds
        if not (0 < width <= most.max_side and 0 < height <= most.max_side) or (
            width * height > most.max_pixels
        ):
            raise InvalidWorkflow(
                field,
                f"{width} x {height} pixels",
                f"at most {most.max_side} per side and {most.max_pixels} in all",
            )

    def _read_tensor(self, value: dict[str, Any], field: str) -> torch.Tensor:
        tensor = tensor_files.load(self._read_blob(value, field))[_KEY]
        return tensor.to(self._device) if value["device"] == self._device else tensor

    def _read_array(self, value: dict[str, Any], field: str) -> np.ndarray[Any, Any]:
        return array_files.load(self._read_blob(value, field))[_KEY]

    def _read_generator(self, value: dict[str, Any], _field: str) -> torch.Generator:
        index = value["index"]
        if index not in self._made:
            if not 0 <= index < len(self._generators):
                raise IndexError(f"there is no generator {index}")
            self._made[index] = self._make_generator(self._generators[index], index)
        return self._made[index]

    def _make_generator(self, recorded: Generator, index: int) -> torch.Generator:
        device = recorded.device if recorded.device in ("cpu", self._device) else "cpu"
        generator = torch.Generator(device).manual_seed(recorded.seed)
        if recorded.state is not None and device == recorded.device:
            state = self.decode(recorded.state, f"workflow.generators[{index}].state")
            generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
        return generator

    def _read_dtype(self, value: dict[str, Any], _field: str) -> torch.dtype:
        dtype = getattr(torch, str(value["name"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"there is no dtype {value['name']!r}")
        return dtype

    def _read_device(self, value: dict[str, Any], _field: str) -> torch.device:
        return torch.device(self._device if value["name"] == self._device else "cpu")


_READERS: Mapping[str, Any] = {
    "array": Decoder._read_array,
    "bytes": Decoder._read_blob,
    "device": Decoder._read_device,
    "dict": Decoder._read_dict,
    "dtype": Decoder._read_dtype,
    "float": Decoder._read_float,
    "generator": Decoder._read_generator,
    "image": Decoder._read_image,
    "pixels": Decoder._read_pixels,
    "tensor": Decoder._read_tensor,
    "tuple": Decoder._read_tuple,
}


def _describe(value: Any) -> str:
    """Describes a value without its content; a function by its name."""
    name = getattr(value, "__qualname__", None)
    return f"{type(value).__name__} {name}" if isinstance(name, str) else type(value).__name__
