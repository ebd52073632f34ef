"""The workflow as a pydantic model.

Format 1. When a field changes in a way that older code would misread, raise ``VERSION`` by one,
describe the change here, convert older files in :func:`_upgrade`, and add a file of the old
version to ``tests/formats/workflows``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PrivateAttr, ValidationError

from bentoml_diffusers.errors import InvalidWorkflow
from bentoml_diffusers.options import MAX_SEED
from bentoml_diffusers.workflow.files.blobs import collect, decode_base64, encode_base64, find_blobs
from bentoml_diffusers.workflow.files.bounds import LOCAL, Bounds, read_json
from bentoml_diffusers.workflow.files.bundles import (
    FILENAME,
    Bundle,
    open_bundle,
    push_bundle,
    read_bundle,
    write_bundle,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from bentoml_diffusers.options import RequestLimits

FORMAT: Final = "bentoml_diffusers.workflow"
VERSION: Final = 1

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Config = dict[str, JsonValue]


class Part(BaseModel):
    """Base of a workflow's parts: strict and frozen."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, hide_input_in_errors=True, allow_inf_nan=False
    )


class StoredModel(Part):
    """The stored model that was used."""

    tag: str | None = None
    tree_sha256: Sha256 | None = Field(None, description="Hash over all files of the pipeline.")
    origin: str | None = Field(None, description="Hub repository, or another origin.")
    commit: str | None = None


class Component(Part):
    """A component of the pipeline."""

    class_name: str
    dtype: str | None = None
    device: str | None = None
    quantization: str | None = None


class Attached(Part):
    """An adapter that was loaded into the pipeline itself, for all of its calls."""

    kind: Literal["lora", "ip_adapter", "textual_inversion"]
    component: str
    name: str
    scale: JsonValue = None
    is_active: bool = True
    details: Config = Field(default_factory=dict, description="Rank, alpha, type, targets.")
    sha256: Sha256 = Field(description="Hash over its weights.")


class Adapter(Part):
    """A LoRA or textual inversion from a file: of the request, or static."""

    kind: Literal["lora", "textual_inversion"]
    name: str = Field(description="Name in the request.")
    tag: str | None = Field(None, description="Tag of the store's entry.")
    scale: float | Config = Field(1.0, description="A number, or by component and block.")
    components: list[str] = Field(
        default_factory=list, description="Denoisers that were chosen for it."
    )
    token: str | None = None
    arguments: Config = Field(default_factory=dict)
    details: Config = Field(default_factory=dict, description="Rank, alpha ..., where known.")
    is_fused: bool = False
    sha256: Sha256 = Field(description="Hash of its file.")


class Pipeline(Part):
    """The pipeline that ran, and the adapters in it.

    ``weights_sha256`` is a fingerprint: name, shape, dtype and some of the numbers of each weight.
    """

    class_name: str
    method: str = "__call__"
    kind: Literal["classic", "custom", "modular"] = "classic"
    model: StoredModel | None = None
    weights_sha256: Sha256 | None = None
    code_sha256: Sha256 | None = None
    blocks: list[str] = Field(default_factory=list)
    config: Config = Field(default_factory=dict)
    components: dict[str, Component] = Field(default_factory=dict)
    options: Config = Field(default_factory=dict)
    attached: list[Attached] = Field(default_factory=list)
    static_adapters: list[Adapter] = Field(default_factory=list)


class Scheduler(Part):
    """The scheduler that ran."""

    class_name: str
    config: Config
    requested: str | None = Field(None, description="Name in the request.")


class Guider(Part):
    """The guider of a modular pipeline."""

    class_name: str
    config: Config


class Generator(Part):
    """A generator that the caller passed; ``state`` only if it had been used before."""

    device: str
    seed: int = Field(ge=-(2**63), lt=2**64)
    state: Config | None = None


class Environment(Part):
    """What else the exact bits of an image depend on."""

    versions: dict[str, str] = Field(default_factory=dict)
    hardware: dict[str, str] = Field(default_factory=dict)
    numerics: Config = Field(default_factory=dict)


class OutputPart(Part):
    """One image, tensor or array of the output."""

    kind: str
    shape: list[int]
    sha256: Sha256


