"""A task: inputs and output of one call of a pipeline.

The engine, the recorder, the endpoints and the command line all use this one definition.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bentoml_diffusers._names import suggest_field
from bentoml_diffusers.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bentoml_diffusers.tasks.inputs import Input
    from bentoml_diffusers.tasks.outputs import Output


@dataclass(frozen=True, kw_only=True)
class Task:
    """Inputs and output of one call of a pipeline.

    Attributes:
        name: ``"txt2img"``, the name of a method such as ``"__call__"``, or that of a modular
            workflow.
        pipeline_class: Class with the method that runs.
        method: The method.
        inputs: Its inputs by name, in the order of the method.
        output: Its output.
        takes_all: Any other argument name is accepted as well.
        open_names: Further argument names that are accepted.
        alternatives: Sets of inputs, one of which must be complete; empty for most tasks.
        fixed: Inputs that define the task, with their values; requests cannot set them.
        components: Class of each component that is loaded for it, by name; of modular workflows.
        is_modular: It runs as the blocks of a modular pipeline.
        is_guided: ``guidance_scale`` is not an input, but goes to the pipeline's guider.
    """

    name: str
    pipeline_class: type[Any]
    method: str
    inputs: Mapping[str, Input]
    output: Output
    takes_all: bool = False
    open_names: frozenset[str] = frozenset()
    alternatives: tuple[frozenset[str], ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    components: Mapping[str, str] = field(default_factory=dict)
    is_modular: bool = False
    is_guided: bool = False

    def takes(self, name: str) -> bool:
        """True if an argument of the call can have this name."""
        return name in self.inputs or name in self.open_names or self.takes_all

    def default(self, name: str) -> Any:
        """Returns the value of an input that a request leaves out; ``None`` if it has none."""
        item = self.inputs.get(name)
        return None if item is None else item.default

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns arguments by name.

        Raises:
            InvalidRequest: 400, an argument that the task does not have.
        """
        named = list(self.inputs)
        if len(args) > len(named):
            raise InvalidRequest("arguments", len(args), f"at most {len(named)} positional ones")
        bound = dict(zip(named, args, strict=False))
        for name, value in kwargs.items():
            if name in bound:
                raise InvalidRequest(name, value, "each argument once")
            if not self.takes(name):
                near = suggest_field(name, named)
                raise InvalidRequest(name, value, f"a known argument{near}: {', '.join(named)}")
            bound[name] = value
        return {name: self._with_tuple(name, value) for name, value in bound.items()}

    def with_defaults(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments completed with all defaults, as a record needs them."""
        optional = (
            item for item in self.inputs.values() if item.has_default or not item.is_required
        )
        return {**{item.name: item.default for item in optional}, **arguments}

    def prepare(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Checks the arguments of a modular workflow, and adds those that define it.

        Raises:
            InvalidRequest: 400, names an input that is missing or of a wrong type.
        """
        for item in self.inputs.values():
            value = arguments.get(item.name)
            if value is None and item.is_required:
                raise InvalidRequest(item.name, None, f"{item.expected}: {self._needs()}")
            if value is not None and not item.fits(value):
                raise InvalidRequest(item.name, value, item.expected)
        self._check_alternatives(arguments)
        return {"output": self.output.name, **arguments, **self.fixed}

    def list_missing(self, present: Mapping[str, str]) -> list[str]:
        """Returns the components that are missing for it.

        Args:
            present: Class of each present component, by name. A ControlNet for several kinds of
                control and one for a single kind are not interchangeable.
        """
        return [
            name
            for name, wanted in sorted(self.components.items())
            if name not in present or ("Union" in wanted) != ("Union" in present[name])
        ]

    def requiring(self, name: str) -> Task:
        """Returns the task with an input made required."""
        required = replace(self.inputs[name], is_required=True)
        return replace(self, inputs={**self.inputs, name: required})

    def _with_tuple(self, name: str, value: Any) -> Any:
        """Turns a list into a tuple where the default is one: JSON has only lists."""
        is_pair = name in self.inputs and self.inputs[name].kind == "pair"
        return tuple(value) if is_pair and isinstance(value, list) else value

    def _check_alternatives(self, arguments: Mapping[str, Any]) -> None:
        given = {name for name, value in arguments.items() if value is not None}
        if self.alternatives and not any(names <= given for names in self.alternatives):
            wanted = " or ".join(" and ".join(sorted(names)) for names in self.alternatives)
            raise InvalidRequest(wanted.split()[0], None, f"{wanted}: {self._needs()}")

    def _needs(self) -> str:
        names = [item.name for item in self.inputs.values() if item.is_required]
        return f"{self.name} needs {', '.join(names)}"
