from __future__ import annotations

import argparse
import io
import itertools
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import demucs.pretrained
import demucs.repo
import pytest
import torch
import yaml

from demucs_infer import pretrained
from demucs_infer.api import Separator
from demucs_infer.apply import BagOfModels
from demucs_infer.errors import DownloadError, ModelLoadingError
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.hub import registry
from demucs_infer.pretrained import (
    add_model_flags,
    demucs_unittest,
    get_model,
    get_model_from_args,
    list_models,
    model_label,
)
from demucs_infer.repo import AnyModel, BagOnlyRepo, LocalRepo, RemoteRepo, check_checksum
from demucs_infer.states import save_model, save_with_checksum

from .helpers import SOURCES, TINY, run, save_package
from .tools import web as answers
from .tools.web import Web


@pytest.fixture
def folder(repo: Path, tmp_path: Path) -> Path:
    """A copy of `repo` that a test may change."""
    return Path(shutil.copytree(repo, tmp_path / "models"))


def test_models_and_bags_of_a_folder(repo: Path) -> None:
    assert isinstance(get_model("tiny", repo), HTDemucs)
    bag = get_model("pair", repo)
    assert isinstance(bag, BagOfModels)
    assert len(bag.models) == 2
    assert not bag.training
    listed = list_models(repo)
    assert listed == {"single": {"tiny": repo / "tiny.th"}, "bag": {"pair": repo / "pair.yaml"}}


def test_flags(repo: Path) -> None:
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    for flag in ("-s", "--sig", "-n", "--name"):
        args = parser.parse_args([flag, "tiny", "--repo", str(repo)])
        assert isinstance(get_model_from_args(args), HTDemucs)
    args = argparse.Namespace(name="tiny", repo=repo)  # without the other flags
    assert isinstance(get_model_from_args(args), HTDemucs)
    assert parser.parse_args([]).name == "htdemucs"  # as programs expect that print it


def test_the_unittest_model() -> None:
    assert isinstance(demucs_unittest(), HDemucs)
    model = get_model("demucs_unittest")
    assert model.sources == ["drums", "bass", "other", "vocals"]
    assert not model.training


def test_checksums_are_checked(folder: Path) -> None:
    package = {"klass": HTDemucs, "args": (), "kwargs": TINY, "state": {}}
    path = save_with_checksum(package, folder / "b.th")
    check_checksum(path, path.stem.partition("-")[2])
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ModelLoadingError, match="is damaged"):
        get_model("b", folder)


def swapping(path: Path, contents: list[bytes]) -> Iterator[None]:
    """Another process that puts one file after the other in the place of `path`."""
    done = threading.Event()

    def swap() -> None:
        for content in itertools.cycle(contents):
            if done.is_set():
                return
            (path.parent / "next").write_bytes(content)
            (path.parent / "next").replace(path)

    thread = threading.Thread(target=swap)
    thread.start()
    yield
    done.set()
    thread.join()


@pytest.mark.parametrize(("home", "suffix"), [("folder", ".th"), ("cache", ".safetensors")])
def test_what_is_verified_is_what_is_loaded(suffix: str, home: str, tmp_path: Path) -> None:
    """A file that is swapped again and again is refused, or the right one: never the other."""
    models, contents = [HTDemucs(**TINY) for _ in range(2)], []
    for model in models:
        path = tmp_path / f"a{suffix}"
        save_model(model, path) if suffix == ".safetensors" else save_package(path, model)
        contents.append(path.read_bytes())
    digest = sha256(contents[0]).hexdigest()
    path = path.replace(tmp_path / f"a-{digest[:8]}{suffix}")
    remote = RemoteRepo({"a": f"https://host/{path.name}"}, cache_dir=tmp_path, offline=True)
    models_of = LocalRepo(tmp_path) if home == "folder" else remote
    expected, loaded, refused = models[0].encoder[0].conv.weight, 0, 0
    with contextmanager(swapping)(path, contents):
        for _ in range(500):
            try:
                weight = models_of.get_model("a").encoder[0].conv.weight
            except ModelLoadingError as exc:
                assert "is damaged" in str(exc)
                refused += 1
            else:
                assert torch.equal(weight, expected)
                loaded += 1
            if loaded > 3 and refused > 3:
                break
    assert loaded
    assert refused


