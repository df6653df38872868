"""From a checkpoint to a network in memory that can be run forwards and backwards.

The one idea: a statistic means something only if every weight is the file's. transformers fills a tensor that it does
not find with random numbers and drops one that it does not know; here both are errors. Weights are float32 whatever
the file has, attention is the plain (eager) one, the network is in evaluation mode, and no code of the model's own is
run.

The weights are read through ``Checkpoint``, as a merge reads them: an adapter on its base is a model like any other,
and a file that shrinks meanwhile is an error and not the end of the process, as it would be for a mapped file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.checkpoints.checkpoint import Checkpoint, Source
from merging.checkpoints.header import ITEM_BITS, TORCH_NAMES
from merging.checkpoints.layout import IGNORABLE
from merging.errors import AmalgamError, InputError

if TYPE_CHECKING:
    import torch

CAUSAL, MASKED, CLASSIFIER, IMAGE, ENCODER = "causal", "masked", "classifier", "image", "encoder"
"""What a network is for: the next token, hidden tokens, the class of a text, the class of an image, no task at all."""

_CLASSES = {  # end of the architecture's name -> (kind, class of transformers)
    "ForCausalLM": (CAUSAL, "AutoModelForCausalLM"),
    "LMHeadModel": (CAUSAL, "AutoModelForCausalLM"),
    "ForMaskedLM": (MASKED, "AutoModelForMaskedLM"),
    "ForSequenceClassification": (CLASSIFIER, "AutoModelForSequenceClassification"),
    "ForTokenClassification": (CLASSIFIER, "AutoModelForTokenClassification"),
    "ForImageClassification": (IMAGE, "AutoModelForImageClassification"),
    "Model": (ENCODER, "AutoModel"),
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_MOST_CONTEXT = 10**9  # transformers writes 10^30 where a tokenizer states no limit


@dataclass
class Network:
    """A model in memory.

    ``context``: the most tokens that it can take, None if it does not say; ``vocabulary``: rows of its token embedding,
    0 without one; ``stored``: name of a parameter -> name of its tensor in the files; ``tied``: other names of a
    parameter that stands in several places -> the name it is listed by.
    """

    module: torch.nn.Module
    kind: str
    tokenizer: Any
    path: Path
    context: int | None
    vocabulary: int
    device: str
    stored: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name in the files, parameter), each parameter once however often it is used."""
        for name, parameter in self.module.named_parameters():
            yield self.stored.get(name, name), parameter


def load_network(checkpoint: Checkpoint, *, device: str = "cpu", tokenizer_from: Sequence[Path] = ()) -> Network:
    """Load an opened checkpoint as a network in float32.

    Args:
        checkpoint: a model folder with a config.json, or an adapter or single file that stands on such a folder.
        device: where the network will be, as torch names it.
        tokenizer_from: further folders to look for a tokenizer, after the model's own (and its base's, for an adapter).

    Memory: the network in float32, and one tensor more while loading.

    Raises:
        InputError: ``E_NOT_A_MODEL`` nothing that transformers loads, or a kind of model that is not in ``_CLASSES``;
            ``E_MISSING_TENSOR``, ``E_EXTRA_TENSOR``, ``E_SHAPE`` the weights are not those of the config.
    """
    import torch
    import transformers  # seconds to import, so only now

    folder = checkpoint.base.path if checkpoint.base is not None else checkpoint.path
    kind, class_name = _class_for(checkpoint, folder)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(folder, **local)
            with torch.device("meta"):  # takes no memory; only to learn the class, which accepts tensors
                concrete = type(getattr(transformers, class_name).from_config(config, trust_remote_code=False))
            loaded = concrete.from_pretrained(
                None,
                config=config,
                state_dict={name: _read(source) for name, source in checkpoint.tensors.items()},
                dtype=torch.float32,
                attn_implementation="eager",  # on short texts faster than the fused kernels
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that we can say which
            )
            if (folder / "generation_config.json").is_file() and loaded[0].can_generate():
                loaded[0].generation_config = transformers.GenerationConfig.from_pretrained(folder, **local)
        except AmalgamError:
            raise
        except Exception as error:  # whatever a foreign folder makes the library do
            first = str(error).strip().split("\n")[0][:300]
            what = f"{checkpoint.path} cannot be loaded as a network."
            why = f"transformers says: {type(error).__name__}: {first}"
            raise InputError("E_NOT_A_MODEL", what, why, "Check that its files are complete.") from error
        module, report = loaded
        refuse_wrong_weights(checkpoint.path, report)
        tokenizer = _tokenizer(transformers, [checkpoint.path, folder, *tokenizer_from], local)
    module = module.eval().to(device)
    context, vocabulary = _context(module.config, tokenizer), _vocabulary(module)
    network = Network(module, kind, tokenizer, checkpoint.path, context, vocabulary, device)
    _name_parameters(network, checkpoint)
    return network


def run(network: Network, inputs: Mapping[str, torch.Tensor], where: str, **options: Any) -> Any:
    """The network's output for one batch; ``options`` are passed on to it.

    Raises InputError ``E_NOT_A_MODEL``, naming ``where``, if it cannot be run on that.
    """
    given = options | {name: value.to(network.device) for name, value in inputs.items()}
    if network.kind == CAUSAL:
        given["use_cache"] = False  # nothing is generated: keys and values would be kept for nothing
    try:
        return network.module(**given)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        first = str(error).strip().split("\n")[0][:300]
        why = f"It says: {type(error).__name__}: {first}"
        raise InputError("E_NOT_A_MODEL", f"{network.path} cannot be run on {where}.", why, "") from error


