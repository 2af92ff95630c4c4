"""Build models from checkpoints, and write checkpoints of models.

Classes that a checkpoint names are looked up in `MODEL_CLASSES`. `hub.checkpoints` reads the files.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .demucs import Demucs
from .errors import MissingDependencyError, ModelLoadingError, OptionError
from .hdemucs import HDemucs
from .htdemucs import HTDemucs
from .hub.checkpoints import read_package, write_safetensors
from .hub.pickles import ClassName
from .log import logger
from .utils import Uninitialized, atomic_write, capture_init, shortened

__all__ = [
    "capture_init",
    "copy_state",
    "get_quantizer",
    "get_state",
    "load_model",
    "save_model",
    "save_with_checksum",
    "serialize_model",
    "set_state",
    "swap_state",
]

QUANTIZED = "__quantized"  # the key that marks a state of diffq's
CHECKSUM_DIGITS = 8
PACKED_WIDTH = 32  # weights in a block of diffq's bit packing
FACTORIES = frozenset(("empty", "zeros", "ones", "full", "rand", "randn"))  # of weights

# Families of models: the name that a checkpoint has for each class, below its package.
MODEL_CLASSES: dict[str, type[nn.Module]] = {
    "demucs.Demucs": Demucs,
    "hdemucs.HDemucs": HDemucs,
    "htdemucs.HTDemucs": HTDemucs,
    "wdemucs.WDemucs": HDemucs,
}
PACKAGES = ("demucs", "demucs_infer")  # that checkpoints are from

MORE_WEIGHTS, MORE_VALUES = 5000, 10**8  # than its state holds, which a model is built for
# Values that the largest tensor of a window may have: of any model, and for each of its weights.
FREE_VALUES, VALUES_PER_WEIGHT = 25 * 10**6, 4
# One step of an LSTM needs as much memory as this many values.
STEP_VALUES = 256

# Names that a quantized state has for the class of diffq that unpacks it.
QUANTIZERS = ("diffq.uniform.UniformQuantizer", "diffq.diffq.DiffQuantizer")

# Options of other releases that act in training only.
TRAINING_OPTIONS = frozenset(
    ("dropout", "weight_decay", "lr", "rescale", "dconv_init", "end_iters", "emb_smooth")
)


def load_model(
    path_or_package: str | os.PathLike[str] | Mapping[str, Any], strict: bool = False
) -> nn.Module:
    """Build the model of a checkpoint file, or of a package that was read before.

    Weights become float32. Options that this release does not know are dropped with a warning if
    they cannot change the result (they act in training only, or are `None` or `False`); with
    `strict` they never are. Raises `ModelLoadingError` otherwise, and for a file or state that
    does not fit; `MissingDependencyError` for a quantized state without diffq.
    """
    if isinstance(path_or_package, Mapping):
        return build_model(path_or_package, "the package", strict)
    return build_model(read_package(path_or_package), str(path_or_package), strict)


def build_model(package: Mapping[str, Any], label: str, strict: bool = False) -> nn.Module:
    """Build the model of a package as `load_model` does. Errors begin with `label`.

    A package that contradicts itself may still fail in its first window.
    """
    try:
        model: Any = _build(package, strict).eval()
        # The engine reports an error in the first window of a shape as one of the file.
        model.unproven = label
        return model
    except MissingDependencyError:
        raise
    except ModelLoadingError as exc:
        raise ModelLoadingError(f"{label}: {exc}") from exc
    except OptionError as exc:
        raise ModelLoadingError(
            f"{label}: does not describe a model that is supported: {exc}"
        ) from exc
    except Exception as exc:
        # Damaged and hostile descriptions raise exceptions of all kinds.
        reason = shortened(exc)
        raise ModelLoadingError(f"{label}: does not describe a model ({reason})") from exc


def _build(package: Mapping[str, Any], strict: bool) -> nn.Module:
    model_class, state = _model_class(package["klass"]), package["state"]
    kwargs = _known_options(model_class, dict(package.get("kwargs", {})), strict)
    quantized = bool(state.get(QUANTIZED))
    if quantized:
        _import_diffq()
    weights, values = _most_weights(state, quantized)
    # Without memory: the weights are about to be replaced, and any size may be asked for.
    with _Budget(weights, values), torch.device("meta"), Uninitialized():
        model = model_class(*package.get("args", ()), **kwargs)
    if quantized:
        # No weight is free: a small file should not become a large model.
        wanted = sum(parameter.numel() for parameter in model.parameters())
        if wanted > values:
            raise ModelLoadingError(f"the weights do not fit: {values} bits for {wanted} weights")
        set_state(model.to_empty(device="cpu"), state)
    else:
        _assign_state(model, state)
    _check_finite(model)
    _check_window(model)
    return model


def _check_window(model: nn.Module) -> None:
    """Raise `ModelLoadingError` for a model whose window is too large for its number of weights.

    A small file should not ask for a large machine. The widths, lengths and numbers of bins of the
    levels, and the tokens of a transformer, tell the size of the largest tensor.
    """
    options: Any = model.options
    weights = sum(parameter.numel() for parameter in model.parameters())
    limit = FREE_VALUES + VALUES_PER_WEIGHT * weights
    length = float(options.segment) * options.samplerate
    if isinstance(model, Demucs):
        length = float(model.valid_length(math.ceil(length))) * (1 + options.resample)
    nfft = getattr(options, "nfft", 0)
    # A spectrogram has twice as many complex values as its signal.
    channels = options.audio_channels * len(options.sources)
    largest = (4 if nfft else 1) * channels * length
    steps, bins, width = length, nfft / 2, options.audio_channels
    for level in range(options.depth):
        # The input of a level is padded to a multiple of its stride.
        largest = max(largest, width * max(steps, options.stride))
        width = options.channels * options.growth**level
        steps, bins = steps / options.stride, max(1.0, bins / options.stride)
        columns = max(steps, bins * length * 4 / nfft) if nfft else steps
        # Gated units have twice the width.
        largest = max(largest, 2 * width * columns)
    tokens = bins * length * 4 / nfft if getattr(options, "t_layers", 0) else 0
    # The steps of an LSTM are run one after the other.
    recurrent = STEP_VALUES * steps if getattr(options, "lstm_layers", 0) else 0
    if max(largest, tokens**2, recurrent) > limit:
        raise ModelLoadingError(
            f"a window takes {max(largest, tokens**2, recurrent):.0f} values, more than the"
            f" {limit} that a model of its size may take: its segment or stride is too long"
        )


def _most_weights(state: Mapping[str, Any], quantized: bool) -> tuple[int, int]:
    """Return the number of weights in `state`, and of their values, both at most.

    Raises `ModelLoadingError` for weights that are views of each other: a small file should not
    become a large model.
    """
    tensors = list(_tensors_in(state))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    stored = sum(storages.values())
    if quantized:
        return len(tensors), 8 * stored
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > stored:
        raise ModelLoadingError(f"the weights do not fit: they share {stored} bytes")
    return len(tensors), sum(tensor.numel() for tensor in tensors)


class _Budget(TorchFunctionMode):
    """Stop building a model that has far more or larger weights than its state.

    Smaller differences pass here, because the comparison of shapes reports them in detail.
    """

    def __init__(self, weights: int, values: int) -> None:
        super().__init__()
        self.weights, self.values = 2 * weights + MORE_WEIGHTS, 2 * values + MORE_VALUES

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.__name__ in FACTORIES:
            self.weights -= 1
            self.values -= result.numel()
            if min(self.weights, self.values) < 0:
                raise ModelLoadingError("the weights do not fit: the model has many more")
        return result


def _model_class(klass: Any) -> type[nn.Module]:
    """Return our class for the class that a package names or, in memory, contains."""
    dotted = _dotted_name(klass)
    package, _, name = dotted.partition(".")
    if package not in PACKAGES or name not in MODEL_CLASSES:
        raise ModelLoadingError(f"{shortened(dotted)[1:-1]} is not a model class of Demucs")
    return MODEL_CLASSES[name]


def _dotted_name(klass: Any) -> str:
    if isinstance(klass, ClassName):
        return klass.dotted
    return f"{klass.__module__}.{klass.__qualname__}" if isinstance(klass, type) else repr(klass)


def _known_options(model_class: Any, kwargs: dict[str, Any], strict: bool) -> dict[str, Any]:
    unknown = [name for name in kwargs if name not in model_class.__signature__.parameters]
    for name in unknown:
        value = kwargs.pop(name)
        harmless = name in TRAINING_OPTIONS or value is None or value is False
        if strict or not harmless:
            raise ModelLoadingError(
                f"{model_class.__name__} has no option {name} ({name}={shortened(value)})"
            )
        logger.warning("%s has no option %s: %r is ignored", model_class.__name__, name, value)
    return kwargs


def _assign_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give `model`, which may be without memory, the tensors of `state` as float32."""
    if isinstance(model, Demucs):
        state = model.current_names(state)
    expected = model.state_dict()
    _check_names_and_shapes(expected, state)
    model.load_state_dict({name: state[name].float() for name in expected}, assign=True)
    model.requires_grad_(True)


