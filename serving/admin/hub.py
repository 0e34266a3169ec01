"""The hub download: fetches an adapter's files by their id on a model hub, never a pickle and never code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from serving.errors import BadRequest, HubUnreachable

ALLOWED = ("*.safetensors", "*.json", "*.jinja", "*.txt")
_REMEDY = "download it where there is a network, copy it to the server and register it by `path`"


def download(hub_id: str, revision: str | None, directory: Path, endpoint: str | None = None) -> None:
    """Fetches into `directory`; blocks. `endpoint` None is the hub that the hub's own client is set up for.

    Raises BadRequest for an id or revision that does not exist, needs other rights or names files outside of it, and
    HubUnreachable without a network.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.errors import HTTPError as ClientError  # type: ignore[attr-defined]  # of whichever it uses

    notes = directory / ".cache"  # the client's own
    try:
        huggingface_hub.snapshot_download(
            hub_id,
            revision=revision,
            local_dir=directory,
            cache_dir=notes,  # or it would leave some in its home
            allow_patterns=list(ALLOWED),
            endpoint=endpoint,
            tqdm_class=_quiet_bar(),
        )
    except ValueError as error:  # an id that is none, or a file's name that leads out of the directory
        raise BadRequest(f"hub_id: {_first_line(error)}", param="hub_id") from error
    except HfHubHTTPError as error:
        raise _http_error(hub_id, revision, error) from error
    except (ClientError, OSError) as error:  # what the client raises for a lost network, for none and for no disk
        raise HubUnreachable(
            f"{hub_id} cannot be downloaded: {_first_line(error)}; {_REMEDY}", param="hub_id"
        ) from error
    shutil.rmtree(notes, ignore_errors=True)


def _http_error(hub_id: str, revision: str | None, error: Any) -> BadRequest | HubUnreachable:
    status = error.response.status_code if error.response is not None else 0
    if status in {401, 403, 404}:
        what = hub_id if revision is None else f"{hub_id} at {revision}"
        return BadRequest(
            f"hub_id: the hub answered {status} for {what}; check the id and hub_revision, and for a private one give "
            "the server's environment a token",
            param="hub_id",
            code="hub_not_found",
        )
    return HubUnreachable(f"the hub answered {status} for {hub_id}; try again later, or {_REMEDY}", param="hub_id")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _quiet_bar() -> Any:
    """The client's progress bars would spoil a log of JSON lines."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Quiet(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return Quiet
