"""Models on the hub of Hugging Face: by their address, and as a second source."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import demucs.hf
import huggingface_hub
import pytest
import torch

from demucs_infer import hf
from demucs_infer.api import Separator
from demucs_infer.errors import DownloadError, ModelLoadingError
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.hub import registry
from demucs_infer.hub.hf import HubModel, cached_file
from demucs_infer.pretrained import get_model, model_label
from demucs_infer.repo import RemoteRepo
from demucs_infer.states import load_model, save_model

from .helpers import TINY, run, shake
from .tools import web as answers
from .tools.hub import COMMIT, TOKEN, Hub, serving_hub
from .tools.web import Web

MAIN = "from demucs_infer.separate import command; import sys; command(sys.argv[1:])"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "a.safetensors"
    return save_model(shake(HTDemucs(**TINY)), path).read_bytes()


@pytest.fixture
def hub(weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a bag of two models, `hf://someone/mine`."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    with serving_hub() as server:
        root = "someone/Demucs-mine"
        server.files = {
            f"{root}/mine.yaml": b"models: ['aaaa', 'bbbb']\nweights: [[1,0,0,0],[0,1,1,1]]\n",
            f"{root}/aaaa.safetensors": weights,
            f"{root}/bbbb.safetensors": weights + b"",
        }
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        yield server


@pytest.mark.parametrize("name", ["htdemucs", "htdemucs_ft", "htdemucs_6s", "mdx_extra_q", "a_b"])
def test_repositories_are_those_of_the_reference(name: str) -> None:
    assert hf.hf_repo_name(name) == demucs.hf.hf_repo_name(name)
    assert hf.DEFAULT_NAMESPACE == demucs.hf.DEFAULT_NAMESPACE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://htdemucs", HubModel("htdemucs")),
        ("hf://someone/my.model", HubModel("my.model", "someone")),
        ("hf://a/b@v1", HubModel("b", "a", "v1")),
        ("hf://a/b@refs/pr/3", HubModel("b", "a", "refs/pr/3")),
    ],
)
def test_addresses(text: str, expected: HubModel) -> None:
    assert HubModel.parse(text) == expected
    assert model_label(text) == expected.name


@pytest.mark.parametrize(
    "text",
    "hf:// hf://../x hf://a/.. hf://a..b/c hf://a/b/c hf:///x hf://a/ hf://a/b@ hf://a/b@../x"
    " hf://a--b/c hf://a/b@x//y hf://a\\b hf://.a hf://a/b\x00 hf://a/b\n hf://C:/x"
    " hf://a/b@/etc hf://a/b?x".split(" "),
)
def test_addresses_that_are_refused(text: str, hub: Hub) -> None:
    with pytest.raises(ModelLoadingError, match="is not of the form hf://"):
        get_model(text)
    assert not hub.asked


def test_a_bag_is_fetched_into_the_hubs_cache(
    hub: Hub, weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DownloadError, match=r"mine.yaml is not in the hub's cache.*offline"):
        get_model("hf://someone/mine", offline=True)
    assert not hub.asked
    bag = get_model("hf://someone/mine")
    assert [list(row) for row in bag.weights] == [[1, 0, 0, 0], [0, 1, 1, 1]]
    assert not bag.training
    folder = tmp_path / "hub" / "models--someone--Demucs-mine" / "snapshots" / COMMIT
    assert {path.name for path in folder.iterdir()} == {
        "mine.yaml",
        "aaaa.safetensors",
        "bbbb.safetensors",
    }
    asked = len(hub.asked)
    get_model("hf://someone/mine", offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    get_model("hf://someone/mine")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert Separator("hf://someone/mine", device="cpu", offline=True).name == "mine"
    assert len(hub.asked) == asked
    hub.failing = 503
    get_model("hf://someone/mine")
    found = huggingface_hub.try_to_load_from_cache(
        "someone/Demucs-mine", "aaaa.safetensors", cache_dir=tmp_path / "hub"
    )
    assert Path(found).read_bytes() == weights
    # A reference that takes no space on the disk, and would take terabytes of memory.
    with (folder.parents[1] / "refs" / "main").open("r+b") as file:
        file.truncate(2**43)
    with pytest.raises(DownloadError, match="503"):
        get_model("hf://someone/mine")


def test_a_revision(hub: Hub) -> None:
    hub.revisions["v1"] = COMMIT
    get_model("hf://someone/mine@v1")
    assert "/resolve/v1/" in hub.asked[0]
    assert cached_file(HubModel("mine", "someone", "v1"), "mine.yaml")
    with pytest.raises(DownloadError, match=r"v2/mine\.yaml: the revision does not exist"):
        get_model("hf://someone/mine@v2")


def test_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.private.add("someone/Demucs-mine")
    with pytest.raises(DownloadError, match=r"someone/Demucs-mine.*does not exist, or HF_TOKEN"):
        get_model("hf://someone/mine")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    get_model("hf://someone/mine")
    assert hub.tokens == {""}  # the content has another host


def test_a_download_that_breaks_off_and_one_that_moved(hub: Hub, weights: bytes) -> None:
    hub.renamed["someone/Demucs-old"] = "someone/Demucs-mine"
    hub.files["someone/Demucs-mine/old.yaml"] = b"models: ['aaaa']"
    hub.breaks = [None, len(weights) // 2]  # type: ignore[list-item]
    assert get_model("hf://someone/old").sources
    assert sum(line.startswith("GET /cdn/") for line in hub.asked) == 2


def test_wrong_content_is_not_loaded(hub: Hub) -> None:
    get_model("hf://someone/mine")
    path = cached_file(HubModel("mine", "someone"), "aaaa.safetensors")
    content = path.read_bytes()
    path.resolve().write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelLoadingError, match=r"is damaged: .*Delete .* again"):
        get_model("hf://someone/mine", offline=True)


@pytest.mark.parametrize(
    ("bag", "message"),
    [
        ("models: ['../../secret']", "not a signature"),
        ("models: ['https://host/x']", "not a signature"),
        ("models: ['pickled.th']", r"pickled.th.safetensors: the repository has no such file"),
        ("models: [{a: b}]", "not signatures"),
        ("models: ['aaaa', 'pickled']", r"pickled.safetensors: .*no such file \(only"),
        ("models: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("a: &a {b: c}\nmodels: [{<<: [*a, *a]}]", "not valid YAML"),
        ("models: ['aaaa']\nsegment: &a [*a]", "not valid YAML"),
        ("models: ['aaaa']\nweights: 7", "is not a bag"),
        (f"models: ['aaaa']\nweights: [[1{'0' * 400}]]", "not valid YAML"),
        (f"models: [1{'0' * 5000}]", "not valid YAML"),
        (f"models: [1{':59' * 6000}]", "not valid YAML"),
        (f"models: ['aaaa']\nsegment: 1{':59' * 600}.5", "not"),
        (f"models: [{'a, ' * 65}]", "the limit is 64"),
        ("models: [" * 3000, "not valid YAML"),
        ("#" * 300_000, "has 300000 bytes"),
    ],
    ids=lambda value: value[:30],
)
def test_untrusted_bags(bag: str, message: str, hub: Hub) -> None:
    hub.files["someone/Demucs-mine/mine.yaml"] = bag.encode()
    hub.files["someone/Demucs-mine/pickled.th"] = b"PK"
    with pytest.raises(ModelLoadingError, match=message) as caught:
        get_model("hf://someone/mine")
    assert len(str(caught.value)) < 2000
    assert all(line.endswith((".yaml", ".safetensors")) or "/cdn/" in line for line in hub.asked)


EVIL = ["../../evil", "/tmp/evil", "..", "", "a" * 39, "\\evil", "0" * 40 + "/../../../evil"]


@pytest.mark.parametrize("header", ["ETag", "X_Linked_ETag", "X_Repo_Commit"])
def test_names_that_a_hub_chooses(header: str, hub: Hub, tmp_path: Path) -> None:
    """Nothing is written outside of its cache, nor under such a name."""
    for value in EVIL:
        hub.facts = {header: value if header == "X_Repo_Commit" else f'"{value}"'}
        with pytest.raises(DownloadError, match="revision and digest"):
            get_model("hf://someone/mine")
    assert not list(tmp_path.rglob("*evil*"))
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("facts", [{}, {"X_Linked_Size": 100}, {"Content_Length": "9" * 5000}])
def test_a_list_of_gigabytes(facts: dict, hub: Hub) -> None:
    hub.files["someone/Demucs-mine/mine.yaml"] = bytes(30_000_000)
    hub.facts = facts
    with pytest.raises(DownloadError):
        get_model("hf://someone/mine")
    # Sockets take some megabytes before the server notices that nobody reads.
    assert hub.sent < 15_000_000


# The hub as a second source.


@pytest.fixture
def second(hub: Hub, published: Web, weights: bytes, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, with the model `first` of the registry of `published`."""
    hub.files["adefossez/Demucs-one/first.safetensors"] = weights
    monkeypatch.setenv("HF_ENDPOINT", hub.url)  # as that of `published` is down
    return hub


