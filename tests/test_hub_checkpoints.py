"""Attacks through checkpoint files: pickles, archives and headers that ask for too much."""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from demucs_infer.errors import ModelLoadingError
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.hub import checkpoints, pickles
from demucs_infer.hub.checkpoints import read_package, read_weights, write_safetensors
from demucs_infer.hub.pickles import MAX_VALUES, ClassName
from demucs_infer.states import load_model, serialize_model

from .helpers import TINY, archive

STORAGE = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """Bound the CPU time of every file: without limits, some take minutes or do not end."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 60


@pytest.fixture(scope="module")
def package() -> dict:
    torch.manual_seed(0)
    return serialize_model(HTDemucs(**TINY), {"epochs": 1})


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(size: bytes, stride: bytes = b")", numel: bytes = b"K\4") -> bytes:
    """A pickled tensor over four values, whose shape is given in instructions."""
    storage = b"(" + text("storage") + STORAGE + text("0") + text("cpu") + numel + b"tQ"
    return REBUILD + b"(" + storage + b"K\0" + size + stride + b"\x89}tR"


LONG = b"\x8a\xff" + b"\x7f" * 255  # 2039 bits
PICKLES = {
    "deep": b"]" * 10_000 + b"a" * 9_999,
    "doubled again and again": b"]q\x000" + b"](h\0h\0eq\x000" * 100 + b"h\0",
    "tenfold, not so deep": b"]q\x000" + (b"](" + b"h\0" * 10 + b"eq\x000") * 25 + b"h\0",
    "tenfold as keys": b"]q\0" + (b"](" + b"h\0" * 10 + b"eq\0") * 25,
    "a list in itself": b"]q\0h\0a",
    "a tuple of millions": b"(" + b"N" * (MAX_VALUES + 1) + b"t",
    "a shape of numbers without end": tensor(
        b"(" + LONG + b"q\1" + b"h\1" * 10**5 + b"tq\2", b"h\2"
    ),
    "a shape of many ones": tensor(b"(" + b"K\1" * 10**5 + b"tq\2", b"h\2"),
    "a huge shape": tensor(LONG + b"\x85q\2", b"h\2"),
    "a shape of words": tensor(text("a") + b"\x85q\2", b"h\2"),
    "a shape that is a number": tensor(b"K\4", b"K\1"),
    "a shape beyond its storage": tensor(b"K\5\x85", b"K\1\x85"),
    "fewer strides than dimensions": tensor(b"K\2K\2\x86", b"K\1\x85"),
    "a negative shape": tensor(b"J\xfe\xff\xff\xff\x85", b"K\1\x85"),
    "a negative stride": tensor(b"K\2\x85", b"J\xff\xff\xff\xff\x85"),
    "one value many times": tensor(b"J\0\0\0\x40\x85", b"K\0\x85"),
    "a negative offset": tensor(b"K\2\x85", b"K\1\x85").replace(b"K\0K\2", b"J\xff\xff\xff\xffK\2"),
    "a storage beyond its file": tensor(b"K\4\x85", b"K\1\x85", b"J\0\0\0\x40"),
    "a storage of words": tensor(b"K\4\x85", b"K\1\x85", text("4")),
    "a storage of half a value": tensor(b"K\4\x85", b"K\1\x85", b"G" + struct.pack(">d", 4.5)),
    "a text of gigabytes": b"X\xff\xff\xff\x7f",
    "bytes of gigabytes": b"B\xff\xff\xff\xff",
    "a frame of exabytes": b"\x95" + b"\xff" * 7 + b"\x0f",
    "a memo of gigabytes": b"Nr\xff\xff\xff\xff0",
    "a memo that is not there": b"j\xff\xff\xff\xff",
    "a mark that is not there": b"t",
    "an extension": b"\x82\1",
    "a set": b"\x8f(K\1\x90",
    "a key without a hash": b"}]Ns",
    "a key that is a tuple": b"}K\1\x85Ns",
    "items of a tensor": tensor(b"K\4\x85", b"K\1\x85") + text("a") + b"Ns",
    "a storage that is not there": tensor(b"K\4\x85", b"K\1\x85").replace(text("0"), text("1")),
    "a storage outside": tensor(b"K\4\x85", b"K\1\x85").replace(text("0"), text("../data.pkl")),
    "a call of a class": b"cdemucs.htdemucs\nHTDemucs\n)R",
    "a fraction over nothing": b"cfractions\nFraction\nK\1K\0\x86R",
    "a fraction of an exponent": b"cfractions\nFraction\n" + text("1e9") + b"\x85R",
    "a fraction of a long number": b"cfractions\nFraction\n" + LONG + b"\x85R",
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n == "a tuple of millions")) for n in PICKLES],
)
def test_pickles_that_ask_for_much(name: str, tmp_path: Path) -> None:
    content = b"\x80\x02}" + text("state") + PICKLES[name] + b"s."
    path = archive(tmp_path / "a.th", content, **{"0": bytes(16)})
    assert path.stat().st_size < 3 * 10**6
    for door in (read_package, read_weights, load_model):
        with pytest.raises(ModelLoadingError, match=r"a\.th") as caught:
            door(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_a_pickle_is_no_larger_than_a_checkpoint_needs(tmp_path: Path) -> None:
    content = b"\x80\x02}" + b"N0" * pickles.MAX_PICKLE + b"."
    with pytest.raises(ModelLoadingError, match=f"a pickle of {len(content)} bytes"):
        read_package(archive(tmp_path / "a.th", content))


def test_tensors_within_their_storage(tmp_path: Path) -> None:
    """The places of the attacks above, with the values of a checkpoint."""
    values = torch.arange(4.0)
    for size, stride, expected in (
        (b"K\4\x85", b"K\1\x85", values),
        (b"K\2K\2\x86", b"K\1K\2\x86", values.reshape(2, 2).T),
        (b")", b")", values[0]),
        (b"K\0\x85", b"K\1\x85", values[:0]),
    ):
        content = b"\x80\x02}" + text("state") + tensor(size, stride) + b"s."
        path = archive(tmp_path / "a.th", content, **{"0": values.numpy().tobytes()})
        assert torch.equal(read_package(path)["state"], expected)


def test_values_that_are_shared_are_read(tmp_path: Path) -> None:
    content = b"\x80\x02}" + text("state") + b"]q\x000" + b"](h\0h\0eq\x000" * 10 + b"h\0s."
    read_package(archive(tmp_path / "a.th", content))


def zipped(package: dict, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(package, buffer, **options)
    return buffer.getvalue()


def rewritten(
    data: bytes, change: Callable[[dict], object] = len, twice: str = "", **kind: int
) -> bytes:
    """An archive whose entries are changed, and one of which is there twice."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    change(entries)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **kind) as new:
        for name in [*entries, *([twice] if twice else [])]:
            new.writestr(name, entries[name])
    return buffer.getvalue()


