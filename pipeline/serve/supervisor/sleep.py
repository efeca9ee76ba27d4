"""vLLM's sleep mode: a server that is unloaded and keeps its process.

Asleep it has given back what it held of its cards, and keeps its weights in main memory; to wake it
takes seconds where a new start takes minutes. vLLM has the calls only where it was started with
`--enable-sleep-mode` and VLLM_SERVER_DEV_MODE=1; where it has none it answers 404. Each call goes
out in a thread: copying the weights takes its time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from pipeline.serve import health
from pipeline.serve.server import Server

from . import client

if TYPE_CHECKING:
    from .child import Child

Act = Callable[[Server, float], None]  # with a limit in seconds


class SleepCall:
    """A call under way to the server in `child`, which has `timeout` seconds to answer. Once it has
    ended `is_over` is set, with the reason in `error` if it failed, and the child's `news`."""

    def __init__(self, act: Act, server: Server, child: Child, timeout: float) -> None:
        self.child, self.error, self.is_over = child, "internal error", False
        self.name = act.__name__.replace("_", " ")
        Thread(target=self._run, args=(act, server, timeout), daemon=True).start()

    def _run(self, act: Act, server: Server, timeout: float) -> None:
        try:
            act(server, timeout)
            self.error = ""
        except OSError as error:
            self.error = str(error)
        finally:
            self.is_over = True
            self.child.news.set()


def fall_asleep(server: Server, timeout: float) -> None:
    """Have an idle server sleep. Raises OSError where it does not."""
    with client.awake(server):
        _post(server, "/sleep?level=1", {}, timeout)
        if not client.is_asleep(server):
            raise OSError("/sleep has no effect")


def wake_up(server: Server, timeout: float) -> None:
    """Wake it, and have it answer a request. Raises OSError where it does not."""
    _post(server, "/wake_up", {}, timeout)
    path, body = client.smallest_request(server)
    _post(server, path, body or {}, server.probe_timeout or timeout, refused=True)


def weights(server: Server) -> int | None:
    """The bytes of its weights, where `--model` is a folder; None: not known."""
    folder = Path(server.folder, server.argument("--model"))
    with suppress(OSError):
        return sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None
    return None


def _post(
    server: Server,
    path: str,
    body: Mapping[str, object],
    timeout: float,
    *,
    refused: bool = False,
) -> None:
    """`refused`: that it does not take this request, as a model without completions, is no error.
    Raises OSError."""
    try:
        status, text = health.ask(server, path, body, timeout=timeout)
    except TimeoutError:
        raise OSError(f"{path}: no answer within {timeout:g} s") from None
    except OSError as error:
        raise OSError(f"{path}: {error}") from None
    if status >= 500 or (status != 200 and not refused):
        raise OSError(f"{path}: status {status}: {text[:200]}".strip())
