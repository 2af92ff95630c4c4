"""Programs that build, change, wrap and export networks: ours behave like those of `demucs`."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.apply import apply_model
from demucs_infer.demucs import Demucs
from demucs_infer.engine import cpu
from demucs_infer.engine.backends import on_engine
from demucs_infer.engine.cpu import fast_copy
from demucs_infer.engine.options import SeparationOptions
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs

from .helpers import FAMILIES, TINY, assert_close, noise, pair, shake

IS_RECENT = hasattr(torch, "get_autocast_dtype")  # PyTorch 2.4 or later

MIX = torch.stack([noise(2, 4000, seed) for seed in range(2)])
BLOCKS = {
    "hdemucs": "HEncLayer HDecLayer MultiWrap ScaledEmbedding pad1d",
    "demucs": "DConv LocalState BLSTM LayerScale rescale_module rescale_conv",
    "transformer": "create_sin_embedding create_2d_sin_embedding CrossTransformerEncoder",
    "htdemucs": "HTDemucs",
}
STEPS = ("_spec", "_magnitude", "_mask", "_ispec")


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """The engine gives for one window what the other model gives."""
    with torch.no_grad():
        assert_close(apply_model(ours, MIX, shifts=0, split=False), theirs(MIX))


@pytest.fixture(params=FAMILIES)
def models(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A small model of each family, in the reference and here."""
    family, options = FAMILIES[request.param]
    return pair(family, **options)


# --- signatures and attributes --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name"), [(m, name) for m, names in BLOCKS.items() for name in names.split()]
)
def test_building_blocks_take_what_the_reference_takes(module: str, name: str) -> None:
    """The same names, order and defaults; further parameters may only be given by name."""
    ours, theirs = (
        getattr(importlib.import_module(f"{package}.{module}"), name)
        for package in ("demucs_infer", "demucs")
    )
    methods = ["__call__", "forward", *STEPS, "_wiener"] if inspect.isclass(theirs) else []
    pairs = [(ours, theirs)]
    pairs += [(getattr(ours, m), getattr(theirs, m)) for m in methods if m in vars(theirs)]
    for one, other in pairs:
        expected = inspect.signature(other).parameters.values()
        given = [p for p in inspect.signature(one).parameters.values() if p.kind != p.KEYWORD_ONLY]
        assert [p.name for p in given] == [p.name for p in expected]
        for mine, their in zip(given, expected):
            default = tuple(their.default) if isinstance(their.default, list) else their.default
            assert mine.default == default or mine.default is their.default


@pytest.mark.parametrize("family", ["htdemucs", "hdemucs", "demucs"])
def test_attributes_that_wrappers_read(family: str) -> None:
    kind, options = FAMILIES[family]
    theirs, ours = pair(kind, **options)
    public = {name for name in vars(theirs) if not name.startswith("_")}
    assert {name: getattr(ours, name) for name in public} == {n: vars(theirs)[n] for n in public}
    if kind is HTDemucs:
        for name in "num_layers max_period weight_pos_embed classic_parity".split():
            mine, their = (getattr(model.crosstransformer, name) for model in (ours, theirs))
            assert mine == their
    if kind is Demucs:
        return
    bins = torch.arange(5)
    assert_close(ours.freq_emb(bins), theirs.freq_emb(bins))
    assert_close(ours.freq_emb.weight, theirs.freq_emb.weight)


# --- networks that programs build of the blocks ---------------------------------------------------