def test_two_files_of_one_signature(folder: Path) -> None:
    shutil.copy(folder / "tiny.th", folder / "tiny-01234567.th")
    with pytest.raises(ModelLoadingError, match="two files are the model tiny"):
        get_model("tiny", folder)


def test_unknown_names_suggest_the_nearest(repo: Path) -> None:
    for name, message in (("tiyn", "Did you mean tiny"), ("xyz", "There is: pair, tiny")):
        with pytest.raises(ModelLoadingError, match=message):
            get_model(name, repo)
    for name, nearest in (
        ("htdemuks", "htdemucs"),
        ("HTDemucs_FT", "htdemucs_ft"),
        ("955717e9", "955717e8"),
        ("drum_sep", "drumsep"),
        ("hdemucs", "hdemucs_mmi"),
    ):
        with pytest.raises(ModelLoadingError, match=rf"Did you mean {nearest}\?"):
            get_model(name)
    with pytest.raises(RuntimeError, match="--list-models"):
        get_model("zzz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- tiny", "is not a bag"),
        ("models: tiny", "does not list its models"),
        ("models: [tinny]", "Did you mean tiny"),
        ("models: [tiny]\nweights: [[1, 2]]", "weights"),
        ("models: []", "at least one"),
    ],
)
def test_bags_that_make_no_sense(folder: Path, text: str, message: str) -> None:
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(ModelLoadingError, match=message):
        get_model("bad", folder)


def test_weights_alone_become_a_model(published: Web) -> None:
    model = get_model("foreign").models[0]
    assert published.paths == ["/elsewhere/weights.ckpt"]
    state = torch.load(io.BytesIO(published.others["weights.ckpt"]), weights_only=True)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_damaged_file_is_fetched_once(published: Web, tmp_path: Path) -> None:
    get_model("first")
    (path,) = (tmp_path / "cache").iterdir()
    published.always = answers.wrong
    path.write_bytes(b"")
    with pytest.raises(DownloadError, match=r"is damaged.*should be.*--cache-dir"):
        get_model("first")
    assert len(published.paths) == 2
    assert [file.name for file in path.parent.iterdir()] == [f"{path.name}.corrupt"]


def test_what_is_missing_is_one_message(published: Web, tmp_path: Path) -> None:
    digest = registry.checkpoints()["first"].sha256
    for name, number in (("both", 2), ("one", 1), ("first", 1)):
        with pytest.raises(DownloadError) as caught:
            get_model(name, offline=True)
        message = str(caught.value)
        assert "\n" not in message
        assert message.count(f"{published.url}/models/") == number
        assert message.count(f"(SHA-256 {digest})") == number
        for part in (f"into {tmp_path / 'cache'},", "--repo", "--cache-dir", "offline"):
            assert part in message
    assert published.paths == []
    published.always = answers.status(404)
    reasons = r"^No connection to 127.0.0.1:1 .*refused\); .*404 Not Found. "
    for name, number in (("both", 2), ("one", 1)):
        with pytest.raises(DownloadError, match=reasons) as caught:
            get_model(name)
        assert str(caught.value).count(f"(SHA-256 {digest})") == number


