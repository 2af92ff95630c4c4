"""Files for other programs are the same from this machine, from URLs and from Ray."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import s3fs
import soundfile

from demucs_infer.audio import AudioFile

from .helpers import environment, noise, run, stem_box, video

RATE = 8000  # of the tiny model
# The input and the options of a command, by the folder of its files.
WAYS = {
    "dj": "music --format stem.mp4 --player --start 0.25 --duration 0:00.5"
    " --filename {folder}/{track}.{ext}",
    "deep": "music --format mka --stems vocals,music=drums+bass+other --depth auto"
    " --filename {folder}/{track}.{ext}",
    "film": "clip.mp4 --format mp4 --stems music=drums+bass+other",
}
FILES = {
    "dj": ["A/song.stem.mp4", "A/song/player.html", "B/song.stem.mp4", "B/song/player.html"],
    "deep": ["A/song.mka", "B/song.mka"],
    "film": ["clip/music.mp4"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two albums with a song of one name, in 24 bit and in float, and a video."""
    folder = tmp_path_factory.mktemp("inputs")
    for seed, (album, depth) in enumerate({"A": "PCM_24", "B": "FLOAT"}.items()):
        (folder / "music" / album).mkdir(parents=True)
        wav = noise(2, RATE + 7, seed).T.numpy()
        soundfile.write(folder / "music" / album / "song.wav", wav, RATE, subtype=depth)
    video(folder / "clip.mp4", 0.5)
    return folder


@pytest.fixture(scope="module")
def here(inputs: Path, repo: Path) -> Path:
    """The files that the commands write on this machine."""
    results = separated(repo, inputs, "{}", str(inputs / "here/{}"))
    assert [len(found) for found in results.values()] == [2, 2, 1]
    return inputs / "here"


def separated(
    repo: Path, cwd: Path, named: str, out: str, ray: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Run the commands in one process, and return their results. `named` and `out` have a `{}`."""
    common = ["-n", "tiny", "--repo", str(repo), "-d", "cpu", "--shifts", "0", "--json"]
    common += ["--cpus-per-worker", "2", "--ray"] if ray else []
    commands = []
    for way, words in WAYS.items():
        name, *options = words.split()
        commands.append([*common, "-o", out.format(way), *options, "--", named.format(name)])
    code = "import json, sys; from demucs_infer.separate import main\n"
    if ray:  # started once, for all
        code += "import ray; ray.init(num_cpus=2, log_to_driver=False, logging_level='CRITICAL')\n"
    code += "for words in json.loads(sys.argv[1]): main(words); print('next')"
    variables = {**environment(), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
    done = run("-c", code, json.dumps(commands), cwd=cwd, env=variables)
    assert done.returncode == 0, done.stderr
    texts = done.stdout.split("next\n")
    return {way: [json.loads(line) for line in text.splitlines()] for way, text in zip(WAYS, texts)}


def content(data: bytes, name: str) -> object:
    """Return the packets of a file, or the text of a page."""
    if name.endswith(".html"):
        return data
    with av.open(io.BytesIO(data)) as file:
        return [(packet.stream.index, packet.pts, bytes(packet)) for packet in file.demux()]


def assert_as_here(way: str, here: Path, read: Callable[[str], bytes]) -> None:
    for name in FILES[way]:
        expected = (here / way / "tiny" / name).read_bytes()
        assert content(read(name), name) == content(expected, name), name


def test_files_on_this_machine(here: Path) -> None:
    for way, names in FILES.items():
        root = here / way / "tiny"
        found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*"))
        assert found == names
    for album in "AB":
        stems = AudioFile(here / f"deep/tiny/{album}/song.mka")
        assert (len(stems), stems.bits) == (3, 24)
        path = here / f"dj/tiny/{album}/song.stem.mp4"
        assert len(stem_box(path)["stems"]) == 4
        assert AudioFile(path).duration == 0.5


@pytest.mark.parametrize("ray", [False, pytest.param(True, marks=pytest.mark.ray)])
def test_from_a_bucket_into_a_bucket(
    ray: bool, here: Path, inputs: Path, repo: Path, bucket: s3fs.S3FileSystem
) -> None:
    if ray:
        pytest.importorskip("ray")
    for path in (inputs / "clip.mp4", *(inputs / "music").rglob("*.wav")):
        bucket.pipe(f"bucket/in/{path.relative_to(inputs).as_posix()}", path.read_bytes())
    results = separated(repo, inputs, "s3://bucket/in/{}", "s3://bucket/out/{}", ray=ray)
    for way, names in FILES.items():
        root = f"bucket/out/{way}/tiny/"
        assert sorted(bucket.find(root)) == [root + name for name in names]
        assert_as_here(way, here, lambda name: bucket.cat_file(root + name))  # noqa: B023
        said = [stem["path"] for result in results[way] for stem in result["stems"].values()]
        said += [result["player"] for result in results[way] if result["player"]]
        assert {*said} == {f"s3://{root}{name}" for name in names}
        assert not any(result["error"] for result in results[way])
    assert [result["seconds"] for result in results["dj"]] == [0.5, 0.5]