def _class_for(checkpoint: Checkpoint, folder: Path) -> tuple[str, str]:
    config = checkpoint.config
    if config is None:
        what, fix = f"{folder} has no config.json.", "Choose a transformers model folder."
        raise InputError("E_NOT_A_MODEL", what, "Without it nobody knows what to compute with the weights.", fix)
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""
    for ending, found in _CLASSES.items():
        if name.endswith(ending):
            return found
    what = f"{folder}: a model of the architecture {name or '(none)'!r} cannot be run here."
    known = ", ".join(sorted(_CLASSES.keys() - {"Model"}))
    raise InputError(
        "E_NOT_A_MODEL", what, f"Known are names that end in {known}.", 'See "architectures" in config.json.'
    )


def refuse_wrong_weights(path: Path, report: dict[str, Any]) -> None:
    """Raise unless transformers found exactly the weights of the config (its ``output_loading_info``)."""
    for code, kind, verb in (
        ("E_MISSING_TENSOR", "missing_keys", "lacks"),
        ("E_EXTRA_TENSOR", "unexpected_keys", "has, beyond its config,"),
        ("E_SHAPE", "mismatched_keys", "has in the wrong shape"),
    ):
        names = {key if isinstance(key, str) else key[0] for key in report.get(kind, ())}
        if found := sorted(name for name in names if not IGNORABLE.fullmatch(name)):
            what = f"{path} {verb} {found[0]}" + (f" and {len(found) - 1} more." if len(found) > 1 else ".")
            why = "What is measured would be that of partly random weights."
            raise InputError(code, what, why, "Check that config.json belongs to these weights.")


def _read(source: Source) -> torch.Tensor:
    """A whole tensor; floating-point numbers as float32, which transformers then keeps instead of copying."""
    import torch

    raw = torch.empty(source.numel * ITEM_BITS[source.dtype] // 8, dtype=torch.uint8)
    source.read(0, source.numel, raw.numpy().data)
    tensor = raw.view(getattr(torch, TORCH_NAMES[source.dtype])).view(source.shape)
    return tensor.float() if tensor.is_floating_point() else tensor


def _tokenizer(transformers: Any, folders: Sequence[Path], local: dict[str, Any]) -> Any:
    """The tokenizer of the first folder that has one; None if none has."""
    for folder in dict.fromkeys(folders):
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            try:
                return transformers.AutoTokenizer.from_pretrained(folder, **local)
            except Exception as error:
                first = str(error).strip().split("\n")[0][:300]
                why = f"transformers says: {type(error).__name__}: {first}"
                fix = "Check that its files are complete."
                raise InputError("E_NOT_A_MODEL", f"The tokenizer in {folder} cannot be loaded.", why, fix) from error
    return None


def _context(config: Any, tokenizer: Any) -> int | None:
    """Tokens that the model can take: of its position embedding and of its tokenizer, the smaller."""
    stated = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    return min((n for n in stated if isinstance(n, int) and 0 < n < _MOST_CONTEXT), default=None)


def _vocabulary(module: Any) -> int:
    try:
        weight = module.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return 0
    return weight.shape[0] if weight.ndim == 2 else 0


def _name_parameters(network: Network, checkpoint: Checkpoint) -> None:
    """Fill ``stored`` and ``tied``."""
    listed = {id(parameter): name for name, parameter in network.module.named_parameters()}
    for name, parameter in network.module.named_parameters(remove_duplicate=False):
        first = listed[id(parameter)]
        if name != first:
            network.tied[name] = first
        for candidate in _file_names(network.module, name, parameter):
            source = checkpoint.tensors.get(candidate)
            if source is not None and source.shape == tuple(parameter.shape):
                network.stored.setdefault(first, candidate)
                break
    network.tied = {
        network.stored.get(name, name): network.stored.get(first, first) for name, first in network.tied.items()
    }


def _file_names(module: Any, name: str, parameter: torch.Tensor) -> Iterator[str]:
    """What the parameter ``name`` may be called in the files, the likeliest first."""
    yield name
    prefix = module.base_model_prefix + "."  # files may lack, or have, the part under which a head keeps its body
    yield name.removeprefix(prefix)
    yield prefix + name
    with contextlib.suppress(Exception):  # transformers renames old names while loading; this is its way back
        from transformers.core_model_loading import revert_weight_conversion

        meta = parameter.detach().to("meta")
        for old in revert_weight_conversion(module, {name: meta}):
            yield old
            yield old.removeprefix(prefix)


def import_libraries() -> None:
    """Spend the seconds that importing takes now, and not when the first network is wanted."""
    import transformers

    for name in {name for _, name in _CLASSES.values()} | {"AutoConfig", "AutoTokenizer"}:
        getattr(transformers, name)


@contextlib.contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """torch computes on ``count`` CPU threads within. Small models are fastest with one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and reports on the terminal: what matters in them becomes an error of ours."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
