"""The manifests match the server, and the scripts start and stop the real one."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from serving.keys import KeyRing
from serving.keys import main as key_command
from tests.tiny import make_fake_app, running_server, wait_until

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted([*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.yml")])
DOCKERFILES = sorted(path for path in DEPLOY.glob("Dockerfile.*") if path.suffix != ".dockerignore")


def documents(path: Path) -> list[dict]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def kubernetes() -> dict[str, dict]:
    return {d["kind"]: d for path in sorted((DEPLOY / "k8s").glob("*.yaml")) for d in documents(path)}


def container() -> dict:
    (only,) = kubernetes()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_every_manifest_parses():
    assert len(MANIFESTS) >= 6
    assert all(documents(path) for path in MANIFESTS)
    assert set(kubernetes()) == {"ConfigMap", "Deployment", "PodDisruptionBudget", "Service"}


def test_the_manifests_use_flags_that_the_server_has():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]["command"]
    used = {word for words in (compose, container()["args"]) for word in words if word.startswith("--")}
    assert {"--base", "--adapter", "--port"} <= used
    help_text = subprocess.run(
        [sys.executable, "-m", "serving", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert used <= set(re.findall(r"--[a-z-]+", help_text))


def drain_s(words: list[str]) -> int:
    return int(words[words.index("--drain-s") + 1])


def test_the_grace_period_is_longer_than_the_drain():
    pod = kubernetes()["Deployment"]["spec"]["template"]["spec"]
    pre_stop_s = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pre_stop_s + drain_s(container()["args"])
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]
    assert int(compose["stop_grace_period"].removesuffix("s")) > drain_s(compose["command"])


def test_the_config_map_has_every_name_that_the_deployment_uses():
    names = set(re.findall(r"\$\((\w+)\)", " ".join(container()["args"])))
    assert names == set(kubernetes()["ConfigMap"]["data"])


def test_probes_ask_paths_that_answer(fake_server):
    paths = {container()[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    paths.add(kubernetes()["Deployment"]["spec"]["template"]["metadata"]["annotations"]["prometheus.io/path"])
    paths |= {job["metrics_path"] for job in documents(DEPLOY / "prometheus.yml")[0]["scrape_configs"]}
    assert paths == {"/healthz", "/readyz", "/metrics"}
    for path in paths:
        assert httpx.get(fake_server + path).status_code == 200
    done = probe("ready", fake_server)
    assert (done.returncode, done.stdout) == (0, "status 200\n")


def test_a_server_with_keys_is_ready_and_the_examples_say_how_to_send_one(tiny_base, tmp_path):
    assert key_command(["new", "ann", "--keys", str(tmp_path / "keys.toml")]) == 0
    app, _ = make_fake_app(tiny_base, {}, keys=KeyRing(tmp_path / "keys.toml"))
    with running_server(app) as url:
        assert probe("ready", url).returncode == 0
        done = probe("examples", url)
    assert done.returncode == 0
    assert f"curl {url}/v1/models -H 'Authorization: Bearer KEY'" in done.stdout


def test_selectors_find_the_pods():
    kinds = kubernetes()
    labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert kinds["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert kinds["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert kinds["Service"]["spec"]["selector"] == labels
    assert kinds["Service"]["spec"]["ports"][0]["targetPort"] == container()["ports"][0]["name"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_staged_checked_and_not_root(path):
    text = path.read_text()
    assert len(re.findall(r"^FROM ", text, re.MULTILINE)) == 2
    assert re.search(r"^USER 10001", text, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK .*\\\n\s+CMD .*probe\.py.*ready", text, re.MULTILINE)
    ignore = Path(f"{path}.dockerignore").read_text().split()
    copied = [source for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.MULTILINE) for source in line.split()]
    assert len(copied) >= 6
    for source in copied:
        assert f"!{source}" in ignore, f"{source} is not in the build context"


def test_both_images_are_found():
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


def test_scripts_are_bash_and_stop_at_errors():
    scripts = sorted(DEPLOY.glob("*.sh"))
    assert len(scripts) == 3
    for path in scripts:
        subprocess.run(["bash", "-n", str(path)], check=True)
    for name in ("up.sh", "down.sh"):
        assert "set -euo pipefail" in (DEPLOY / name).read_text()
        assert os.access(DEPLOY / name, os.X_OK)


def probe(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(DEPLOY / "probe.py"), *arguments], capture_output=True, text=True, check=False
    )


class Scripts:
    """up.sh and down.sh with their state in a temporary folder."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.environment = {**os.environ, "PYTHON": sys.executable, "RUN_DIR": str(run_dir), "WAIT_S": "90"}

    def run(self, script: str, *flags: object) -> subprocess.CompletedProcess:
        command = [str(DEPLOY / script), *map(str, flags)]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=150, check=False, cwd=self.run_dir
        )

    def pid(self) -> int:
        return int((self.run_dir / "server.pid").read_text())


