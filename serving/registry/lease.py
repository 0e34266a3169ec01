"""The lease: one request's hold on the revision that answers it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from serving.registry.catalog import ServedModel
from serving.registry.residency import Residency
from serving.registry.uses import Uses


class Lease:
    """Lasts from `Registry.lease`, which counts the use, to `release`.

    `arm` is the label that chose the revision, None for the base, a merged model or an exact revision; `shadow` the
    revision that gets the request too, as a model name. `enter` has the engine hold a model, as Registry.enter does.
    """

    def __init__(
        self,
        model: ServedModel,
        arm: str | None,
        shadow: str | None,
        *,
        enter: Callable[[ServedModel], Awaitable[None]],
        residency: Residency,
        uses: Uses,
    ) -> None:
        self.model, self.arm, self.shadow = model, arm, shadow
        self._enter, self._residency, self._uses = enter, residency, uses
        self._entered = self._released = False

    async def ready(self) -> None:
        """Returns once the engine holds the weights; raises RevisionUnavailable where it cannot load them."""
        if self._entered or self._released or not self.model.is_adapter:
            return
        await self._enter(self.model)
        self._entered = True
        if self._released:  # while it loaded
            self._residency.leave(self.model.variant)

    def release(self) -> None:
        if self._released:
            return
        self._released = True
        if self.model.is_adapter:
            if self._entered:
                self._residency.leave(self.model.variant)
            self._uses.end((self.model.name, self.model.variant.digest))
