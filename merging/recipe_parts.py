"""The parts of a recipe, each a small strict value. ``recipe.py`` puts them together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

MAX_MODELS = 256
RESERVED = frozenset({"auto", "base", "union", "none", "zero"})
"""Words with a meaning of their own where a model could be named."""


class Part(BaseModel):
    """Common settings: unknown fields are errors, values are not converted, objects do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def check_reference(text: str) -> str:
    """``text`` if it can be a path or repository name, existing or not; ValueError otherwise."""
    if not text.strip() or text != text.strip() or len(text) > 1024 or not text.isprintable():
        raise ValueError("a model is a local path or org/name[@revision]: one line, without spaces around it")
    return text


class ShortForm(Part):
    """Something that names a model, and may be written as nothing but that name."""

    model: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, data: Any) -> Any:
        return {"model": data} if isinstance(data, str) else data

    @model_serializer(mode="wrap")
    def _to_name(self, full: SerializerFunctionWrapHandler) -> Any:
        data = full(self)
        return data if any(v not in (None, {}) for k, v in data.items() if k != "model") else self.model


class Model(ShortForm):
    """A model: a local path or ``org/name[@revision]``, and optionally a LoRA adapter on top of it."""

    adapter: str | None = None

    @field_validator("model", "adapter")
    @classmethod
    def _printable(cls, text: str | None) -> str | None:
        return text if text is None else check_reference(text)

    @property
    def key(self) -> str:
        """The model in one string, equal for equal models: ``model`` or ``model+adapter``."""
        return self.model if self.adapter is None else f"{self.model}+{self.adapter}"


class Expert(Model):
    """One of the models to merge, with its own parameters."""

    name: str | None = None
    """A short name of its own, to be used elsewhere in the recipe and in reports."""
    parameters: dict[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _short(cls, name: str | None) -> str | None:
        if name is not None:
            check_reference(name)
            if name in RESERVED or len(name) > 64:
                raise ValueError(
                    f"a name has at most 64 characters and is none of {', '.join(sorted(RESERVED))}"
                )
        return name

    @property
    def label(self) -> str:
        return self.name or self.key


class Source(Part):
    """Layers ``layers[0]`` up to, not including, ``layers[1]`` of one expert (or of the base)."""

    model: str
    """Name or reference of an expert, or the base's reference."""
    layers: list[int] = Field(min_length=2, max_length=2)
    parameters: dict[str, Any] = Field(default_factory=dict)

    @field_validator("layers")
    @classmethod
    def _ordered(cls, layers: list[int]) -> list[int]:
        if not 0 <= layers[0] < layers[1] <= 100_000:
            raise ValueError("layers is [first, end) with 0 <= first < end")
        return layers


class Slice(Part):
    """A run of output blocks, made from equally long runs of layers of its sources.

    The base takes part with the layers that it has when listed among the sources, else with those of the
    first source.
    """

    sources: list[Source] = Field(min_length=1, max_length=MAX_MODELS)
    base: Model | None = None
    """Another base for this slice only: an expert's name, or a model."""
    parameters: dict[str, Any] = Field(default_factory=dict)


class Include(Part):
    """Which kinds of tensors the method is applied to; the others stay as they are in the base (in the
    first expert if there is no base). None: as the method suggests."""

    embeddings: bool | None = None
    head: bool | None = None
    norms: bool | None = None
    biases: bool | None = None


class TokenSource(Part):
    """The embedding row of a token in one model, by the token's text or its number."""

    model: str
    token: str | None = None
    token_id: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenSource:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("give either token or token_id")
        return self


def _name_or_token(data: Any) -> str:
    return "name" if isinstance(data, str) else "token"


class TokenRule(Part):
    """Where the embedding row of one token comes from."""

    source: (
        Annotated[
            Annotated[str, Tag("name")] | Annotated[TokenSource, Tag("token")], Discriminator(_name_or_token)
        ]
        | None
    ) = None
    """``zero``, a model, or a token of a model. None: the base's row, else the mean of the rows there are."""
    force: bool = False
    """Use this row for every model, also for those that have the token themselves."""

    @model_validator(mode="after")
    def _force_what(self) -> TokenRule:
        if self.force and self.source is None:
            raise ValueError("force needs a source")
        return self


class Tokenizer(Part):
    """Whose vocabulary the result has. ``auto``: the base's (first expert's), which the others must share."""

    source: str = "auto"
    """``auto``, ``base``, ``union``, or one of the models (an expert's name, or a reference)."""
    tokens: dict[str, TokenRule] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(default=None, ge=1, le=1 << 20)


class Policies(Part):
    """What to do when the inputs do not fit together. The default is always to say so and stop."""

    extra_tensors: Literal["refuse", "drop", "copy"] = "refuse"
    missing_tensors: Literal["refuse", "base"] = "refuse"
    non_finite: Literal["refuse", "propagate"] = "refuse"
    overflow: Literal["refuse", "allow"] = "refuse"
