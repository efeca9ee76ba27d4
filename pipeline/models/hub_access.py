"""Access to the hub: its settings in the environment, as huggingface_hub reads them, and each of
its failures as an error that names the next step.

Every command reads the settings at its start: what is slow to load is imported where it is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import MsgspecError

from pipeline.core import network
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.network import is_url

AGAIN = "run the same command again: it asks the hub anew"
COPY_AGAIN = "copy the token again; `hf auth login` writes the file anew"
REFUSALS = {
    403: ("refuses access", "a fine-grained token needs the right to read this repository"),
    429: ("limits the rate of requests", "wait some minutes; with HF_TOKEN the limit is higher"),
}


class Changed(PipelineError):
    """The hub contradicts its earlier answer: it has to be asked again."""


def is_offline() -> bool:
    """Whether the environment forbids the network, as huggingface_hub reads it."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.strip().upper() in ("1", "ON", "YES", "TRUE")


def check_environment() -> None:
    """Raise UsageError for what huggingface_hub would stumble over when it is imported."""
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        value = os.environ.get(name, "10")
        if not re.fullmatch(r"[0-9]{1,6}", value.strip()) or not int(value):
            raise UsageError(f"{name}={value}: must be a number of seconds", "or leave it unset")
    if not os.environ.get("HF_TOKEN", "").strip().isascii():
        raise UsageError("HF_TOKEN: contains letters that no token has", "copy it again")
    if not os.environ.get("HF_ENDPOINT", " ").strip():
        os.environ.pop("HF_ENDPOINT", None)  # empty means unset; not so for the library
    if not is_url(endpoint()):
        raise UsageError(
            "HF_ENDPOINT: is not the address of a hub", "https://HOST, or leave it unset"
        )


def has_token() -> bool:
    """Whether requests carry a token."""
    from huggingface_hub import get_token

    return bool(get_token())


def _token_place() -> str:
    """Where the token in use comes from: a variable, or the file of `hf auth login`."""
    from huggingface_hub import constants

    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    return next((name for name in names if os.environ.get(name)), constants.HF_TOKEN_PATH)


def endpoint() -> str:
    """The hub's address as it may be shown: without a password."""
    text = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or "https://huggingface.co"
    return re.sub(r"//[^/@]*@", "//", text)


@contextmanager
def errors_explained(repo: str, revision: str = "", name: str = "") -> Iterator[None]:
    """Turn the client's exceptions into errors that name the next step. Raises PipelineError."""
    network.check()
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise PipelineError(
            f"{repo}: its owner requires you to accept terms first",
            f"accept them on the model's page ({endpoint()}/{repo}) and set HF_TOKEN to a token "
            "that may read it",
        ) from None
    except errors.RevisionNotFoundError:
        if name:  # it was there when the files were chosen
            raise Changed(f"{repo}: its commit {revision} is gone", AGAIN) from None
        raise UsageError(
            f"{repo}: has no revision {revision!r}",
            f"a branch, a tag or a commit: see {endpoint()}/{repo}/tree/main",
        ) from None
    except errors.RepositoryNotFoundError:
        token = "the token in use may not see it" if has_token() else "set HF_TOKEN"
        raise PipelineError(
            f"{repo}: there is no such repository, or it is private",
            f"check the name; for a private one {token}{network.through(endpoint())}",
        ) from None
    except errors.EntryNotFoundError:
        raise Changed(f"{repo}: {name} is gone from the repository", AGAIN) from None
    except errors.OfflineModeIsEnabled:
        raise PipelineError(
            f"{repo}: HF_HUB_OFFLINE forbids asking the hub", "run once with the network"
        ) from None
    except errors.HFValidationError as error:
        raise UsageError(f"{repo}: not a valid repository name: {error}") from None
    except PipelineError:
        raise
    except Exception as error:  # the client's own, its HTTP library's, the system's
        refused = _refused(repo, error)
        refused.hint += network.through(endpoint()) + network.trust(error)
        raise refused from None


def _refused(repo: str, error: Exception) -> PipelineError:
    """The error for an answer that has no exception of its own, or for no answer."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    if status == 401 and has_token():
        return PipelineError(
            f"{repo}: the hub rejects the token in use (status 401)",
            "HF_TOKEN, or what `hf auth login` stored, is mistyped or expired; make a new one at "
            f"{endpoint()}/settings/tokens",
        )
    if status in REFUSALS:
        what, hint = REFUSALS[status]
        return PipelineError(f"{repo}: the hub {what} (status {status})", hint)
    if isinstance(error, UnicodeError):  # the token's: nothing else is read or sent as text
        return PipelineError(f"{_token_place()}: holds letters that no token has", COPY_AGAIN)
    if isinstance(error, (KeyError, TypeError, ValueError, AttributeError, RecursionError)):
        why = str(error) if isinstance(error, MsgspecError) else type(error).__name__
        return PipelineError(
            f"{repo}: {endpoint()} does not answer as a hub does ({why})",
            "check HF_ENDPOINT, and whether a proxy or a login page answers in the hub's place",
        )
    if isinstance(error, OSError) and error.filename:  # a token or a cache that cannot be read
        return PipelineError(
            f"{error.filename}: {error.strerror}", "HF_HOME and HF_TOKEN_PATH say where it is"
        )
    what = f"it answered {status}" if status else type(error).__name__
    is_system = not status and isinstance(error, (OSError, ImportError))
    if is_system or what in ("ConnectError", "ProxyError"):
        what = f"{what}: {error}"  # the system's words, without any address
    return PipelineError(
        f"{repo}: the hub could not be reached: {what}",
        f"check the network and {endpoint()}, then run the same command again",
    )
