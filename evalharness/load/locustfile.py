"""The locust users: `locust -f evalharness/load/locustfile.py --host URL --arm base --arm starter`."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import gevent  # type: ignore[import-untyped]
from locust import User, events  # before httpx: importing locust makes sockets cooperative

from evalharness.config import api_key
from evalharness.errors import EvalError
from evalharness.load.prompts import load_prompts
from evalharness.load.run import LoadRun
from evalharness.load.sample import SAMPLES_NAME, SampleStatus
from evalharness.load.stream import PATH, StreamWatch, ask, chat_body, open_client

FAILURE_PAUSE_S = 0.5  # a server that refuses at once must not be hammered, nor fill the disk with samples
INTERRUPT_DRAIN_S = 2.0
TIMINGS = {"TTFT": "ttft_s", "TPOT": "tpot_s"}  # further rows in locust's own report


def ask_once(user: ChatUser) -> None:
    """Sends one request, at its arrival in an open loop, and keeps its sample whatever happens."""
    run = user.run_state
    arm, chat = run.choose()
    due = run.claim()
    if not run.wait_for(due, arm):
        return
    watch = StreamWatch()
    try:
        ask(user.client, chat_body(arm, chat, user.max_tokens), watch)
    finally:  # also where locust kills the user in mid-stream
        sample = run.record(watch, arm, due)
        report(user.environment, f"{run.scenario}: {arm}", sample.model_dump(), watch)
    if watch.status is not SampleStatus.OK and due is None:
        time.sleep(FAILURE_PAUSE_S)


def report(environment: Any, name: str, sample: dict[str, Any], watch: StreamWatch) -> None:
    """Tells locust, for its progress and its own report; it rounds, so our numbers come from the sample file."""
    fire = environment.events.request.fire
    exception = None if watch.status is SampleStatus.OK else RuntimeError(f"{watch.status}: {watch.error or ''}")
    e2e_s = sample["e2e_s"] or 0.0  # locust cannot say "none"; it counts such a request as a failure
    fire(request_type="POST", name=name, response_time=e2e_s * 1000, response_length=0, exception=exception, context={})
    for request_type, key in TIMINGS.items():
        if sample[key] is not None:
            timing_ms = sample[key] * 1000
            fire(request_type=request_type, name=name, response_time=timing_ms, response_length=0, context={})


class ChatUser(User):  # type: ignore[misc]  # locust has no types here
    """Asks one request after the other over one persistent connection."""

    tasks = (ask_once,)

    def on_start(self) -> None:
        self.run_state: LoadRun = self.environment.load_run
        self.max_tokens: int = self.environment.parsed_options.max_tokens
        host = (self.host or self.environment.host or "").rstrip("/").removesuffix(PATH).removesuffix("/v1")
        self.client = open_client(host, self.run_state.tls, self.run_state.api_key)

    def on_stop(self) -> None:
        self.client.close()


def add_arguments(parser: Any) -> None:
    group = parser.add_argument_group("Graft load test")
    group.add_argument(
        "--arm", action="append", required=True, help="model name; each request picks one of those given"
    )
    group.add_argument("--scenario", default="load", help="name written into each sample")
    group.add_argument("--samples", default=SAMPLES_NAME, help="file that the raw samples are appended to")
    group.add_argument("--prompts", default=None, help="one prompt a line, or .jsonl with messages")
    group.add_argument("--max-tokens", type=int, default=64, help="most tokens of a reply")
    group.add_argument("--rate", type=float, default=None, help="open loop: arrivals a second; closed without it")
    group.add_argument("--api-key-env", default=None, help="environment variable that holds the server's key")


def open_run(environment: Any, **_: Any) -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request would cost time
    options = environment.parsed_options
    try:
        chats = load_prompts(None if options.prompts is None else Path(options.prompts))
        key = api_key(options.api_key_env)
    except EvalError as error:
        raise SystemExit(str(error)) from error  # locust only logs other exceptions, and goes on
    samples = Path(options.samples)
    environment.load_run = LoadRun(options.scenario, options.arm, chats, samples, rate=options.rate, api_key=key)
    # The event loop's clock stood still while modules loaded: --run-time would end early by as much.
    gevent.get_hub().loop.update_now()


def begin_run(environment: Any, **_: Any) -> None:
    environment.load_run.begin()


def stop_run(environment: Any, **_: Any) -> None:
    environment.load_run.stop()


def hurry(environment: Any, **_: Any) -> None:
    """An interrupted test does not wait for long replies; they become samples that were cut off."""
    environment.stop_timeout = INTERRUPT_DRAIN_S


def close_run(environment: Any, **_: Any) -> None:
    environment.load_run.close()


events.init_command_line_parser.add_listener(add_arguments)
events.init.add_listener(open_run)
events.test_start.add_listener(begin_run)
events.test_stopping.add_listener(stop_run)
events.test_stop.add_listener(close_run)
events.quitting.add_listener(hurry)
