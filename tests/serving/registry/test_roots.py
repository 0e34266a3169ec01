"""Only what really lies below a root can be named."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.errors import PathRefused
from serving.registry.roots import AdapterRoots


@pytest.fixture
def roots(tmp_path):
    for name in ("first/a/deep", "second/b", "outside/secret"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "first" / "file").write_text("no directory")
    (tmp_path / "first" / "leaving").symlink_to(tmp_path / "outside" / "secret")
    (tmp_path / "first" / "up").symlink_to("..")
    (tmp_path / "first" / "loop").symlink_to("loop")
    (tmp_path / "first" / "inner").symlink_to("a/deep")
    (tmp_path / "linked").symlink_to("second")
    return AdapterRoots([tmp_path / "first", tmp_path / "linked"])


@pytest.mark.parametrize(
    ("path", "real"), [("a", "first/a"), ("a/deep", "first/a/deep"), ("inner", "first/a/deep"), ("b", "second/b")]
)
def test_a_directory_below_a_root_is_found_as_it_really_is(roots, tmp_path, path, real):
    assert roots.locate(Path(path)) == tmp_path / real


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "../outside/secret", "a/../../outside/secret", "/etc", "leaving", "up/outside/secret", "up",
     "loop", "file", "nothing", "a/nothing", "a\0b", "x" * 5000, "up/first/a/../../outside", "~", "a/" * 3000],
)  # fmt: skip
def test_what_lies_elsewhere_is_refused_and_not_told_from_nothing(roots, tmp_path, path):
    with pytest.raises(PathRefused) as caught:
        roots.locate(Path(path))
    assert (caught.value.status, caught.value.param) == (400, "path")
    assert str(tmp_path) not in caught.value.message.replace(path, "")


def test_a_way_through_a_link_that_comes_back_is_the_real_directory(roots, tmp_path):
    assert roots.locate(Path("up/first/a")) == tmp_path / "first" / "a"


def test_without_roots_the_remedy_is_told(tmp_path):
    with pytest.raises(PathRefused, match="--adapter-root DIR"):
        AdapterRoots([]).locate(Path("a"))