class Built(nn.Module):
    """A spectral and a time branch of two levels, made of the blocks of `package`."""

    def __init__(self, package: str) -> None:
        super().__init__()
        blocks = importlib.import_module(f"{package}.hdemucs")
        common = {"norm_groups": 2, "norm": False, "dconv_kw": {"depth": 1, "compress": 2}}
        wide = blocks.HEncLayer(4, 8, dconv=1, context=0, **common)
        deep = blocks.HEncLayer(8, 16, kernel_size=8, stride=4, pad=False, **common)
        self.encoder = nn.ModuleList([blocks.MultiWrap(wide, [0.5]), deep])
        time = blocks.HEncLayer(2, 8, freq=0, dconv=1, **common)
        empty = blocks.HEncLayer(8, 16, freq=False, empty=True, **common)
        self.tencoder = nn.ModuleList([time, empty])
        first = blocks.HDecLayer(16, 8, kernel_size=8, pad=False, **common)
        last = blocks.HDecLayer(8, 4, dconv=2, last=True, context=1, context_freq=False, **common)
        self.decoder = nn.ModuleList([first, blocks.MultiWrap(last, [0.5])])
        empty = blocks.HDecLayer(16, 8, freq=False, empty=True, **common)
        last = blocks.HDecLayer(8, 2, True, freq=False, **common)
        self.tdecoder = nn.ModuleList([empty, last])
        self.freq_emb = blocks.ScaledEmbedding(8, 8, smooth=True, scale=10)
        importlib.import_module(f"{package}.demucs").rescale_module(self, reference=0.1)

    def forward(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        first = self.encoder[0](x, None)
        first = first + 0.2 * self.freq_emb(torch.arange(first.shape[-2])).t()[None, :, :, None]
        first_t = self.tencoder[0](xt)
        bottom = self.encoder[1](first, self.tencoder[1](first_t))
        up, before = self.decoder[0](bottom, bottom, first.shape[-1])
        up_t, _ = self.tdecoder[0](before[:, :, 0], None, first_t.shape[-1])
        return self.decoder[1](up, first, x.shape[-1])[0], self.tdecoder[1](
            up_t, first_t, xt.shape[-1]
        )[0]


def test_a_network_that_a_program_builds() -> None:
    ours, theirs = Built("demucs_infer"), shake(Built("demucs"))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.eval().load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        hooked(model.decoder[1].layers[0])
    x, xt = noise(4, 32 * 16).view(1, 4, 32, 16), noise(2, 16 * 16)[None]
    with torch.no_grad():
        for result, expected in zip(ours(x, xt), theirs(x, xt)):
            assert_close(result, expected)


# --- replaced steps -------------------------------------------------------------------------------


def real_spec(model: Any, calls: list[str]) -> dict[str, Callable[..., Tensor]]:
    """Steps as exporters have them: spectra as real numbers, and halved on the way back."""
    steps = {name: getattr(model, name) for name in STEPS}

    def spec(x: Tensor) -> Tensor:
        calls.append("_spec")
        return torch.view_as_real(steps["_spec"](x))

    def magnitude(z: Tensor) -> Tensor:
        calls.append("_magnitude")
        return steps["_magnitude"](torch.view_as_complex(z.contiguous()))

    def mask(z: Tensor, m: Tensor) -> Tensor:
        calls.append("_mask")
        return torch.view_as_real(steps["_mask"](torch.view_as_complex(z.contiguous()), m))

    def ispec(z: Tensor, length: int | None = None, scale: int = 0) -> Tensor:
        calls.append("_ispec")
        return steps["_ispec"](torch.view_as_complex(z.contiguous()), length) / 2

    return {"_spec": spec, "_magnitude": magnitude, "_mask": mask, "_ispec": ispec}


@pytest.mark.parametrize("where", ["instance", "class", "subclass"])
@pytest.mark.parametrize("family", ["htdemucs", "hdemucs"])
def test_replaced_steps_are_used(family: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the model itself, and by `apply_model` with its fast layers."""
    calls: list[str] = []
    for model in (models := pair(FAMILIES[family][0], **FAMILIES[family][1])):
        steps = real_spec(model, calls)
        if where == "instance":
            vars(model).update(steps)
            continue
        if where == "subclass":
            model.__class__ = type("Own", (type(model),), {})
        for name, step in steps.items():
            monkeypatch.setattr(
                type(model), name, lambda self, *args, step=step: step(*args), raising=True
            )
    theirs, ours = models
    with torch.no_grad():
        expected = theirs(MIX)
        for run in (ours, lambda mix: apply_model(ours, mix, shifts=0, split=False)):
            calls.clear()
            assert_close(run(MIX), expected)
            assert calls == list(STEPS)


@pytest.mark.parametrize("name", STEPS)
def test_one_replaced_step_is_used(name: str) -> None:
    theirs, ours = pair(HTDemucs, **TINY)
    for model in (theirs, ours):
        step = getattr(model, name)
        setattr(model, name, lambda *args, step=step: 0.5 * step(*args))
    assert_same(ours, theirs)


def test_replaced_steps_see_all_sources_and_any_spectrum() -> None:
    theirs, ours = pair(HTDemucs, **TINY)
    for model in (theirs, ours):
        spec, magnitude, mask = model._spec, model._magnitude, model._mask
        model._spec = lambda x, spec=spec: torch.view_as_real(spec(x)).unbind(-1)
        model._magnitude = lambda z, magnitude=magnitude: magnitude(torch.complex(*z))
    assert_same(ours, theirs)
    for model in (theirs, ours):
        model._mask = lambda z, m, mask=mask: mask(z, m - m.mean(1, keepdim=True))
    some = apply_model(ours, MIX, shifts=0, split=False, stems=ours.sources[1:])
    with torch.no_grad():
        assert_close(some, theirs(MIX)[:, 1:])


def test_an_inverse_by_scale_and_without_a_length() -> None:
    theirs, ours = pair(HTDemucs, **TINY)
    z = theirs._spec(MIX)
    assert_close(ours._ispec(z, 4000, 0), theirs._ispec(z, 4000, 0))
    assert ours._ispec(z).shape[-1] == z.shape[-1] * ours.hop_length
    small = z[..., : z.shape[-2] // 4, :]
    length = small.shape[-1] * ours.hop_length // 4
    assert_close(ours._ispec(small, length, scale=1), theirs._ispec(small, length, scale=1))


# --- PyTorch's operations on modules --------------------------------------------------------------


def test_hooks_see_each_layer_whole(
    models: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same layers with the same shapes, directly and in the engine; bands in any order."""
    monkeypatch.setattr(cpu, "TILE_BYTES", 2**13)
    seen: list[tuple[str, Any]] = []

    def watch(model: nn.Module) -> None:
        for name, layer in model.named_modules():
            if list(layer.children()) or not list(layer.parameters(recurse=False)):
                continue
            layer.register_forward_hook(
                lambda _, args, output, name=name: seen.append((name, getattr(output, "shape", 0)))
            )

    runs = []
    theirs, ours = models
    for model in models:
        watch(model)
    for run in (theirs, ours, lambda mix: apply_model(ours, mix, shifts=0, split=False)):
        seen.clear()
        with torch.no_grad():
            run(MIX)
        # Attention, freq_emb and LSTM are called in ways of their own.
        named = (x for x in seen if not any(s in x[0] for s in ("attn", "freq_emb", "lstm")))
        runs.append(sorted(named, key=repr))
    assert len(runs[0]) > 20
    assert runs[1] == runs[0]
    assert runs[2] == runs[0]


def halved(output: Any) -> Any:
    return (0.5 * output[0], output[1]) if isinstance(output, tuple) else 0.5 * output


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda _, args, output: halved(output))
    return layer


def other(kind: Any, *args: Any, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda old: kind(old.in_channels, old.out_channels, *args, **options)


def of_lower_rank(kind: Any) -> Callable[[Any], nn.Module]:
    return lambda old: nn.Sequential(kind(old.in_channels, 4, 1), kind(4, old.out_channels, 1))


CHANGES: list[dict[str, Callable[[Any], Any]]] = [
    dict.fromkeys(["encoder.0", "encoder.1.dconv.layers.0.4", "tdecoder.1.conv_tr"], hooked),
    {"decoder.2": hooked},
    {
        "encoder.1.norm1": lambda old: nn.Tanh(),
        "tencoder.0.conv": lambda old: nn.Sequential(old, nn.Tanh()),
    },
    {"encoder.0.rewrite": of_lower_rank(nn.Conv2d), "tdecoder.1.rewrite": of_lower_rank(nn.Conv1d)},
    {
        "encoder.0.conv": other(nn.Conv2d, (12, 1), (4, 1), (4, 0), groups=2),
        "tencoder.0.rewrite": other(nn.Conv1d, 1, groups=2),
        "decoder.2.rewrite": other(nn.Conv2d, 3, padding=2, dilation=2),
        "tdecoder.1.rewrite": other(nn.Conv1d, 3, padding="same", padding_mode="circular"),
    },
    {
        "encoder.0.norm1": lambda old: nn.GroupNorm(2, 8),
        "decoder.2.norm2": lambda old: nn.GroupNorm(2, 16),
        "tencoder.0.dconv.layers.0.4": lambda old: nn.GroupNorm(2, 16, affine=False),
    },
    {
        "encoder.0.dconv": lambda old: None,
        "tencoder.0.dconv.layers.1": lambda old: nn.Identity(),
        "tencoder.1.dconv.layers.0.6": lambda old: nn.Identity(),
    },
    {"decoder.2": lambda old: old.compile(backend="eager") or old},
    {"crosstransformer.layers.0.activation": lambda old: F.silu},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_changed_layers_are_run_as_they_are(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "TILE_BYTES", 2**13)
    monkeypatch.setattr(cpu, "onednn_is_faster", lambda: "transformer" in str(change))
    theirs, ours = pair(HTDemucs, **TINY)
    for model in (theirs, ours):
        torch.manual_seed(0)
        for name, changed in change.items():
            parent, _, child = name.rpartition(".")
            layer = model.get_submodule(parent)
            setattr(layer, child, changed(getattr(layer, child)))
    assert_same(ours, theirs)


def test_changes_to_all_layers_of_a_class_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair(HTDemucs, **TINY)
    forward = nn.GroupNorm.forward
    monkeypatch.setattr(nn.GroupNorm, "forward", lambda self, x: 0.5 * forward(self, x))
    monkeypatch.setattr(nn.modules.module, "_global_forward_hooks", OrderedDict())
    assert_same(ours, theirs)
    nn.modules.module.register_module_forward_hook(
        lambda layer, args, output: halved(output) if isinstance(layer, nn.Conv1d) else None
    )
    assert_same(ours, theirs)


def test_a_model_is_seen_as_it_is_when_a_run_begins() -> None:
    _, ours = pair(HTDemucs, **TINY)
    apply_model(ours, MIX, shifts=0, split=False)
    with torch.no_grad():
        ours.decoder[-1].conv_tr.weight.mul_(0.5)
        nn.init.zeros_(ours.tdecoder[-1].conv_tr.weight)
    assert_same(ours, ours)


def test_a_direct_call_is_the_plain_network(models: tuple[nn.Module, nn.Module]) -> None:
    _, ours = models
    before = [type(layer) for layer in ours.modules()]
    fast = fast_copy(ours)
    assert [type(layer) for layer in ours.modules()] == before
    assert {kind.__module__.split(".")[:2][0] for kind in before} <= {"torch", "demucs_infer"}
    assert not any("engine" in kind.__module__ for kind in before)
    assert any("engine" in type(layer).__module__ for layer in fast.modules())
    assert {id(p) for p in fast.parameters()} == {id(p) for p in ours.parameters()}
    assert fast_copy(ours.train()) is ours


@pytest.mark.skipif(not IS_RECENT, reason="PyTorch 2.1 fails, with demucs too")
def test_gradients_of_each_family(models: tuple[nn.Module, nn.Module]) -> None:
    gradients = []
    for model in models:
        model(MIX).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert_close(gradients[1], gradients[0], 1e-4)


def test_copies_and_pickles(models: tuple[nn.Module, nn.Module]) -> None:
    _, ours = models
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    with torch.no_grad():
        expected = ours(MIX)
        for other in (
            copy.deepcopy(ours),
            pickle.loads(pickle.dumps(ours)),
            torch.load(file, weights_only=False),
        ):
            assert torch.equal(other(MIX), expected)


@pytest.mark.parametrize(
    "family",
    [*(pytest.param(kind, marks=pytest.mark.slow) for kind in (HTDemucs, HDemucs)), Demucs],
)
def test_traces_and_exports(family: type) -> None:
    options = next(options for kind, options in FAMILIES.values() if kind is family)
    _, ours = pair(family, **options)
    with torch.no_grad():
        expected = ours(MIX)
        traced = torch.jit.trace(ours, MIX, check_trace=False)
        assert_close(traced(MIX), expected)
        if family is Demucs and not IS_RECENT:
            return  # `torch.export` of PyTorch 2.1 refuses the cached filters of `resample`.
        exported = torch.export.export(ours, (MIX,)).module()
        assert_close(exported(MIX), expected)


def test_half_precision_starts_from_the_plain_model() -> None:
    _, ours = pair(HTDemucs, **TINY)
    half = ours.bfloat16()
    with torch.no_grad():
        assert half(MIX).dtype == torch.float32  # the transforms keep the type of the mixture
        assert_close(apply_model(half, MIX, shifts=0, split=False), half(MIX), 0.05)
    assert on_engine(ours, SeparationOptions()) is ours


def test_steps_that_exporters_write_themselves() -> None:
    """A network without transforms, as CoreML and ONNX wrappers call it, layer by layer."""
    outputs = []
    for model in pair(HTDemucs, **TINY):
        with torch.no_grad():
            x = model._magnitude(model._spec(MIX))
            y = model.encoder[0](x, None)
            bins = torch.arange(y.shape[-2])
            y = y + model.freq_emb_scale * model.freq_emb(bins).t()[None, :, :, None].expand_as(y)
            yt = model.tencoder[0](MIX)
            wide = F.pad(y, (0, 0, 0, 0, 0, model.bottom_channels - y.shape[1]))
            wide_t = F.pad(yt, (0, 0, 0, model.bottom_channels - yt.shape[1]))
            outputs.append(model.crosstransformer(wide[:, :, :4], wide_t[..., :50]))
    for result, expected in zip(outputs[1], outputs[0]):
        assert_close(result, expected)
