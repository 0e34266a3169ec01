"""The caller: who sends a request, which models it may use, and within which limits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from serving.errors import Forbidden

ANY_MODEL = "*"


@dataclass(frozen=True, slots=True)
class Limits:
    """None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt and completion together
    max_concurrent: int | None = None  # requests


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of one key. A name in `models` stands for all revisions and labels of it, "*" for every model."""

    name: str
    models: frozenset[str] = frozenset((ANY_MODEL,))
    is_admin: bool = False
    reads_metrics: bool = False
    limits: Limits = Limits()

    def allows(self, model_name: str) -> bool:
        """Says whether the key may use a model, given its name alone or with a revision or label."""
        return ANY_MODEL in self.models or re.split("[@:]", model_name, maxsplit=1)[0] in self.models

    def check_model(self, model_name: str) -> None:
        """Raises Forbidden where the key may not use the model."""
        if not self.allows(model_name):
            own = ", ".join(sorted(self.models)) or "none"
            raise Forbidden(
                f"key {self.name!r} may not use model {model_name[:200]!r}, only {own}; choose one of these, or have "
                "the model added to the key's entry",
                param="model",
            )


# Who asks where no keys are configured: inference and metrics are open, administration is not.
ANONYMOUS = Caller("anonymous", reads_metrics=True)


def check_admin(caller: Caller) -> None:
    """Raises Forbidden where the caller may not administer models."""
    if caller is ANONYMOUS:
        raise Forbidden(
            "administration needs an admin key, and this server has no keys; create one with `python -m serving.keys "
            "new NAME --admin --keys FILE` and start the server with --keys FILE",
            code="admin_key_required",
        )
    if not caller.is_admin:
        raise Forbidden(
            f'key {caller.name!r} is no admin key; send one whose entry says kind = "admin"', code="admin_key_required"
        )


def check_metrics(caller: Caller) -> None:
    """Raises Forbidden where the caller may not read /metrics, which names every model."""
    if not (caller.is_admin or caller.reads_metrics):
        raise Forbidden(
            f"key {caller.name!r} may not read /metrics; send an admin key, or one whose entry says metrics = true",
            code="metrics_not_allowed",
        )
