"""The plan of a load test: what is asked for, within bounds, as scenarios."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from evalharness.arms import arm_labels
from evalharness.client import is_loopback, normalise_url
from evalharness.errors import EvalError
from evalharness.load.prompts import load_prompts

MAX_USERS = 1000
MAX_SECONDS = 3600
MAX_RATE = 1000
MIXED = "mixed"
ALL_ARMS = "all"  # the row over every arm of the mixed scenario


class LoadRefused(EvalError):
    """A load test that must not, or cannot, start; the message names the flag."""


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    arms: tuple[str, ...]

    @property
    def file_stem(self) -> str:
        """Of locust's own files; a model's name may have slashes."""
        return f"locust_{quote(self.name, safe='@')}"


@dataclass(frozen=True, slots=True)
class LoadPlan:
    url: str  # without /v1
    arms: tuple[str, ...]
    mixed: bool
    users: int  # open loop: the most requests in flight
    spawn_rate: float  # users a second
    seconds: int  # of each scenario
    out: Path
    prompts: Path | None
    max_tokens: int
    rate: float | None  # open loop: arrivals a second; None is a closed loop
    max_error_share: float
    api_key_env: str | None  # the variable's name; its value is read where it is sent

    @property
    def scenarios(self) -> tuple[Scenario, ...]:
        alone = tuple(Scenario(arm, (arm,)) for arm in self.arms)
        return (*alone, Scenario(MIXED, self.arms)) if self.mixed else alone

    def name(self, arm: str) -> str:
        """Returns what a reader calls an arm, or a scenario."""
        labels = arm_labels(self.arms)
        return labels[arm].name if arm in labels else arm


def plan_from(args: argparse.Namespace) -> LoadPlan:
    """Raises EvalError naming the flag that is out of bounds, or does not go with another."""
    _check_arms(args.arm, args.mixed)
    _check_bounds(args)
    if (args.arrival == "open") != (args.rate is not None):
        raise LoadRefused(
            f"--rate {args.rate} with --arrival {args.arrival}: an open loop needs a rate, a closed has none"
        )
    load_prompts(args.prompts)
    return LoadPlan(
        url=_checked_url(args.url, args.allow_remote),
        arms=tuple(args.arm),
        mixed=args.mixed,
        users=args.users,
        spawn_rate=args.users if args.spawn_rate is None else args.spawn_rate,
        seconds=args.seconds,
        out=args.out,
        prompts=args.prompts,
        max_tokens=args.max_tokens,
        rate=args.rate,
        max_error_share=args.max_error_share,
        api_key_env=args.api_key_env,
    )


def _check_arms(arms: list[str], mixed: bool) -> None:
    taken = {MIXED, ALL_ARMS} if mixed else set()
    for arm, label in arm_labels(arms).items():
        if not arm or label.name in taken:
            raise LoadRefused(
                f"--arm {arm!r}: is empty, or names the mixed scenario; serve the model under another name"
            )
        if arms.count(arm) > 1:
            raise LoadRefused(f"--arm {arm}: given {arms.count(arm)} times; each arm is loaded once")
    if mixed and len(arms) < 2:
        raise LoadRefused(f"--mixed with {len(arms)} arm: mixing needs two; add a second --arm")


def _check_bounds(args: argparse.Namespace) -> None:
    for flag, value, low, high in (
        ("--users", args.users, 1, MAX_USERS),
        ("--seconds", args.seconds, 1, MAX_SECONDS),
        ("--max-tokens", args.max_tokens, 1, math.inf),
        ("--rate", args.rate, 0.01, MAX_RATE),
        ("--spawn-rate", args.spawn_rate, 0.01, MAX_USERS),
        ("--max-error-share", args.max_error_share, 0, 1),
    ):
        if value is not None and not low <= value <= high:
            raise LoadRefused(f"{flag} {value:g}: must lie between {low:g} and {high:g}")


def _checked_url(url: str, allow_remote: bool) -> str:
    try:
        root, host, _ = normalise_url(url), urlsplit(url).hostname or "", urlsplit(url).port
    except ValueError as error:
        raise LoadRefused(f"--url {url}: {error}") from error
    if not allow_remote and not is_loopback(host):
        raise LoadRefused(f"--url {url}: {host} is not this machine; add --allow-remote if you may load it")
    return root