def _check_names_and_shapes(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in expected]
    problems += [
        f"{name} has the shape {list(state[name].shape)} and not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelLoadingError(f"the weights do not fit: {'; '.join(problems[:3])}{more}")


def get_state(model: nn.Module, quantizer: Any = None, half: bool = False) -> dict[str, Any]:
    """Return the weights of `model`, as float16 if `half`, or packed by diffq's `quantizer`."""
    if quantizer is not None:
        return {**quantizer.get_quantized_state(), QUANTIZED: True}
    dtype = torch.float16 if half else None
    return {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}


def set_state(
    model: nn.Module, state: Mapping[str, Any], quantizer: Any = None
) -> Mapping[str, Any]:
    """Put `state`, quantized or not, into `model`, and return it.

    Raises `MissingDependencyError` for a quantized state without diffq, `ModelLoadingError` for
    one that does not fit.
    """
    if not state.get(QUANTIZED):
        model.load_state_dict(state)
    elif quantizer is not None:
        quantizer.restore_quantized_state(state)
    else:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        dotted = _dotted_name(state["meta"]["klass"])
        if dotted not in QUANTIZERS:
            raise ModelLoadingError(f"{dotted} is not a quantizer of diffq")
        kind = getattr(_import_diffq(), dotted.rpartition(".")[2])
        quantizer = kind(model, **state["meta"]["init_kwargs"])
        _check_quantized(quantizer, state, names)
        quantizer.restore_quantized_state(state)
        quantizer.detach()
    return state


def copy_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the weights of `state`, on the CPU."""
    return {name: tensor.cpu().clone() for name, tensor in state.items()}


@contextmanager
def swap_state(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Give `model` the weights of `state` while the block runs."""
    before = copy_state(model.state_dict())
    model.load_state_dict(state, strict=False)
    try:
        yield
    finally:
        model.load_state_dict(before)


def get_quantizer(model: nn.Module, args: Any, optimizer: Any = None) -> Any:
    """Make diffq's quantizer of `model` for the options of a training, or None if they want none.

    `args` has `diffq` (a penalty, or 0), `qat` (bits, or 0), `min_size` (megabytes) and, for
    `diffq`, `group_size`. Raises `MissingDependencyError` without diffq.
    """
    if args.diffq:
        kind = _import_diffq().DiffQuantizer
        quantizer = kind(model, min_size=args.min_size, group_size=args.group_size)
        if optimizer is not None:
            quantizer.setup_optimizer(optimizer)
        return quantizer
    if args.qat:
        return _import_diffq().UniformQuantizer(model, bits=args.qat, min_size=args.min_size)
    return None


def serialize_model(
    model: nn.Module, training_args: Any, quantizer: Any = None, half: bool = True
) -> dict[str, Any]:
    """Make the package of `model` that `save_with_checksum` saves and `load_model` reads.

    `training_args` are plain containers, or a configuration of OmegaConf, which becomes such.
    """
    args, kwargs = model._init_args_kwargs  # type: ignore[misc]
    if type(training_args).__module__.partition(".")[0] == "omegaconf":
        from omegaconf import OmegaConf

        training_args = OmegaConf.to_container(training_args, resolve=True)
    return {
        "klass": type(model),
        "args": args,
        "kwargs": kwargs,
        "state": get_state(model, quantizer, half),
        "training_args": training_args,
    }


def _import_diffq() -> Any:
    try:
        import diffq
    except ImportError as exc:
        raise MissingDependencyError("diffq", "a quantized model") from exc
    return diffq


def _check_finite(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        # A sum is fast, but may be too large where no value is.
        if not math.isfinite(tensor.sum()) and not tensor.isfinite().all():
            raise ModelLoadingError(f"{name} has values that are not finite")


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item)


def _check_quantized(quantizer: Any, state: Mapping[str, Any], names: Mapping[int, str]) -> None:
    """Raise `ModelLoadingError` for tensors that do not fit.

    diffq would fill as many tensors as a file has, repeat one that is too small, and ignore the
    width of packed blocks.
    """
    for kind in ("others", "float16"):
        expected = {names[id(p)]: p for p in getattr(quantizer, f"_{kind}")}
        given = itertools.zip_longest(expected, state[kind])
        actual = {name or f"one of {kind}": tensor for name, tensor in given if tensor is not None}
        _check_names_and_shapes(expected, actual)
    if state["meta"].get("packed") and not state["meta"].get("torch_pack"):
        for tensor in _tensors_in(state["quantized"]):
            if tensor.dim() != 3 or tensor.shape[-1] != PACKED_WIDTH:
                raise ModelLoadingError(f"packed weights have the shape {list(tensor.shape)}")


def save_with_checksum(content: Any, path: str | os.PathLike[str]) -> Path:
    """Save `content` as `NAME-CHECKSUM.SUFFIX` beside `path`, and return the file's path.

    The checksum is the first 8 hex digits of the file's SHA-256.
    """
    path = Path(path)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    digest = sha256(buffer.getvalue()).hexdigest()[:CHECKSUM_DIGITS]
    path = path.with_name(f"{path.stem}-{digest}{path.suffix}")
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return path


def save_model(model: nn.Module, path: str | os.PathLike[str], half: bool = False) -> Path:
    """Save `model` as a `.safetensors` checkpoint, which demucs 4.1 reads too.

    Weights are float16 if `half`. Raises `ModelLoadingError` for another module than our models,
    `OSError` if the file cannot be written.
    """
    # The reference's names, and of two names of a class the first.
    names = {kind: f"demucs.{name}" for name, kind in reversed(MODEL_CLASSES.items())}
    if type(model) not in names:
        raise ModelLoadingError(f"{type(model).__name__} is not a model class of Demucs")
    args, kwargs = model._init_args_kwargs  # type: ignore[misc]
    package = {"klass": ClassName(names[type(model)]), "args": args, "kwargs": kwargs}
    return write_safetensors({**package, "state": get_state(model, half=half)}, path)
