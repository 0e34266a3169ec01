"""A run that is killed, again and again, ends in the adapter of the run that never was; a full disk loses nothing."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest

from tests.integration.crash import PRELOAD, run_training
from tests.training.recipes import small_config
from training import checkpoint
from training.artifact import MANIFEST_NAME, verify_adapter
from training.config import resolved_toml
from training.stop import EXIT_STOPPED
from training.train import train

KILLS = 20
SEED = 20261124
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


@dataclass
class Crash:
    """A recipe, the run directory under test, and the adapter that a run without a crash leaves."""

    context: ForkServerContext
    folder: Path
    recipe: Path
    expected: dict[str, bytes]

    @property
    def out(self) -> Path:
        return self.folder / "run"

    @property
    def adapter(self) -> Path:
        return self.out / "adapter"

    def start(self, *words: str, **trap: int) -> ForkServerProcess:
        arguments = (str(self.recipe), str(self.out), str(self.folder), words or ("--resume",), trap)
        process = self.context.Process(target=run_training, args=arguments)
        process.start()
        return process

    def finish(self, *words: str, **trap: int) -> int:
        process = self.start(*words, **trap)
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    def stderr(self) -> str:
        path = self.folder / "stderr.txt"
        return path.read_text() if path.exists() else ""

    def check_no_torn_state(self) -> None:
        """What stands under its final name is whole, whenever the process died."""
        assert checkpoint.torn(self.out / "checkpoints") == []
        if self.adapter.exists():
            verify_adapter(self.adapter)

    def check_finished(self) -> None:
        assert contents(self.adapter) == self.expected, self.stderr()
        verify_adapter(self.adapter)
        left = sorted(path.name for path in self.out.iterdir())
        assert left == sorted(expected_names(self.out)), left


def expected_names(out: Path) -> set[str]:
    """No checkpoint, no temporary file and no older adapter is left."""
    names = {path.name for path in out.iterdir()}
    assert {"adapter", "held_out.jsonl", "loss.png", "recipe.toml", "train_log.jsonl"} <= names
    return {name for name in names if ".tmp" not in name and ".old" not in name and name != "checkpoints"}


def contents(adapter: Path) -> dict[str, bytes]:
    """Every file's bytes; of the manifest all but `created`, the one field that tells two equal runs apart."""
    found = {path.name: path.read_bytes() for path in adapter.iterdir()}
    manifest = json.loads(found[MANIFEST_NAME])
    del manifest["created"]
    return found | {MANIFEST_NAME: json.dumps(manifest).encode()}


@pytest.fixture(scope="module")
def crash(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, server: ForkServerContext) -> Crash:
    """The expected adapter comes from this process, whose hashes of text, and so orders of sets, are others."""
    folder = tmp_path_factory.mktemp("crash")
    config = small_config(
        tiny_base,
        folder,
        model={"quantisation": "nf4"},
        lora={"dropout": 0.1},
        optim={"batch_size": 4, "epochs": 1},
        run={"save_every": 1, "eval_every": 2, "keep_checkpoints": 1},
    )
    recipe = folder / "small.toml"
    recipe.write_text(resolved_toml(config))
    train(config, folder / "whole", folder)
    return Crash(server, folder, recipe, contents(folder / "whole" / "adapter"))


@pytest.fixture(autouse=True)
def clean(crash: Crash) -> None:
    shutil.rmtree(crash.out, ignore_errors=True)
    for name in ("stderr.txt", "writes.txt"):
        (crash.folder / name).unlink(missing_ok=True)


def test_twenty_kills_at_random_times_change_no_byte(crash: Crash):
    for _ in range(2):  # the first starts the server
        shutil.rmtree(crash.out, ignore_errors=True)
        began = time.monotonic()
        assert crash.finish() == 0, crash.stderr()
        whole_s = time.monotonic() - began
        crash.check_finished()
    shutil.rmtree(crash.out)
    print(f"seed {SEED}: kills within {whole_s:.2f} s of each start")
    draw, kills, finished = random.Random(SEED), 0, 0
    while kills < KILLS:
        process = crash.start()
        process.join(draw.uniform(0.2, 0.65) * whole_s)  # a resumed run is shorter than a whole one
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            crash.check_no_torn_state()
        else:
            assert process.exitcode == 0, crash.stderr()
            finished += 1
            crash.check_finished()
            shutil.rmtree(crash.out)
    assert crash.finish() == 0, crash.stderr()
    crash.check_finished()
    print(f"{kills} kills, {finished + 1} runs brought to their end")


