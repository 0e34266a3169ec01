"""The hub's own client fetches over real HTTP what an adapter may consist of, and every failure has a remedy."""

from __future__ import annotations

import huggingface_hub
import pytest

from serving.admin.hub import download
from serving.errors import BadRequest, HubUnreachable
from tests.serving.admin.hub_server import running_hub

FILES = {
    "adapter_model.safetensors": b"weights",
    "adapter_config.json": b"{}",
    "chat_template.jinja": b"{{ x }}",
    "merges.txt": b"a b",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"code",
}


def test_only_the_files_of_an_adapter_are_fetched(tmp_path):
    with running_hub("ann/tuned", FILES) as (url, fetched):
        download("ann/tuned", None, tmp_path, url)
    safe = {name for name in FILES if not name.endswith((".bin", ".py"))}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: FILES[name] for name in safe}
    assert set(fetched) == safe


@pytest.mark.parametrize("revision", [None, "v2"])
def test_what_does_not_exist_is_a_bad_request(tmp_path, revision):
    with running_hub("ann/tuned", FILES) as (url, _), pytest.raises(BadRequest, match="check the id") as caught:
        download("ann/other", revision, tmp_path, url)
    assert (caught.value.param, caught.value.code) == ("hub_id", "hub_not_found")


def test_an_id_that_is_none_is_a_bad_request(tmp_path):
    with pytest.raises(BadRequest, match="hub_id"):
        download("../../etc", None, tmp_path, "http://127.0.0.1:9")


def test_without_a_network_the_path_is_the_remedy(tmp_path):
    with pytest.raises(HubUnreachable, match="register it by `path`") as caught:
        download("ann/tuned", None, tmp_path, "http://127.0.0.1:9")
    assert caught.value.status == 502


def test_a_file_that_leads_out_of_the_directory_is_refused_and_not_written(tmp_path):
    inside = tmp_path / "in" / "adapter"
    with (
        running_hub("ann/tuned", {"../out.json": b"{}"}) as (url, _),
        pytest.raises(BadRequest, match=r"\.\.") as caught,
    ):
        download("ann/tuned", None, inside, url)
    assert caught.value.param == "hub_id"
    assert not list(tmp_path.rglob("out.json"))


def test_a_connection_lost_within_a_file_is_told_as_such(tmp_path):
    with running_hub("ann/tuned", FILES, cuts=True) as (url, _), pytest.raises(HubUnreachable, match="register it by"):
        download("ann/tuned", None, tmp_path, url)


def test_a_download_leaves_nothing_outside_its_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home"))
    with running_hub("ann/tuned", FILES) as (url, _):
        download("ann/tuned", "v2", tmp_path / "adapter", url)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_hub_in_trouble_is_no_fault_of_the_request(tmp_path):
    with (
        running_hub("ann/tuned", FILES, status=400) as (url, _),
        pytest.raises(HubUnreachable, match=r"Bad request.*register it by"),
    ):
        download("ann/tuned", None, tmp_path, url)
