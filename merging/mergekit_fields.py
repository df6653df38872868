"""The fields of a mergekit configuration, and how one is read: strictly, and knowing where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .recipe_parameters import Path, RecipeProblem, quoted, suggestion

FIELDS = {
    "recipe": {
        "models",
        "slices",
        "modules",
        "merge_method",
        "base_model",
        "dtype",
        "out_dtype",
        "tokenizer_source",
        "tokenizer",
        "chat_template",
        "parameters",
    },
    "module": {"models", "slices", "parameters"},
    "model": {"model", "parameters"},
    "slice": {"sources", "base_model", "residual_weight", "parameters"},
    "source": {"model", "layer_range", "parameters"},
    "reference": {"model", "lora", "override_architecture"},
    "location": {"path", "revision"},
    "tokenizer": {"source", "tokens", "pad_to_multiple_of"},
    "token": {"source", "force"},
    "token source": {"kind", "model", "token", "token_id"},
}


class FieldReader:
    """Reads fields; collects notes, and where the native recipe's fields come from."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.origins: dict[Path, Path] = {("method",): ("merge_method",), ("base",): ("base_model",)}
        """Native path -> mergekit path."""

    def origin(self, path: Path) -> Path:
        """Where in mergekit's text the native ``path`` comes from."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]] + path[length:]
        return path

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def fields(self, kind: str, data: Any, path: Path) -> dict[str, Any]:
        """``data`` as a mapping of the fields that ``kind`` has, without those that are null."""
        if not isinstance(data, Mapping):
            raise RecipeProblem(path, f"{quoted(data)} is not a mapping of fields.")
        for key in data:
            if key not in FIELDS[kind]:
                raise RecipeProblem(
                    (*path, key),
                    f"unknown field {quoted(key)}.",
                    "mergekit would ignore it.",
                    suggestion(key, FIELDS[kind]),
                )
        return {key: value for key, value in data.items() if value is not None}

    def items(self, data: Any, path: Path) -> list[Any]:
        if not isinstance(data, list) or not data:
            raise RecipeProblem(path, "a list with at least one entry belongs here.")
        return data

    def reference(self, data: Any, path: Path, native: Path) -> str:
        """The key of a model reference (``path[@revision][+lora[@revision]]`` or its mapping form)."""
        self.origins[native] = path
        if isinstance(data, Mapping):
            fields = self.fields("reference", data, path)
            if "override_architecture" in fields:
                raise RecipeProblem(
                    (*path, "override_architecture"),
                    "this field is not supported.",
                    "The structure is read from the tensors' names.",
                    "Leave it out.",
                    code="E_RECIPE_UNSUPPORTED",
                )
            parts = [self._location(fields.get("model"), (*path, "model"))]
            parts += [self._location(fields["lora"], (*path, "lora"))] if "lora" in fields else []
            return "+".join(parts)
        if not isinstance(data, str) or not data or data.count("+") > 1 or "" in data.split("+"):
            raise RecipeProblem(
                path,
                f"{quoted(data)} is not a model.",
                fix="Write path_or_repo[@revision][+lora[@revision]].",
            )
        return "+".join(self._location(part, path) for part in data.split("+"))

    def _location(self, data: Any, path: Path) -> str:
        if isinstance(data, Mapping):
            fields = self.fields("location", data, path)
            data = fields.get("path")
            data = f"{data}@{fields['revision']}" if "revision" in fields and isinstance(data, str) else data
        if not isinstance(data, str) or data.count("@") > 1 or not data:
            raise RecipeProblem(path, f"{quoted(data)} is not a model.", fix="Write path_or_repo[@revision].")
        return data

    @staticmethod
    def model(key: str) -> dict[str, Any]:
        """The native form of a reference's key."""
        name, _, adapter = key.partition("+")
        return {"model": name, "adapter": adapter} if adapter else {"model": name}
