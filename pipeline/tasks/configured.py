"""The servers that a file or a profile asks for: read, their models prepared, ready to start."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.bins import gpus, install
from pipeline.bins.programs import program_file
from pipeline.core import notes
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.locks import only_one
from pipeline.core.paths import absolute
from pipeline.core.publish import full_disk_is_an_error, publish_same
from pipeline.serve import flags
from pipeline.serve.flags import Flag
from pipeline.serve.fleet import state
from pipeline.serve.fleet.state import Folder
from pipeline.serve.instance import LLAMA_CPP, Instance

from . import many
from .steps import Steps
from .variables import SERVER, request

if TYPE_CHECKING:
    from pipeline.serve.config.configuration import Configuration, Draft
    from pipeline.serve.config.llama import Model

# Where an image keeps llama.cpp's programs.
IN_IMAGES = (
    Path("/soft/app/llama-cpp/bin"),
    Path("/hard/volume/workspace/llama-cpp/build/bin"),
)

# Options of the server with a variable of their own: said here, they win over a profile.
OPTIONS = (
    *("host", "port", "threads", "gpu_layers", "parallel", "batch_size", "ctx_size"),
    *("device", "alias", "api_key_file"),
)

THE_GATEWAYS = ("host", "port", "api_key_file")  # options of it, too


class Configured:
    """What one file asks for. A file that cannot be read is an error once something is wanted of
    it, not before."""

    def __init__(self, steps: Steps, given: Mapping[str, str]) -> None:
        self.steps = steps
        self.wish = steps.request.many
        self.at: Folder = state.folder(steps.home, self.wish.source)
        self.given = given
        self._error: PipelineError | None = None
        self.wrong: list[str] = []  # of the model tables
        self.models: dict[str, Steps] = {}
        try:
            self._configuration = self._read()
            self.models = self._models()
        except PipelineError as error:
            self._error = error

    @property
    def configuration(self) -> Configuration:
        """What was read. Raises PipelineError."""
        if self._error:
            raise self._error
        return self._configuration

    def _read(self) -> Configuration:
        wish = self.wish
        if wish.config:
            from pipeline.serve.config.toml_form import load

            variable = many.OVERRIDES.get(wish.engine or LLAMA_CPP, "")
            return load(
                Path(wish.config),
                engine=wish.engine if wish.engine in many.CONFIGS else "",
                overrides=os.environ.get(variable, ""),
                where=variable,
                patient=True,
            )
        from pipeline.serve.config.profiles import load_profile

        file = absolute(many.registry(os.environ))
        own = {n: v for n, v in self.given.items() if n in OPTIONS}
        own |= {n.removeprefix(SERVER): v for n, v in self.given.items() if n.startswith(SERVER)}
        return load_profile(file, wish.profile, os.environ, given=own, patient=True)

    def _models(self) -> dict[str, Steps]:
        """The steps of each model that is prepared first, by the name of the first instance that
        asks for it."""
        mine = {variable.name for variable in many.TABLE}
        common = {name: value for name, value in self.given.items() if name not in mine}
        found: dict[str, Steps] = {}
        self._maker: dict[str, str] = {}
        known: dict[tuple[tuple[str, str], ...], str] = {}
        for name, told in self._configuration.prepares().items():
            key = tuple(sorted(told.items()))
            if key not in known:
                try:
                    found[name] = Steps(request({**common, **told}), self.steps.programs)
                except UsageError as error:
                    self.wrong.append(
                        f"{self._configuration.label}: instance.{name}.model: {error}"
                    )
                    continue
                known[key] = name
            self._maker[name] = known[key]
        return found

    # The program

    @property
    def needs_programs(self) -> bool:
        """Whether llama.cpp's programs are to be made: nothing else has a llama-server."""
        if self._error or self.own:
            return False
        return any(draft.engine == LLAMA_CPP for draft in self._configuration.enabled)

    @cached_property
    def own(self) -> Path | None:
        """The llama-server that the file names, that of an installed package, or, where none is
        in `bins/`, that on PATH."""
        from pipeline.serve.config.instances import program

        name, programs = program_file("llama-server"), self.steps.programs
        if named := program(self.configuration, None):
            return named
        if programs.are_external:
            return programs.binaries.program("llama-server")
        package = install.default_target(self.steps.home) / "bin"
        for folder in (*IN_IMAGES, package):
            if (folder / name).is_file():
                return folder / name
        found = None if programs.binaries.has("llama-server") else shutil.which(name)
        return Path(found) if found else None

    @property
    def server(self) -> Path:
        """The llama-server that will run, whether or not it is made yet."""
        return self.own or self.steps.programs.binaries.folder / program_file("llama-server")

    def flags(self) -> Mapping[str, Flag] | None:
        """Its options; None where it is not there yet. Raises PipelineError."""
        if not self.server.exists() or (self.own is None and not self.steps.bins_are_done()):
            return None
        home = self.steps.home
        sha256 = notes.identity(home.run / "programs.json", self.server)
        return flags.read(self.server, sha256, home.run / "flags")

    # The instances

    def place_files(self) -> None:
        """Have the prepared files in the folders that a profile wants them in. Raises
        PipelineError."""
        for draft in self.configuration.enabled:
            if draft.download_to and draft.model:
                file = self.models[self._maker[draft.name]].require_chain().final
                with full_disk_is_an_error(draft.download_to), only_one(draft.download_to):
                    if not (draft.download_to / file.name).exists():
                        publish_same(file, draft.download_to / file.name)

    def check(
        self,
        note: Callable[[str], None] = lambda _: None,
        *,
        strict: bool = True,
    ) -> None:
        """Raise UsageError that names all mistakes that can be seen now. `strict`: cards must be
        here, as far as their driver tells."""
        from pipeline.serve.config import checks

        wrong = [*self.configuration.mistakes, *self.wrong]
        wrong += self.for_one_server(besides=THE_GATEWAYS)
        configuration = replace(self.configuration, mistakes=tuple(wrong))
        cards = len(gpus.find()) if strict else 0
        checks.check(
            configuration,
            server=self.server,
            flags=self.flags(),
            environ=os.environ,
            cards=cards or None,
            note=note,
        )

    def for_one_server(self, besides: Sequence[str] = ()) -> list[str]:
        """What is wrong with options that are given beside a file of many servers."""
        names = [name for name in self.given if name in OPTIONS or name.startswith(SERVER)]
        return [
            f"{name}=: is for one server; write it into the file"
            for name in names
            if self.wish.config and name not in besides
        ]

    def instances(self) -> tuple[Instance, ...]:
        """What will be started. Raises PipelineError where a model is not known yet."""
        from pipeline.serve.config import instances

        home = self.steps.home
        found = instances.instances(
            self.configuration,
            server=self.server,
            flags=self.flags(),
            models={d.name: self._model(d) for d in self.configuration.enabled if d.model},
            logs=home.logs,
            keys=self.keys,
            xdg=home.run / "xdg",
            environ=os.environ,
        )
        if self.wish.background is None:
            return found
        return tuple(replace(one, background=self.wish.background) for one in found)

    @property
    def keys(self) -> Path:
        """Where keys are kept that were made, or stood in the file."""
        return self.steps.home.run / "keys"

    def _model(self, draft: Draft) -> Model:
        from pipeline.serve.config.llama import Model

        from . import estimating, serving

        steps = self.models[self._maker[draft.name]]
        chain = steps.require_chain()
        placed = draft.download_to and draft.download_to / chain.final.name
        ahead = estimating.outlook(steps, chain)
        return Model(
            path=placed if placed and placed.exists() else chain.final,
            mmproj=serving.projector(steps),
            name=chain.resolved.name,
            pooling=ahead.header.pooling if ahead.header else "none",
            ctx_size=ahead.trained,
        )


def require(steps: Steps) -> Configured:
    """The configuration. Raises UsageError where none is named."""
    if steps.configured is None:
        raise UsageError("no servers are named", "say which: config=… or profile=…")
    return steps.configured
