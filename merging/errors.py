"""One exception tree for everything that can go wrong.

Every error says three things: *what* happened, *why*, and *what to do*. It carries a stable code
(``E_SHAPE`` …) for programs, and each code belongs to a family with one exit code of the command line. ``FAMILIES``
lists them all (``python app.py errors`` prints it); raising one that is not listed is a bug, and fails as such.
"""

from __future__ import annotations

FAMILIES: dict[int, dict[str, str]] = {
    2: {  # recipe
        "E_RECIPE_READ": "the recipe cannot be read (missing, too large, not UTF-8, not YAML)",
        "E_RECIPE_FIELD": "a field or parameter is unknown, missing or has a wrong value",
        "E_RECIPE_METHOD": "the method is unknown",
        "E_RECIPE_INPUTS": "the number or role of the models does not fit the method",
        "E_RECIPE_UNSUPPORTED": "valid in the mergekit dialect, but not supported here",
    },
    3: {  # inputs
        "E_NOT_FOUND": "a model, file or folder does not exist",
        "E_NOT_A_MODEL": "the path holds nothing that can be merged",
        "E_PATH": "a file name or link that leaves its folder, or is not a plain file",
        "E_HEADER_SIZE": "the safetensors header is missing, cut off or too large",
        "E_HEADER_JSON": "the safetensors header is not the strict JSON that the format asks for",
        "E_HEADER_TENSOR": "a tensor entry in a safetensors header is malformed",
        "E_HEADER_NAME": "a tensor name is duplicated, too long or holds control characters",
        "E_HEADER_LAYOUT": "tensor bytes overlap, leave holes or do not end with the file",
        "E_NOT_SAFETENSORS": "the file is something else (pickle, zip, HTML, a Git-LFS pointer)",
        "E_INDEX": "the shard index is malformed or contradicts the shards",
        "E_AMBIGUOUS": "the folder holds several sets of weights",
        "E_JSON": "a JSON side file (config, index, tokenizer) is malformed",
        "E_ADAPTER": "a LoRA adapter does not fit its base or uses an unsupported feature",
        "E_DTYPE": "a tensor has a data type that cannot be merged",
        "E_QUANTIZED": "the checkpoint is quantised",
        "E_SHAPE": "tensors of the same name differ in shape",
        "E_MISSING_TENSOR": "an input lacks a tensor that the others have",
        "E_EXTRA_TENSOR": "an input has a tensor that the others lack",
        "E_INTEGER_DIFFERS": "an integer or bool tensor is not equal in all inputs",
        "E_VOCABULARY": "the vocabularies of the inputs cannot be aligned",
        "E_INPUT_CHANGED": "an input file was changed while it was being read",
        "E_READ": "an input file could not be read",
        "E_PACKAGE": "a package with models or texts cannot be fetched or is not the expected one",
    },
    4: {  # hub
        "E_HUB_REFERENCE": "not a valid model reference",
        "E_HUB_NOT_FOUND": "the repository, revision or file does not exist on the Hub",
        "E_HUB_GATED": "the repository is gated or private",
        "E_HUB_OFFLINE": "the Hub cannot be reached and the files are not in the cache",
        "E_HUB_CHECKSUM": "a downloaded file does not have the checksum that the Hub states",
        "E_HUB_NETWORK": "the download failed",
    },
    5: {  # output
        "E_OUTPUT_EXISTS": "the output folder exists already",
        "E_OUTPUT_NAME": "the output name cannot be used",
        "E_OUTPUT_WRITE": "the output cannot be written (permissions, read-only disk, I/O error)",
        "E_NO_SPACE": "not enough room on the disk",
        "E_BUSY": "another merge is writing to the same name",
        "E_RESUME": "unfinished work cannot be resumed",
        "E_MEMORY": "the memory limit is too small for this merge",
        "E_DEVICE": "the compute device is not available",
        "E_ADDRESS": "the workbench cannot listen at this address and port",
        "E_WORKER": "a worker process ended unexpectedly",
    },
    6: {  # verification
        "E_VERIFY": "bytes differ from what was written",
        "E_MANIFEST": "the manifest is missing or malformed",
    },
    7: {  # numbers
        "E_NOT_FINITE": "a weight is NaN or infinite",
        "E_OVERFLOW": "a merged value does not fit the output data type",
        "E_LOGITS": "a model computed NaN or infinity while it was evaluated",
        "E_LOSS": "a model's loss or its gradient is NaN or infinite",
    },
    8: {  # tasks and evaluation
        "E_TASK": "a task file is malformed",
        "E_RUN": "a run file is malformed or contradicts another one",
        "E_COMPARE": "evaluation records are missing or do not pair",
        "E_SELECTION": "a model was chosen on items that it would be reported on",
        "E_RECORDS": "a file of evaluation records is malformed",
        "E_HARNESS": "lm-evaluation-harness is not installed, or cannot run the task",
        "E_TEXT": "a calibration text is malformed, empty or does not fit the model",
        "E_NO_LOSS": "the model has no loss that can be computed from a text alone",
    },
    130: {  # the person at the keyboard
        "E_CANCELLED": "stopped on request; what was finished is kept and will be resumed",
    },
}
"""Exit code of the command line -> the error codes that lead to it, with their meaning."""

CODES: dict[str, str] = {code: text for family in FAMILIES.values() for code, text in family.items()}
EXIT_CODES: dict[str, int] = {code: number for number, family in FAMILIES.items() for code in family}


class AmalgamError(Exception):
    """Base of all errors that are not bugs. Never raised itself; see the subclasses."""

    def __init__(self, code: str, what: str, why: str = "", fix: str = ""):
        assert code in CODES, f"unlisted error code {code}"
        self.code, self.what, self.why, self.fix = code, what, why, fix
        super().__init__(code, what, why, fix)

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.code]

    def __reduce__(self) -> tuple:
        """Worker processes send errors; subclasses with other constructors must survive that."""
        return _restored, (type(self), self.code, self.what, self.why, self.fix)

    def __str__(self) -> str:
        return "\n".join([f"{self.what} [{self.code}]", *filter(None, (self.why, self.fix))])


class RecipeError(AmalgamError):
    """The recipe asks for something that does not exist or makes no sense."""


class InputError(AmalgamError):
    """A checkpoint, adapter or side file cannot be used."""


class HubError(AmalgamError):
    """Something between this machine and the Hugging Face Hub."""


class OutputError(AmalgamError):
    """The result cannot be written, or the machine has too little of something."""


class VerificationError(AmalgamError):
    """A finished model is not, byte for byte, what was written."""


class NumbersError(AmalgamError):
    """The arithmetic met or made a number that must not be in a model."""


class TaskError(AmalgamError):
    """An evaluation task cannot be used."""


class Cancelled(AmalgamError):
    """The user stopped the work."""

    def __init__(self, what: str = "Stopped.", fix: str = "Run the same command again to go on."):
        super().__init__("E_CANCELLED", what, "", fix)


def _restored(cls: type[AmalgamError], code: str, what: str, why: str, fix: str) -> AmalgamError:
    error = cls.__new__(cls)
    AmalgamError.__init__(error, code, what, why, fix)
    return error
