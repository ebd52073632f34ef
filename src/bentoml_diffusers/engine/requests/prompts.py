"""Warns about parts of a prompt that its text encoders do not read.

diffusers truncates a prompt to the length of each text encoder, and reads the syntax of other
programs as plain letters. Both change the image, so the caller is told.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from bentoml_diffusers._compat import blocks_of
from bentoml_diffusers.errors import shorten

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bentoml_diffusers.tasks import Task

MAX_WARNINGS = 16
_EXCERPT = 100  # characters of a prompt in a warning
_SPECIAL_TOKENS = 2  # at most so many around a prompt
_ENCODERS = ("", "_2", "_3")
# Syntax of AUTOMATIC1111's web UI (modules/prompt_parser.py, extra_networks.py) and successors.
_SYNTAX = (
    (re.compile(r"<\w+:[^<>]{1,200}>"), "name LoRAs in lora_weights"),
    (re.compile(r"(?<!\\)\([^():]{1,200}:\s*[+-]?[\d.]+\s*\)"), "there is no emphasis"),
    (
        re.compile(r"(?<!\\)\[[^\[\]:]{0,200}:[^\[\]:]{0,200}:\s*[\d.]+\s*\]"),
        "words do not change during the steps",
    ),
    (re.compile(r"(?<!\\)(?:\({2,}[^()]{1,200}\){2,}|\[{2,}[^\[\]]{1,200}\]{2,})"), "no emphasis"),
)
_OUR_PIPELINES = ("diffusers.", "bentoml_diffusers.")


def warn_of_prompts(
    pipeline: Any, arguments: Mapping[str, Any], max_sequence_length: int | None
) -> tuple[str, ...]:
    """Returns warnings about parts of the prompts that were not read as written.

    Not thread-safe: a tokenizer keeps the settings of its last call.

    Args:
        pipeline: The view that runs, with the tokenizers of the request.
        arguments: Of the request.
        max_sequence_length: Tokens that text encoders other than CLIP read; ``None``: unknown.
    """
    if not _reads_plainly(pipeline):
        return ()
    found: dict[str, None] = {}
    for field in ("prompt", "negative_prompt"):
        for suffix in _ENCODERS:
            for text in _texts(arguments.get(f"{field}{suffix}")):
                found |= dict.fromkeys(_find_syntax(f"{field}{suffix}", text))
            limit = _find_limit(pipeline, suffix, max_sequence_length)
            name = field if arguments.get(f"{field}{suffix}") is None else f"{field}{suffix}"
            for text in _texts(arguments.get(name)) if limit else ():
                found |= dict.fromkeys(_find_cut(pipeline, suffix, name, text, limit or 0))
    return tuple(found)[:MAX_WARNINGS]


def find_sequence_length(task: Task, arguments: Mapping[str, Any]) -> int | None:
    """Returns how many tokens of a prompt text encoders other than CLIP read."""
    given = arguments.get("max_sequence_length")
    length = task.default("max_sequence_length") if given is None else given
    return length if isinstance(length, int) else None


def _reads_plainly(pipeline: Any) -> bool:
    """False for custom code, which may have its own syntax and length."""
    blocks = blocks_of(pipeline)
    parts = getattr(blocks, "sub_blocks", {})
    reader = parts.get("text_encoder", blocks) if blocks is not None else pipeline
    return type(reader).__module__.startswith(_OUR_PIPELINES)


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [text for text in values if isinstance(text, str) and text]


def _find_syntax(field: str, text: str) -> Iterator[str]:
    for pattern, reason in _SYNTAX:
        matches = list(dict.fromkeys(match.group() for match in pattern.finditer(text)))
        if matches:
            listed = ", ".join(shorten(match, _EXCERPT) for match in matches[:3])
            more = f" and {len(matches) - 3} more" if len(matches) > 3 else ""
            yield f"{field}: {listed}{more} was read as plain letters: {reason}"


def _find_limit(pipeline: Any, suffix: str, max_sequence_length: int | None) -> int | None:
    """Returns how many tokens a text encoder reads; ``None`` if unknown, or without encoder."""
    from transformers import PreTrainedTokenizerBase

    tokenizer = getattr(pipeline, f"tokenizer{suffix}", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    if getattr(pipeline, f"text_encoder{suffix}", None) is None:
        return None
    if "CLIP" in type(tokenizer).__name__:
        return int(tokenizer.model_max_length)
    return max_sequence_length


def _find_cut(pipeline: Any, suffix: str, field: str, text: str, limit: int) -> Iterator[str]:
    if len(text.encode()) + _SPECIAL_TOKENS <= limit:  # no token is less than a byte
        return
    tokenizer = getattr(pipeline, f"tokenizer{suffix}")
    added = tokenizer.added_tokens_encoder
    if hasattr(pipeline, "maybe_convert_prompt") and any(token in text for token in added):
        text = pipeline.maybe_convert_prompt(
            text, tokenizer
        )  # placeholder tokens with several vectors
    ids = tokenizer(text, truncation=False, verbose=False).input_ids
    if len(ids) > limit:
        cut = shorten(tokenizer.decode(ids[limit - 1 : -1]).strip(), _EXCERPT)
        yield (
            f"{field}: text_encoder{suffix} reads {limit} tokens, "
            f"the last {len(ids) - limit} of {len(ids)} were cut: {cut}"
        )