class Output(Part):
    """The output, as a hash over pixels and numbers, not over files."""

    sha256: Sha256
    parts: list[OutputPart] = Field(default_factory=list)


class Workflow(Part):
    """Everything that made an image, so that it can be made again.

    Not a *modular workflow*, which is a task of a modular pipeline in diffusers. Images,
    tensors and arrays are blobs, named by their sha256, beside the text.

    Attributes:
        pipeline: The pipeline, its model, code, components, and adapters.
        task: The task in the request, such as ``"txt2img"``.
        arguments: All arguments of the method, defaults included.
        seeds: One per image; none if ``generators`` or the caller's latents decide.
        generators: Generators that the caller passed.
        scheduler: Class and config.
        guider: Class and config, for modular pipelines.
        adapters: LoRAs and textual inversions of the request.
        unsupported: Arguments that cannot be recorded, such as callbacks, with a description.
        environment: Versions, hardware, numerics.
        exclusive: It ran alone because the request asked for it.
        keep_size: The input image was padded to a size that the pipeline takes, the output cropped.
        batched: Other requests shared its forwards, so its last bits depend on them.
        output: Hash over the output.
    """

    format: Literal["bentoml_diffusers.workflow"] = FORMAT
    version: Literal[1] = VERSION
    pipeline: Pipeline
    task: str | None = None
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    seeds: list[Seed] = Field(default_factory=list)
    generators: list[Generator] = Field(default_factory=list)
    scheduler: Scheduler | None = None
    guider: Guider | None = None
    adapters: list[Adapter] = Field(default_factory=list)
    unsupported: dict[str, str] = Field(default_factory=dict)
    environment: Environment = Field(default_factory=Environment)
    exclusive: bool = False
    keep_size: bool = False
    batched: bool = False
    output: Output | None = None

    _blobs: dict[str, bytes] = PrivateAttr(default_factory=dict)

    @property
    def blobs(self) -> Mapping[str, bytes]:
        """Returns images, tensors and arrays, by their sha256."""
        return self._blobs

    @classmethod
    def from_json(cls, data: bytes | str, limits: RequestLimits | None = None) -> Workflow:
        """Reads a workflow from one text, which contains its blobs as base64.

        Args:
            data: Text from :meth:`to_json`.
            limits: Limits of a service, for untrusted text; ``None`` for trusted text.

        Raises:
            InvalidWorkflow: 400, broken, changed, of a newer version, or beyond the limits.
        """
        text = data.encode(errors="surrogatepass") if isinstance(data, str) else data
        return cls._from_bundle(Bundle(text), LOCAL if limits is None else Bounds.of(limits))

    @classmethod
    def from_bytes(cls, data: bytes, limits: RequestLimits | None = None) -> Workflow:
        """Reads a workflow from the bytes of a file: an image, a zip, or JSON of :meth:`to_json`.

        Args:
            data: Content of the file.
            limits: Limits of a service, for an untrusted file; ``None`` for a trusted one.

        Raises:
            InvalidWorkflow: 400, broken, changed, of a newer version, or beyond the limits.
        """
        bounds = LOCAL if limits is None else Bounds.of(limits)
        return cls._from_bundle(read_bundle(data, bounds), bounds)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        filename: str = FILENAME,
        *,
        revision: str = "main",
        token: str | None = None,
    ) -> Workflow:
        """Loads a workflow.

        Args:
            source: A folder, a JSON file, a zip, an image, or a hub repository.
            filename: File in the folder or repository.
            revision: Branch, tag or commit of the hub repository.
            token: For a private repository; by default that of the hub's login or HF_TOKEN.

        Raises:
            InvalidWorkflow: 400, broken, changed, or of a newer version.
            InvalidModel: 400, the repository has no such file.
            ModelNotFound: 404, no such file, folder or repository.
            HubUnavailable: 503, the hub could not be reached, or answered with an error.
        """
        bundle = open_bundle(source, filename, revision=revision, token=token)
        return cls._from_bundle(bundle, LOCAL)

    def with_blobs(self, found: Mapping[str, bytes]) -> Workflow:
        """Returns the workflow with more blobs, by their sha256."""
        copied = self.model_copy()
        copied._blobs = {**self._blobs, **found}
        return copied

    def with_output(self, output: Output, *, batched: bool = False) -> Workflow:
        """Returns the workflow with its output, and whether others shared its forwards."""
        return self.model_copy(update={"output": output, "batched": batched})

    def to_json(self, *, indent: int | None = None, inline_blobs: bool = True) -> str:
        """Returns the workflow as one text.

        Args:
            indent: Spaces per level; ``None`` for one line.
            inline_blobs: Include the blobs, as base64.
        """
        values = self.model_dump(mode="json")
        if inline_blobs and self._blobs:
            values["blobs"] = {name: encode_base64(data) for name, data in self._blobs.items()}
        return json.dumps(values, indent=indent, ensure_ascii=False, allow_nan=False)

    def save_workflow(
        self,
        folder: str | os.PathLike[str],
        filename: str = FILENAME,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str = "Add a workflow",
    ) -> Path:
        """Writes the workflow into a folder, with its blobs in ``blobs/``.

        Args:
            folder: Created if it does not exist.
            filename: ``*.json``, or ``*.zip`` for text and blobs in one file.
            push_to_hub: Upload the same files too.
            repo_id: Model repository on the hub, created if it does not exist; by default the
                name of the folder, in the user's own namespace.
            token: By default that of the hub's login or HF_TOKEN.
            private: Whether a new repository is private.
            commit_message: Commit message of the upload.

        Returns:
            The file.

        Raises:
            InvalidWorkflow: 400, an invalid file name, or a missing blob.
            ModelNotFound: 404, no such repository, or the token may not write to it.
            HubUnavailable: 503, the hub could not be reached, or answered with an error.
            StorageFull: 507, no space left.
        """
        root = Path(folder).expanduser()
        text = self.to_json(indent=2, inline_blobs=False)
        written = write_bundle(root, filename, text, self._blobs_by_file())
        if push_to_hub:
            name = repo_id or root.resolve().name
            push_bundle(written, name, token=token, private=private, message=commit_message)
        return root / filename

    def _blobs_by_file(self) -> dict[str, bytes]:
        found = {}
        for field, sha256, extension in find_blobs(self.model_dump(mode="json")):
            if sha256 not in self._blobs:
                raise InvalidWorkflow(field, None, f"the blob {sha256}, which is missing")
            found[f"{sha256}.{extension}"] = self._blobs[sha256]
        return found

    @classmethod
    def _from_bundle(cls, bundle: Bundle, bounds: Bounds) -> Workflow:
        values = read_json(bundle.text, bounds)
        inlined = values.pop("blobs", {})
        if not isinstance(inlined, dict):
            raise InvalidWorkflow("workflow.blobs", inlined, "an object whose values are strings")

        def read(name: str) -> bytes | None:
            sha256 = name.partition(".")[0]
            if sha256 in inlined:
                return decode_base64(f"workflow.blobs.{sha256}", inlined[sha256])
            return bundle.read(name)

        values = _upgrade(values)
        found = collect(values, read, bounds)
        try:
            return cls.model_validate(values).with_blobs(found)
        except ValidationError as err:
            raise _first_fault(err) from err


def _upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the values of any older version to the current one.

    Raises:
        InvalidWorkflow: 400, not a workflow of this package, or one of a newer version.
    """
    if values.get("format") != FORMAT:
        raise InvalidWorkflow("workflow.format", values.get("format"), repr(FORMAT))
    version = values.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InvalidWorkflow("workflow.version", version, "an integer from 1")
    if version > VERSION:
        raise InvalidWorkflow(
            "workflow.version", version, f"up to {VERSION}: upgrade bentoml-diffusers to read it"
        )
    return dict(values)


_EXPECTED = {
    "extra_forbidden": "no such field",
    "missing": "a value: the field is required",
    "string_pattern_mismatch": "a sha256: 64 digits of 0-9 and a-f",  # the only pattern
}


def _first_fault(error: ValidationError) -> InvalidWorkflow:
    fault = error.errors(include_url=False, include_input=True)[0]
    field = ".".join(["workflow", *(str(part) for part in fault["loc"])])
    got = None if fault["type"] == "missing" else fault["input"]
    message = fault["msg"].removeprefix("Input should be ")
    expected = _EXPECTED.get(fault["type"], message[:1].lower() + message[1:])
    return InvalidWorkflow(field, got, expected)
