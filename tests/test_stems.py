"""The language of `--stems`."""

from __future__ import annotations

import pytest
import torch

from demucs_infer.errors import OptionError
from demucs_infer.write.stems import Stem, mix, needed_sources, parse_stems

from .helpers import SOURCES


@pytest.mark.parametrize(
    ("wanted", "names", "needed"),
    [
        (None, SOURCES, SOURCES),
        ("all", SOURCES, SOURCES),
        ("vocals", ["vocals"], ["vocals"]),
        ("vocals,drums", ["vocals", "drums"], ["drums", "vocals"]),
        (["vocals", "music = drums + bass"], ["vocals", "music"], ["drums", "bass", "vocals"]),
        ("all,rhythm=drums+bass", [*SOURCES, "rhythm"], SOURCES),
        ("a b.c=bass", ["a b.c"], ["bass"]),
        (("Größe=bass",), ["Größe"], ["bass"]),
    ],
)
def test_stems_have_names_and_need_sources(
    wanted: object, names: list[str], needed: list[str]
) -> None:
    stems = parse_stems(wanted, SOURCES)
    assert [stem.name for stem in stems] == names
    assert needed_sources(stems, SOURCES) == needed
    assert parse_stems([str(stem) for stem in stems], SOURCES) == stems


def test_wrong_stems_are_refused_with_their_text() -> None:
    for wanted, message in [
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
    ]:
        with pytest.raises(OptionError, match=message):
            parse_stems(wanted, SOURCES)


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "a\\b", "a\0b", "a:b", "..", "a.", "NUL", "com1.x", "x" * 300]
)
def test_names_that_no_file_can_have_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="file") as caught:
        parse_stems(f"{name}=drums", SOURCES)
    assert "\n" not in str(caught.value)


def test_sum_leaves_its_parts_alone() -> None:
    sources = {name: torch.full((2, 5), 2.0**index) for index, name in enumerate(SOURCES)}
    total = mix(Stem.parse("x=drums+bass+vocals"), sources)
    assert torch.equal(total, torch.full((2, 5), 11.0))
    assert torch.equal(sources["drums"], torch.ones(2, 5))
    assert torch.equal(mix(Stem.parse("bass"), sources), sources["bass"])
    silence = mix(Stem("no_drums", ()), {"drums": sources["drums"]})  # of a model of one source
    assert torch.equal(silence, torch.zeros(2, 5))
