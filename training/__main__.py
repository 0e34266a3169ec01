"""The command line of training: train, sweep, merge, check, data, preview, plan."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from training import merge_command as merge
from training.artifact import MANIFEST_NAME, ArtifactError, fingerprint_base, read_manifest, verify_adapter
from training.config import ConfigError, TrainConfig, cache_dir, load_recipe
from training.data_gate import command as data
from training.errors import TrainingError
from training.fields import allowed
from training.sweep import command as sweep

_RUNS = Path("runs")
_RECIPE_HELP = "TOML file, name, or LLaMA-Factory's YAML or JSON (default %(default)s)"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 failed check, 2 bad input, 75 stopped and resumable."""
    # Without it the heap of a CPU process keeps holes between tensors: 4.5 GiB where 3.2 are used (glibc, NF4).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    parser = _parser()
    words, overrides = _split_overrides(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(words)
    if overrides and arguments.command not in ("train", "sweep", "data", "preview", "plan"):
        parser.error(f"{arguments.command} takes no recipe fields: {' '.join(overrides)}")
    try:
        if not sys.stderr.isatty():
            _hide_progress_bars()
        code: int = arguments.run(arguments, overrides)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


def _split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the command's own words, and the `--section.key value` pairs, which argparse does not know."""
    own: list[str] = []
    overrides: list[str] = []
    for word in words:
        is_field = word.startswith("--") and "." in word.partition("=")[0]
        last = overrides[-1] if overrides else ""
        is_value = last.startswith("--") and "=" not in last and not word.startswith("--")
        (overrides if is_field or is_value else own).append(word)
    return own, overrides


def _hide_progress_bars() -> None:
    """A log file shows each redrawing of transformers' bars; ours print whole lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    _add_train(
        commands.add_parser("train", help="train a recipe's adapter", epilog=_fields_help(), formatter_class=raw)
    )
    _add_preview(commands.add_parser("preview", help="print rendered examples, trained tokens coloured"))
    _add_plan(commands.add_parser("plan", help="predict a run's memory, tokens and hours"))
    data.add_parser(commands.add_parser("data", help="examine a recipe's rows and write the data report"), _RECIPE_HELP)
    sweep.add_parser(commands.add_parser("sweep", help="train every combination of fields' values"), _RECIPE_HELP)
    merge.add_parser(commands.add_parser("merge", help="merge an adapter into its base and certify the result"))
    check = commands.add_parser("check", help="verify an adapter directory, file by file")
    check.add_argument("directory", type=Path)
    check.add_argument("--base", type=Path, help="also compare with this base model directory")
    check.add_argument("--merged", type=Path, help="also that this is its merged model, with a certificate that passed")
    check.add_argument("--digest", action="store_true", help="print the adapter's digest alone")
    check.set_defaults(run=_check)
    base = commands.add_parser("base", help="print the local directory of a base model, fetched if need be")
    base.add_argument("recipe", help="a recipe, or an adapter directory")
    base.set_defaults(run=_base)
    return parser


def _fields_help() -> str:
    lines = ["any field of the recipe can be given as --section.key value:"]
    for section, info in TrainConfig.model_fields.items():
        fields = info.annotation.model_fields  # type: ignore[union-attr]
        lines += [f"  --{section}.{key}: {allowed(field)}" for key, field in fields.items()]
    return "\n".join(lines)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", default="smollm2-starter", help=_RECIPE_HELP)
    parser.add_argument("--out", type=Path, help="run directory (default runs/<run.name>)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on with an unfinished run of the same inputs, if any")
    start.add_argument("--fresh", action="store_true", help="discard an unfinished run")
    parser.add_argument(
        "--if-changed", action="store_true", help="do nothing where the same inputs were trained already"
    )
    parser.set_defaults(run=_train)


def _add_preview(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", default="smollm2-starter", help=_RECIPE_HELP)
    parser.add_argument("-n", type=int, default=3, help="examples to print (default %(default)s)")
    parser.set_defaults(run=_preview)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", default="smollm2-starter", help=_RECIPE_HELP)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="to plan for (auto: as here)")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--probe", type=int, default=0, metavar="STEPS", help="make this many steps and correct the plan")
    rate.add_argument("--tokens-per-s", type=float, metavar="RATE", help="a rate known from elsewhere")
    parser.set_defaults(run=_plan)


def _train(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = load_recipe(arguments.recipe, overrides)
    out = arguments.out or _RUNS / config.run.name
    if arguments.if_changed and _is_trained(config, out):
        print(f"{out / 'adapter'} is up to date")
        return 0
    from training.shard import read_sharding
    from training.stop import EXIT_STOPPED, TrainingStopped
    from training.train import Start, train

    start = Start.RESUME if arguments.resume else Start.FRESH if arguments.fresh else Start.NEW
    try:
        manifest = train(config, out, cache_dir(), start, sharding=read_sharding(_take_fsdp_settings()))
    except TrainingStopped as stop:
        print(stop, file=sys.stderr)
        return EXIT_STOPPED
    print(f"adapter {manifest.name}@{manifest.digest[:12]} in {out / 'adapter'}; loss plot: {out / 'loss.png'}")
    return 0


def _take_fsdp_settings() -> dict[str, str]:
    """Takes them out of the environment: accelerate would shard the model itself, on a GPU alone and another way."""
    names = [name for name in os.environ if name == "ACCELERATE_USE_FSDP" or name.startswith("FSDP_")]
    return {name: os.environ.pop(name) for name in names}


def _is_trained(config: TrainConfig, out: Path) -> bool:
    """Whether `out/adapter` is whole and was made from this recipe, data and base."""
    from training.base import resolve_base
    from training.data import load_dataset
    from training.split import dataset_sha256

    try:
        manifest = verify_adapter(out / "adapter")
    except ArtifactError:
        return False
    if manifest.recipe != config.model_dump(mode="json") or not (out / "held_out.jsonl").is_file():
        return False
    base = resolve_base(config.model, cache_dir())
    return manifest.data.sha256 == dataset_sha256(
        load_dataset(config.data).conversations
    ) and manifest.base.fingerprint == fingerprint_base(base.directory)


def _preview(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from training.preview import preview

    preview(load_recipe(arguments.recipe, overrides), arguments.n, sys.stdout)
    return 0


def _plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    import torch

    from training.plan import make_plan, table

    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = here if arguments.device == "auto" else arguments.device
    if arguments.probe < 0 or (arguments.probe and device != here):
        raise ConfigError(
            f"--probe {arguments.probe} --device {device}: a probe makes 1 or more steps, on the {here} here"
        )
    if arguments.tokens_per_s is not None and not 0 < arguments.tokens_per_s < math.inf:
        raise ConfigError(f"--tokens-per-s {arguments.tokens_per_s}: give a number above 0")
    config = load_recipe(arguments.recipe, overrides)
    print(table(make_plan(config, cache_dir(), device, arguments.probe, arguments.tokens_per_s), config))
    return 0


def _check(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    manifest = verify_adapter(arguments.directory)
    if arguments.digest:
        print(manifest.digest)
        return 0
    print(f"{manifest.name}@{manifest.digest[:12]}: {len(manifest.files)} files match their hashes")
    print(f"base {manifest.base.model} {manifest.base.fingerprint[:12]}, template {manifest.chat.template_sha256[:12]}")
    if arguments.base and (found := fingerprint_base(arguments.base)) != manifest.base.fingerprint:
        print(f"{arguments.base}: fingerprint {found[:12]}: not the base it was trained on", file=sys.stderr)
        return 1
    if arguments.merged and not merge.is_merged(manifest.digest, arguments.merged):
        print(f"{arguments.merged}: no certified merge of this adapter", file=sys.stderr)
        return 1
    return 0


def _base(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    from training.base import resolve_base

    if (Path(arguments.recipe) / MANIFEST_NAME).is_file():
        print(merge.base_of(read_manifest(Path(arguments.recipe)).recipe))
    else:
        print(resolve_base(load_recipe(arguments.recipe).model, cache_dir()).directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
