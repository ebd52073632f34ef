"""A task: what one call of a pipeline takes and gives.

All that must know this asks here: the engine, the recorder, the endpoints, the command line.
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
    """What one call of a pipeline takes and gives.

    Attributes:
        name: ``"txt2img"``, a method's name such as ``"__call__"``, or that of a modular workflow.
        pipeline_class: Class whose method runs.
        method: The method.
        inputs: What it takes, by name, in the order of the method.
        output: What it gives.
        takes_all: Any other name is taken as well.
        open_names: Other names that are taken beside the inputs.
        alternatives: Sets of inputs, one of which must be given whole; none for most.
        fixed: Inputs that make it what it is, with their values; a request has no say in them.
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
        """Returns what the call runs with where a request leaves an input out, else ``None``."""
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
        """Returns the arguments with the defaults of all others, as a record needs them."""
        optional = (
            item for item in self.inputs.values() if item.has_default or not item.is_required
        )
        return {**{item.name: item.default for item in optional}, **arguments}

    def prepare(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Checks the arguments of a modular workflow and adds those that make it what it is.

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
        """Returns the components that it lacks.

        Args:
            present: Class of each component that is there, by name. A ControlNet for several
                kinds of control and one for a single kind do not stand for each other.
        """
        return [
            name
            for name, wanted in sorted(self.components.items())
            if name not in present or ("Union" in wanted) != ("Union" in present[name])
        ]

    def requiring(self, name: str) -> Task:
        """Returns the task with an input that must be given."""
        required = replace(self.inputs[name], is_required=True)
        return replace(self, inputs={**self.inputs, name: required})

    def _with_tuple(self, name: str, value: Any) -> Any:
        """Pipelines add pairs to tuples; JSON has lists only."""
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
