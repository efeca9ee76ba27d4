"""The models of instances that are prepared first, as pods will have them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from pipeline.core.errors import UsageError
from pipeline.deploy.kubernetes.workload import DATA, MODELS
from pipeline.models import gguf
from pipeline.serve.config.configuration import InstanceSpec
from pipeline.serve.config.llama import PreparedModel
from pipeline.serve.config.options import ResolvedOptions

from . import check, estimate, lock, resolve, serve
from .servers import Configured

# Options of llama-server that say what its model is for; else its metadata does.
ENDPOINTS = ("embeddings", "embedding", "reranking", "rerank", "pooling")
CONVERTER = 4 * 1024**3  # bytes of its environment and of llama.cpp's source


class PodModel:
    """The model of an instance that is prepared first, as a pod will have it."""

    def __init__(self, configured: Configured, draft: InstanceSpec) -> None:
        """Resolves it, where it is not known yet. Raises PipelineError."""
        steps = configured.steps_of(draft)
        check.check_request(steps)
        lock.require(steps, before=True)
        if not steps.resolve_is_done():
            resolve.resolve(steps, store=False)
        self.draft, self.steps, self.chain = draft, steps, steps.require_chain()
        self.ahead = estimate.outlook(steps, self.chain)
        says = any(name in draft.server for name in ENDPOINTS)
        if self.ahead.header is None and not says:
            raise UsageError(
                f"{draft.place}.model: what it is for stands in the model, which is not here yet",
                f"doit prepare {' '.join(f'{n}={v}' for n, v in draft.model.items())}",
            )
        if self.chain.resolved.local and (self.converts or self.chain.quantization):
            raise UsageError(
                f"{draft.at('model.ref')} = {draft.model['model']}: no pod has that folder or file",
                f"doit prepare here, then name what it made: server.model = {self.chain.final}",
            )

    @property
    def converts(self) -> bool:
        return self.chain.conversion is not None

    @property
    def weights(self) -> tuple[Path, ...]:
        """Files of the user's own, which are served in place."""
        return tuple(gguf.shards(self.chain.final)) if self.chain.resolved.local else ()

    @property
    def variables(self) -> dict[str, str]:
        """Of `prepare`, with the commit that was found: every pod has the same model."""
        source = self.chain.resolved.source
        if self.chain.resolved.local:
            return {}
        asked = self.steps.request.asked
        if source["type"] == "hf":
            asked |= {"model": f"hf:{asked['model']}", "revision": str(source["revision"])}
        return asked

    @property
    def model(self) -> PreparedModel:
        projector = serve.projector(self.steps)
        return PreparedModel(
            path=self._there(self.chain.final),
            mmproj=self._there(projector) if projector else None,
            name=self.chain.resolved.name,
            pooling=self.ahead.header.pooling if self.ahead.header else "none",
            ctx_size=self.ahead.trained,
        )

    def _there(self, file: Path) -> PurePosixPath:
        if self.chain.resolved.local:
            return PurePosixPath(MODELS, file.name)
        return PurePosixPath(DATA, file.relative_to(self.steps.home.root).as_posix())

    def memory(self, given: ResolvedOptions) -> int:
        """For weights and context, in bytes; 0: not known."""
        told = given.text("ctx-size")
        ctx_size = int(told) if told.isdecimal() and int(told) else self.ahead.trained
        needed = self.ahead.at(ctx_size) if ctx_size else None
        return needed.total if needed else self.ahead.bytes

    @property
    def disk(self) -> int:
        """For all that preparing leaves on the claim, in bytes."""
        fetched = self.chain.resolved.bytes
        if not self.converts:
            return fetched + (self.ahead.bytes if self.chain.quantization else 0)
        return 2 * fetched + self.ahead.bytes + CONVERTER