def with_length(data: bytes, length: int) -> bytes:
    """An archive whose first weight is said to have another length, in both places."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        entry = next(entry for entry in file.infolist() if "/data/" in entry.filename)
    changed, name = bytearray(data), entry.filename.encode()
    start = changed.rindex(name) - 46  # in the list of entries
    struct.pack_into("<II", changed, start + 20, length, length)
    struct.pack_into("<II", changed, entry.header_offset + 18, length, length)
    return bytes(changed)


WEIGHT, PICKLE, ORDER = "archive/data/0", "archive/data.pkl", "archive/byteorder"
ARCHIVES: dict[str, Callable[[bytes], bytes]] = {
    "packed": lambda data: rewritten(data, compression=zipfile.ZIP_DEFLATED),
    "a weight that is longer than the file": lambda data: with_length(data, 2**31 - 1),
    "a weight that goes on into others": lambda data: with_length(data, 50_000),
    "a weight that is cut": lambda data: rewritten(data, lambda e: e.update({WEIGHT: bytes(4)})),
    "a weight that is long": lambda data: rewritten(
        data, lambda e: e.update({WEIGHT: e[WEIGHT] + bytes(4)})
    ),
    "two pickles": lambda data: rewritten(data, lambda e: e.update({f"x/{PICKLE}": e[PICKLE]})),
    "no pickle": lambda data: rewritten(data, lambda e: e.pop(PICKLE)),
    "other bytes first": lambda data: rewritten(data, lambda e: e.update({ORDER: b"big"})),
    "the older format of PyTorch": lambda data: zipped(
        torch.load(io.BytesIO(data), weights_only=False), _use_new_zipfile_serialization=False
    ),
    "its first half": lambda data: data[: len(data) // 2],
    "damaged": lambda data: data[:5000] + bytes(1000) + data[6000:],
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_are_not_what_they_say(name: str, package: dict, tmp_path: Path) -> None:
    path = tmp_path / "a.th"
    path.write_bytes(ARCHIVES[name](zipped(package)))
    with pytest.raises(ModelLoadingError, match=r"a\.th"):
        load_model(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_of_one_name(package: dict, tmp_path: Path) -> None:
    """Another reader may take the first where this one takes the last."""
    path = tmp_path / "a.th"
    data = zipped(package)
    for name in (WEIGHT, PICKLE, ORDER):
        path.write_bytes(rewritten(data, twice=name))
        with pytest.raises(ModelLoadingError, match=r"a\.th"):
            load_model(path)


def test_too_many_entries(package: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.th"
    path.write_bytes(zipped(package))
    load_model(path)
    monkeypatch.setattr(pickles, "MAX_ENTRIES", 50)
    with pytest.raises(ModelLoadingError, match="too many entries"):
        load_model(path)


def as_safetensors(package: dict, path: Path) -> Path:
    klass = ClassName("demucs.htdemucs.HTDemucs")
    return write_safetensors({**package, "klass": klass}, path)


@pytest.mark.parametrize("suffix", ["th", "safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(
    value: float, suffix: str, package: dict, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{suffix}"
    state = {name: tensor.clone() for name, tensor in package["state"].items()}
    state["decoder.1.conv_tr.bias"][-1] = value
    changed = {**package, "state": state}
    path.write_bytes(zipped(changed)) if suffix == "th" else as_safetensors(changed, path)
    with pytest.raises(ModelLoadingError, match=r"decoder\.1\.conv_tr\.bias has .* not finite"):
        load_model(path)


def test_weights_alone(package: dict, tmp_path: Path) -> None:
    """Objects that a training keeps beside the weights are left out, and never built."""

    class Training:
        pass

    path, weights = tmp_path / "a.ckpt", package["state"]
    Training.__module__, Training.__qualname__ = "somewhere.else", "Training"
    content = {"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}
    torch.save({**content, "epoch": 3, "rate": Fraction(1, 2)}, path)
    found = read_weights(path)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    call = b"csomewhere.else\nTraining\n)\x81}" + text("a") + b"Nsb"
    data = b"\x80\x02}(" + text("optimizer") + call + text("state") + b"}"
    data += text("x") + tensor(b"K\4\x85", b"K\1\x85") + b"su."
    archive(path, data, **{"0": bytes(16)})
    assert read_weights(path)["x"].tolist() == [0, 0, 0, 0]
    with pytest.raises(ModelLoadingError, match=r"somewhere\.else\.Training"):
        read_package(archive(tmp_path / "a.th", data, **{"0": bytes(16)}))
    archive(path, b"\x80\x02}" + text("x") + call + b"s.")
    with pytest.raises(ModelLoadingError, match="where the weights of a model should be"):
        read_weights(path)
    save_path = tmp_path / "a.safetensors"
    save_path.write_bytes(save({"module.x": torch.ones(2)}))
    assert read_weights(save_path)["x"].tolist() == [1, 1]


def joined(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


# Changes of the metadata, or of the header's entry of the weight `BIAS`.
BIAS, ONE = "decoder.0.conv_tr.bias", '{"_type": "fraction", "numerator": 1, "denominator": 0}'
SAME = json.dumps({"_dict": [[str(number), {"_tensor": BIAS}] for number in range(9999)]})
HEADERS: dict[str, Callable[[dict, dict], object]] = {
    "a long header": lambda facts, bias: facts.update(a="[" * checkpoints.MAX_HEADER),
    "another shape": lambda facts, bias: bias.update(shape=[1]),
    "a tensor of exabytes": lambda facts, bias: bias.update(shape=[2**31, 2**31]),
    "another kind": lambda facts, bias: bias.update(dtype="F64"),
    "a tensor outside": lambda facts, bias: bias.update(data_offsets=[0, 2**40]),
    "no class": lambda facts, bias: facts.clear(),
    "deep options": lambda facts, bias: facts.update(kwargs='{"a":' * 100_000),
    "a list of options": lambda facts, bias: facts.update(kwargs="[]"),
    "a long number": lambda facts, bias: facts.update(kwargs='{"depth": ' + "9" * 10_000 + "}"),
    "a fraction over nothing": lambda facts, bias: facts.update(kwargs=f'{{"segment": {ONE}}}'),
    "a cut fraction": lambda facts, bias: facts.update(args='[{"_type": "fraction"}]'),
    "no such tensor": lambda facts, bias: facts.update(structure='{"_tensor": "b"}'),
    "a call": lambda facts, bias: facts.update(structure='{"_call": "a"}'),
    "deep": lambda facts, bias: facts.update(structure='{"_list": [' * 5000 + "]}" * 5000),
    "one tensor many times": lambda facts, bias: facts.update(structure=SAME),
}
FILES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "a length beyond the file": lambda data: (2**63).to_bytes(8, "little") + data[8:],
    "a header that is no JSON": lambda data: joined(b"{" * 1000),
    "a deep header": lambda data: joined(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a cut tensor": lambda data: data[:-1],
}


@pytest.mark.parametrize("name", [*HEADERS, *FILES])
def test_safetensors_that_are_not_what_they_say(name: str, package: dict, tmp_path: Path) -> None:
    path = as_safetensors(package, tmp_path / "a.safetensors")
    load_model(path)
    data = path.read_bytes()
    if name in HEADERS:
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        HEADERS[name](header["__metadata__"], header[BIAS])
        path.write_bytes(joined(json.dumps(header).encode(), data[end:]))
    else:
        path.write_bytes(FILES[name](data))
    reason = "a header of" if name == "a long header" else ""
    with pytest.raises(ModelLoadingError, match=rf"a\.safetensors.*{reason}") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [{1, 2}, b"x", object(), 1j], ids=lambda v: type(v).__name__)
def test_what_json_cannot_hold_is_not_written(value: object, package: dict, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for part in ({"kwargs": {"a": value}}, {"state": {**package["state"], "a": value}}):
        with pytest.raises(ModelLoadingError, match="cannot be written as JSON"):
            as_safetensors({**package, **part}, path)
    assert not path.exists()


def test_a_package_becomes_itself(package: dict, tmp_path: Path) -> None:
    """Through either format: fractions, classes, nested lists, and the order of weights."""
    first = next(iter(package["state"].values()))
    kwargs = {**package["kwargs"], "segment": Fraction(1, 3), "x": {"a": [None, 1.5, "b"]}}
    state = {"a": [first, (1, "x")], "klass": ClassName("diffq.uniform.UniformQuantizer")}
    path = as_safetensors({**package, "kwargs": kwargs, "state": state}, tmp_path / "a.safetensors")
    found = read_package(path)
    assert found["kwargs"] == kwargs
    assert found["klass"] == ClassName("demucs.htdemucs.HTDemucs")
    assert torch.equal(found["state"].pop("a")[0], first)
    assert found["state"] == {"klass": ClassName("diffq.uniform.UniformQuantizer")}
    (tmp_path / "a.th").write_bytes(zipped({**package, "kwargs": kwargs}))
    found = read_package(tmp_path / "a.th")
    assert found["kwargs"] == kwargs
    assert [*found["state"]] == [*package["state"]]