def test_a_kill_at_any_write_changes_no_byte(crash: Crash):
    """Before the n-th change below the run directory: to a checkpoint, the log, the adapter, or a rename of them."""
    assert crash.finish(count_writes=1) == 0, crash.stderr()
    writes = (crash.folder / "writes.txt").read_text().splitlines()
    shutil.rmtree(crash.out)
    places = {"checkpoint": "/checkpoints/", "adapter": "/adapter", "log": "train_log"}
    chosen = {kind: [at for at, line in enumerate(writes) if part in line] for kind, part in places.items()}
    assert all(chosen.values()), writes
    draw = random.Random(SEED)
    last = [at for at, line in enumerate(writes) if "/checkpoints" in line][-1]  # the final checkpoint's removal
    points = [*draw.sample(chosen["checkpoint"], 2), *draw.sample(chosen["adapter"], 2), chosen["log"][-1], last]
    print(f"seed {SEED}: of {len(writes)} writes, killed before {[writes[at] for at in points]}")
    for point in points:
        assert crash.finish(kill_at_write=point) == -signal.SIGKILL
        crash.check_no_torn_state()
        assert crash.finish() == 0, crash.stderr()
        crash.check_finished()
        shutil.rmtree(crash.out)


def test_sigterm_saves_at_the_step_boundary_and_says_so(crash: Crash):
    process = crash.start()
    while checkpoint.newest(crash.out / "checkpoints") is None:
        assert process.is_alive(), crash.stderr()
        time.sleep(0.01)
    process.terminate()
    process.join()
    assert process.exitcode == EXIT_STOPPED, crash.stderr()
    crash.check_no_torn_state()
    newest = checkpoint.newest(crash.out / "checkpoints")
    assert f"stopped by a signal after step {int(newest.name[5:])} of" in crash.stderr()
    assert crash.finish() == 0, crash.stderr()
    crash.check_finished()


@pytest.mark.parametrize("size", [60_000, 4_000], ids=["the optimizer's state", "nearly nothing"])
def test_a_full_disk_is_told_and_loses_nothing(crash: Crash, size: int):
    """By a limit on file sizes: real failing writes, without a file system of the test's own."""
    assert crash.finish(kill_at_write=60) == -signal.SIGKILL
    before = checkpoint.newest(crash.out / "checkpoints")
    assert before is not None
    assert crash.finish(file_size=size) == 2, crash.stderr()
    last = crash.stderr().splitlines()[-1]
    for part in ("error: cannot write", "File too large", "free some space", "--resume"):
        assert part in last
    assert checkpoint.newest(crash.out / "checkpoints") == before
    assert list((crash.out / "checkpoints").glob(".*")) == []
    assert crash.finish() == 0, crash.stderr()
    crash.check_finished()


def test_a_second_process_is_refused_while_the_first_goes_on(crash: Crash):
    first = crash.start()
    while not (crash.out / "train_log.jsonl").exists():
        assert first.is_alive(), crash.stderr()
        time.sleep(0.01)
    assert crash.finish("--fresh") == 2
    assert f"process {first.pid} trains there" in crash.stderr()
    first.join()
    assert first.exitcode == 0, crash.stderr()
    crash.check_finished()


def test_changed_inputs_and_torn_files_are_refused_by_name(crash: Crash):
    assert crash.finish(kill_at_write=60) == -signal.SIGKILL
    newest = checkpoint.newest(crash.out / "checkpoints")
    for words, told in (
        (("--resume", "--optim.learning_rate", "1e-4"), "recipe (optim.learning_rate = 0.005 then, 0.0001 now)"),
        (("--optim.epochs", "2"), "is of an unfinished run: go on with --resume, or discard it with --fresh"),
    ):
        assert crash.finish(*words) == 2
        assert told in crash.stderr()
        assert checkpoint.newest(crash.out / "checkpoints") == newest
    kept = {path: path.read_bytes() for path in (crash.out / "checkpoints").glob("step-*/optimizer.pt")}
    for path, content in kept.items():
        path.write_bytes(content[:100])
    assert crash.finish() == 2
    assert "optimizer.pt: not as it was written" in crash.stderr()
    for path, content in kept.items():  # as the message says
        path.write_bytes(content)
    assert crash.finish() == 0, crash.stderr()
    crash.check_finished()