def test_offline_by_the_environment(
    published: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMUCS_INFER_OFFLINE", "1")
    with pytest.raises(DownloadError, match="offline"):
        get_model("one")
    assert published.paths == []
    get_model("one", offline=False)
    get_model("one")
    assert len(published.paths) == 1
    Separator("one", cache_dir=tmp_path / "other", offline=False, device="cpu")
    assert len(list((tmp_path / "other").iterdir())) == 1


def test_a_mirror_is_asked_and_its_password_not_told(
    published: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = published.url.replace("//", "//user:secret@")
    monkeypatch.setenv("DEMUCS_INFER_MIRROR", f"{mirror}/mirror/")
    get_model("one")
    get_model("foreign")
    assert published.paths[0].startswith("/mirror/models/first-")
    assert published.paths[1] == "/mirror/community/weights.ckpt"
    published.always = answers.status(403)
    with pytest.raises(DownloadError, match="403") as caught:
        get_model("second")
    assert "secret" not in str(caught.value)


NO_CONNECTION = """
import os, sys
def watch(event, args):
    if event.startswith("socket."):
        os.write(2, event.encode())
        os._exit(9)
sys.addaudithook(watch)
"""


@pytest.mark.slow
def test_cached_models_need_no_connection(published: Web) -> None:
    code = f"{NO_CONNECTION}{published.code}"
    code += "from demucs_infer.pretrained import get_model; get_model('both')"
    assert run("-c", code).returncode == 9
    get_model("both")
    before = len(published.paths)
    result = run("-c", f"{code}; assert 'requests' not in sys.modules")
    assert result.returncode == 0, result.stderr
    assert len(published.paths) == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs the permissions of POSIX")
def test_a_read_only_cache(published: Web, tmp_path: Path) -> None:
    code = f"""
import os
from demucs_infer.pretrained import get_model
{published.code}
os.chdir({str(tmp_path / "cache")!r})
get_model("foreign", cache_dir="../warm")  # imports all that is needed
registry.bags()
if os.getuid() == 0:  # whom permissions do not bind
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
print(get_model("first", cache_dir=".").sources)
try:
    get_model("second", cache_dir=".")
except RuntimeError as exc:
    print(exc)
"""
    get_model("first")
    (path,) = (tmp_path / "cache").iterdir()
    path.chmod(0o444)
    path.parent.chmod(0o555)
    result = run("-c", code)
    path.parent.chmod(0o755)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == str(SOURCES)
    assert "cannot be written (Permission denied)" in second
    assert "--cache-dir" in second
    assert published.paths[1:] == ["/elsewhere/weights.ckpt"]
    assert [*path.parent.iterdir()] == [path]


def test_addresses_without_a_registry(published: Web, checkpoint: bytes, tmp_path: Path) -> None:
    checksum = sha256(checkpoint).hexdigest()[:8]
    models = RemoteRepo(
        {
            "good": f"{published.url}/good-{checksum}.th",
            "bad": f"{published.url}/bad-01234567.th",
            "plain": f"{published.url}/plain.th",
        }
    )
    assert models.has_model("good")
    assert isinstance(models.get_model("good"), HTDemucs)
    with pytest.raises(DownloadError, match="should be 01234567"):
        models.get_model("bad")
    with pytest.raises(DownloadError, match="SHA-256 is not known"):
        models.get_model("plain")
    (tmp_path / "cache" / "plain.th").write_bytes(checkpoint)
    assert isinstance(models.get_model("plain"), HTDemucs)
    with pytest.raises(ModelLoadingError, match="Did you mean good"):
        models.get_model("goood")


def test_local_repo_scans_again(folder: Path) -> None:
    models = LocalRepo(folder)
    shutil.copy(folder / "tiny.th", folder / "more.th")
    assert not models.has_model("more")
    models.scan()
    assert list(models.list_model()) == ["more", "tiny"]


@pytest.mark.parametrize("suffix", [".th", ".safetensors"])
def test_a_file_is_a_model(suffix: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"my-20240101{suffix}"  # no checksum
    model = get_model("tiny", folder)
    if suffix == ".th":
        (folder / "tiny.th").rename(folder / name)
    else:
        save_model(model, folder / name)
    monkeypatch.chdir(folder)
    for path in (name, f"./{name}", str(folder / name), folder / name):
        found = get_model(path)
        assert torch.equal(found.encoder[0].conv.weight, model.encoder[0].conv.weight)
        # The folder of its stems has this name.
        assert Separator(path, device="cpu").name == model_label(path) == "my-20240101"


def test_a_bag_is_a_file_with_models_beside_it(folder: Path) -> None:
    shutil.copy(folder / "tiny.th", folder / "other-1.th")
    shutil.copy(folder / "tiny.th", folder / "other-2.th")  # of another model than those of the bag
    shutil.copy(folder / "pair.yaml", folder / "tiny.yaml")  # and not the model of this name
    for name in ("pair", "tiny"):
        bag = get_model(folder / f"{name}.yaml")
        assert isinstance(bag, BagOfModels)
        assert Separator(str(folder / f"{name}.yaml"), device="cpu").name == name


def test_paths_to_nothing(folder: Path) -> None:
    with pytest.raises(ModelLoadingError, match="is not a folder"):
        get_model("tiny", folder / "nowhere")
    for name in ("./absent.th", str(folder / "absent.yaml"), str(folder / "absent.safetensors")):
        with pytest.raises(ModelLoadingError, match="no such file"):
            get_model(name)
    for name in ("absent.th", "absent.yaml", str(folder)):
        with pytest.raises(ModelLoadingError, match="no model is named"):
            get_model(name)
    (folder / "lost.yaml").write_text("models: ['../tiny']")
    with pytest.raises(ModelLoadingError, match=r"no model is named '\.\./tiny'"):
        get_model(folder / "lost.yaml")


def test_lists_of_files_are_those_of_the_reference() -> None:
    ours = pretrained._parse_remote_files(pretrained.REMOTE_ROOT / "files.txt")
    theirs = demucs.pretrained._parse_remote_files(demucs.pretrained.REMOTE_ROOT / "files.txt")
    assert ours == theirs
    bags = BagOnlyRepo(pretrained.REMOTE_ROOT, RemoteRepo(ours)).list_model()
    known = demucs.repo.BagOnlyRepo(demucs.pretrained.REMOTE_ROOT, None).list_model()
    assert set(known) <= set(bags)
    assert "registry" not in bags
    for name, path in known.items():
        definition = yaml.safe_load(bags[name].read_text())
        assert definition == yaml.safe_load(path.read_text())
    assert list_models()["bag"] == bags
    # An address that the registry knows has all of its digest.
    assert len(RemoteRepo(ours)._checkpoints["955717e8"].sha256) == 64


def test_a_bag_loads_each_model_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    read = LocalRepo.read
    monkeypatch.setattr(
        LocalRepo, "read", lambda repo, sig: (loaded.append(sig), read(repo, sig))[1]
    )
    (folder / "many.yaml").write_text(f"models: [{', '.join(['tiny'] * 64)}]")
    assert len(get_model("many", folder).models) == 64
    assert loaded == ["tiny"]
    (folder / "many.yaml").write_text(f"models: [{', '.join(['tiny'] * 10_000)}]")
    with pytest.raises(ModelLoadingError, match="the limit is 64"):
        get_model("many", folder)


@pytest.mark.parametrize(("name", "size"), [("sparse.th", 2**43), ("sparse.yaml", 2**32)])
def test_a_sparse_file_is_not_read(name: str, size: int, folder: Path) -> None:
    """It takes no space on the disk, and would take gigabytes of memory."""
    with (folder / name).open("wb") as file:
        file.truncate(size)
    for model in (folder / name, "sparse"):
        with pytest.raises(ModelLoadingError, match=f"has {size} bytes"):
            get_model(model, folder)


def test_programs_replace_get_model(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs knows the parameters that the reference has."""
    from demucs_infer import api

    def mine(name: str, repo: Path | None = None) -> torch.nn.Module:
        return get_model(name, repo)

    monkeypatch.setattr(api, "get_model", mine)
    monkeypatch.setattr(pretrained, "get_model", mine)
    assert Separator("tiny", repo, device="cpu").samplerate == 8000
    get_model_from_args(argparse.Namespace(name="tiny", repo=repo, cache_dir=None))
    assert isinstance(demucs_unittest(), AnyModel)


def test_the_hub_of_pytorch_is_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEMUCS_INFER_CACHE", raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    torch.hub.set_dir(tmp_path / "chosen")
    assert registry.cache_folder() == tmp_path / "chosen" / "checkpoints"