@pytest.fixture
def scripts(tmp_path) -> Iterator[Scripts]:
    scripts = Scripts(tmp_path)
    yield scripts
    scripts.run("down.sh")


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def requests_in(output: str) -> list[tuple[str, dict]]:
    words = [shlex.split(line) for line in output.splitlines() if line.startswith("curl ")]
    return [(line[2], json.loads(line[line.index("-d") + 1])) for line in words]


def test_the_server_starts_once_restarts_for_other_inputs_and_stops(scripts, tiny_base, tiny_adapters):
    port = free_port()
    flags = [
        "--base",
        tiny_base,
        "--engine",
        "fake",
        "--adapter",
        f"starter={tiny_adapters['starter']}",
        "--port",
        port,
    ]
    started = scripts.run("up.sh", *flags)
    assert started.returncode == 0, started.stdout + started.stderr
    assert f"s: http://127.0.0.1:{port}" in started.stdout
    first = scripts.pid()

    requests = requests_in(started.stdout)
    assert [(body["model"], body.get("stream", False)) for _, body in requests] == [
        ("base", False),
        ("starter", False),
        ("starter", True),
    ]
    for url, body in requests:
        answer = httpx.post(url, json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert ("data: [DONE]" in answer.text) == body.get("stream", False)

    again = scripts.run("up.sh", *flags)
    assert again.returncode == 0
    assert "already running" in again.stdout
    assert scripts.pid() == first

    other = scripts.run("up.sh", *flags, "--adapter", f"other={tiny_adapters['other']}")
    assert other.returncode == 0, other.stdout + other.stderr
    assert "restarting" in other.stdout
    assert scripts.pid() != first
    assert not is_alive(first)
    assert {body["model"] for _, body in requests_in(other.stdout)} == {"base", "starter", "other"}

    second = scripts.pid()
    stopped = scripts.run("down.sh")
    assert stopped.returncode == 0
    assert "stopped after" in stopped.stdout
    wait_until(lambda: not is_alive(second), timeout_s=5)  # its last moments, without a command line, may show
    assert not (scripts.run_dir / "server.pid").exists()
    assert "no server is running" in scripts.run("down.sh").stdout


def test_a_server_that_dies_early_is_explained(scripts, tmp_path):
    done = scripts.run("up.sh", "--base", tmp_path / "nothing-here", "--engine", "fake", "--port", free_port())
    assert done.returncode == 1
    assert "error: the server ended after" in done.stderr
    assert "nothing-here is no directory" in done.stderr.splitlines()[-1], "the reason is the server's own"
    assert not (scripts.run_dir / "server.pid").exists()


def test_a_port_in_use_is_refused_and_its_holder_named(scripts, tiny_base):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = scripts.run("up.sh", "--base", tiny_base, "--engine", "fake", "--port", port)
    assert done.returncode == 1
    assert f"--port {port} on 127.0.0.1: it is held by process {os.getpid()} (" in done.stderr


def test_a_server_that_is_never_ready_is_stopped(scripts, tmp_path):
    silent = tmp_path / "silent-python"
    silent.write_text(f'#!/bin/bash\nif [ "$1" = -m ]; then exec sleep 300; fi\nexec {sys.executable} "$@"\n')
    silent.chmod(0o755)
    scripts.environment |= {"PYTHON": str(silent), "WAIT_S": "2"}
    done = scripts.run("up.sh", "--base", tmp_path, "--port", free_port())
    assert done.returncode == 1
    assert "was not ready after 2 s" in done.stderr
    assert not (scripts.run_dir / "server.pid").exists()


def test_a_process_that_is_not_ours_is_left_alone(scripts):
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        (scripts.run_dir / "server.pid").write_text(f"{stranger.pid}\n")
        (scripts.run_dir / "server.command").write_text("--base x\n")
        done = scripts.run("down.sh")
        assert done.returncode == 0
        assert f"process {stranger.pid} is now another one and was left alone: sleep 60" in done.stdout
        time.sleep(0.2)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize(
    ("flags", "says"), [(["--port", "http"], "--port http: must be a number"), (["--host"], "--host needs")]
)
def test_a_bad_flag_is_refused(scripts, flags, says):
    done = scripts.run("up.sh", *flags)
    assert done.returncode == 1
    assert says in done.stderr


def test_inputs_are_the_same_until_a_flag_or_a_file_changes(tmp_path):
    (tmp_path / "weights").write_text("one")
    before = probe("digest", "--adapter", f"a={tmp_path}").stdout
    assert probe("digest", "--adapter", f"a={tmp_path}").stdout == before
    assert probe("digest", "--adapter", f"b={tmp_path}").stdout != before
    (tmp_path / "weights").write_text("three")
    assert probe("digest", "--adapter", f"a={tmp_path}").stdout != before


@pytest.mark.parametrize("flag", ["--state", "--adapter-root"])
def test_what_the_server_writes_or_is_told_of_is_no_input(tmp_path, flag):
    before = probe("digest", flag, str(tmp_path)).stdout
    (tmp_path / "registry.sqlite").write_text("a label moved")
    assert probe("digest", flag, str(tmp_path)).stdout == before
    assert probe("digest", flag, str(tmp_path.parent)).stdout != before