@pytest.mark.parametrize("status", [404, 500])
def test_the_second_host_when_the_first_fails(
    status: int, second: Hub, published: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published.always = answers.status(status)
    first = get_model("first")
    (record,) = (r for r in caplog.records if r.levelname == "WARNING")
    assert f"{status}" in record.message
    assert f"fetched from {second.url}/adefossez/Demucs-one/resolve/main/first" in record.message
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    assert torch.equal(first.encoder[0].conv.weight, load_model(path).encoder[0].conv.weight)
    asked = len(second.asked)
    get_model("first", offline=True)
    assert len(second.asked) == asked
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DownloadError, match="is damaged"):
        get_model("first", offline=True)
    get_model("first")


def test_a_mirror_goes_before_both(
    second: Hub, published: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMUCS_INFER_MIRROR", f"{published.url}/mirror")
    published.answers = [answers.status(404), answers.status(404)]
    get_model("first")
    assert [path.split("/")[1] for path in published.paths] == ["mirror", "models"]
    assert second.asked


def test_wrong_content_of_the_second_host(second: Hub, published: Web, tmp_path: Path) -> None:
    """Its digest is the one in the registry, or else the one that the hub announces."""
    published.always, second.wrong = answers.status(404), True
    with pytest.raises(DownloadError, match="SHA-256 is"):
        get_model("first")
    assert not list((tmp_path / "cache").glob("*.safetensors"))
    text = (tmp_path / "registry.yml").read_text()
    addition = f"    safetensors_sha256: '{'0' * 64}'\n    megabytes: 1"
    (tmp_path / "registry.yml").write_text(text.replace("    megabytes: 1", addition))
    registry.registry.cache_clear()
    with pytest.raises(DownloadError, match=f"should be {'0' * 64}"):
        get_model("first")


def test_the_hubs_cache_is_looked_at(second: Hub, published: Web, tmp_path: Path) -> None:
    """The real package has written it."""
    huggingface_hub.hf_hub_download(
        *("adefossez/Demucs-one", "first.safetensors"),
        cache_dir=tmp_path / "hub",
        endpoint=second.url,
    )
    asked = len(second.asked)
    get_model("one")
    path, _ = RemoteRepo().locate("first")
    assert path.is_relative_to(tmp_path / "hub")
    listed = run("-c", f"{published.code}{MAIN}", "--list-models", "--verbose").stdout
    assert f" in {path.parent}\n" in listed
    assert not published.paths
    assert len(second.asked) == asked
    path.resolve().write_bytes(b"damaged")
    get_model("one")
    assert len(published.paths) == 1
    shutil.rmtree(tmp_path / "hub")
