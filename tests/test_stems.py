from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from demucs_infer.errors import OptionError
from demucs_infer.io.stems import Stem, mix, needed_sources, parse_stems

from .helpers import SOURCES


@pytest.mark.parametrize(
    ("wanted", "names", "needed"),
    [
        (None, SOURCES, SOURCES),
        ("all", SOURCES, SOURCES),
        ("vocals", ["vocals"], ["vocals"]),
        ("vocals,drums", ["vocals", "drums"], ["drums", "vocals"]),
        (["vocals", "music = drums + bass"], ["vocals", "music"], ["drums", "bass", "vocals"]),
        ("vocals,instrumental=drums+bass+other", ["vocals", "instrumental"], SOURCES),
        ("all,rhythm=drums+bass", [*SOURCES, "rhythm"], SOURCES),
        ("a b.c=bass", ["a b.c"], ["bass"]),
        (("Größe=bass",), ["Größe"], ["bass"]),
    ],
)
def test_stems_by_name(wanted: object, names: list[str], needed: list[str]) -> None:
    stems = parse_stems(wanted, SOURCES)
    assert [stem.name for stem in stems] == names
    assert needed_sources(stems, SOURCES) == needed
    assert parse_stems([str(stem) for stem in stems], SOURCES) == stems


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("piano", "'piano'"),
        ("x=drums+piano", "'piano'"),
        ("", "''"),
        ([], "no stem"),
        ("vocals,", "''"),
        ("x=", "'x='"),
        ("=drums", "'=drums'"),
        ("x=drums+", "'x=drums\\+'"),
        ("x=drums+drums", "twice"),
        ("vocals,vocals", "'vocals'"),
        ("all,vocals", "'vocals'"),
        ("vocals,Vocals=drums", "'Vocals'"),
        ("../x=drums", "'../x'"),
        ("a/b=drums", "'a/b'"),
        ("a\\b=drums", "file"),
        ("a\0b=drums", "file"),
        ("a:b=drums", "file"),
        ("..=drums", "file"),
        ("a.=drums", "file"),
        ("NUL=drums", "'NUL'"),
        ("com1.x=drums", "file"),
        (f"{'x' * 300}=drums", "file"),
    ],
)
def test_stems_that_there_are_not(wanted: object, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        parse_stems(wanted, SOURCES)
    assert "\n" not in str(caught.value)


def test_a_sum_leaves_its_parts_alone() -> None:
    sources = {name: torch.full((2, 5), 2.0**index) for index, name in enumerate(SOURCES)}
    total = mix(Stem.parse("x=drums+bass+vocals"), sources)
    assert torch.equal(total, torch.full((2, 5), 11.0))
    assert torch.equal(sources["drums"], torch.ones(2, 5))
    assert torch.equal(mix(Stem.parse("bass"), sources), sources["bass"])


def test_torch_is_not_imported() -> None:
    code = "import sys, demucs_infer.io.stems; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
