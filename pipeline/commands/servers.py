"""The servers that a file or a profile asks for: read, their models prepared, ready to start."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from pipeline.bins.binaries import program_file
from pipeline.bins.hardware import nvidia
from pipeline.core import capacity
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.variables import variables
from pipeline.models import gguf
from pipeline.serve import logfile, sandbox
from pipeline.serve.config.named import CONFIGS, OVERRIDES, unknown_overrides
from pipeline.serve.flags import Flag
from pipeline.serve.server import LLAMA_CPP, VLLM, Server
from pipeline.serve.supervisor import state
from pipeline.serve.supervisor.state import Folder

from . import estimate, install_model, serve, which_server
from .model import Model
from .programs import Programs
from .request import request
from .variables import SERVER, FileVariables

if TYPE_CHECKING:
    from pipeline.serve.config.configuration import Configuration, InstanceSpec
    from pipeline.serve.config.llama import PreparedModel
    from pipeline.serve.config.options import ResolvedOptions
    from pipeline.serve.config.vllm_installed import VllmOptions

# Options of the server with a variable of their own: said here, they win over a profile.
OPTIONS = (
    *("host", "port", "threads", "gpu_layers", "parallel", "batch_size", "ctx_size"),
    *("device", "alias", "api_key_file"),
)
THE_GATEWAYS = ("host", "port", "api_key_file")  # options of it, too
OF_A_FILE = ("quant", "revision", "filename", "pattern", "mmproj")  # these, too
OF_A_MODEL = (*OF_A_FILE, "imatrix", "keep_f16")


class Servers:
    """What one file asks for. A file that cannot be read is an error once something is wanted of
    it, not before. `variables` are those of the command line, as typed."""

    def __init__(self, programs: Programs, variables: Mapping[str, str]) -> None:
        self.programs = programs
        self.request = programs.request
        self.requested = programs.request.servers
        self.home = programs.home
        self.variables = variables
        self.at: Folder = state.folder(self.home, self.requested.source)
        self.models: dict[str, Model] = {}
        self._maker: dict[str, str] = {}  # of each instance with a model: whose model it shares
        self._errors: list[str] = []  # of the model tables
        self._error: PipelineError | None = None
        try:
            self._configuration = self._read()
            self._find_models()
        except PipelineError as error:
            self._error = error
        # There may be keys in it: no server inherits them.
        set_ones = [name for name in OVERRIDES.values() if os.environ.pop(name, "").strip()]
        self.is_overridden = ", ".join(set_ones)

    @property
    def configuration(self) -> Configuration:
        """What was read. Raises PipelineError."""
        if self._error:
            raise self._error
        return self._configuration

    @property
    def keys(self) -> Path:
        """Where keys are kept that were made, or stood in the file."""
        return self.at.path / "keys"

    def _read(self) -> Configuration:
        requested = self.requested
        if requested.config:
            from pipeline.serve.config.toml_form import load

            engine = requested.engine if requested.engine in CONFIGS else ""
            variable = OVERRIDES[engine or LLAMA_CPP]
            over = os.environ.get(variable, "")
            file = Path(requested.config)
            return load(file, engine=engine, overrides=over, where=variable, patient=True)
        from pipeline.serve.config.profiles import load_profile

        own = {
            name: value
            for name, value in self.variables.items()
            if name in (*OPTIONS, *OF_A_FILE) or name.startswith(SERVER)
        }
        if self.request.settings.device is None:
            own.pop("device", None)  # it names a backend
        return load_profile(
            Path(requested.registry), requested.profile, os.environ, given=own, patient=True
        )

    def _find_models(self) -> None:
        """Each model that is prepared first, by the name of the first instance that
        asks for it."""
        mine = {*(each.name for each in variables(FileVariables).values()), *OPTIONS}
        if self.requested.profile:
            mine |= {*OF_A_FILE}  # they are among the model's own by now
        common = {
            name: value
            for name, value in self.variables.items()
            if name not in mine and not name.startswith(SERVER)
        }
        known: dict[tuple[tuple[str, str], ...], str] = {}
        for name, told in self._configuration.prepares().items():
            asked = {**common, **told}
            key = tuple(sorted(asked.items()))
            if key not in known:
                try:
                    self.models[name] = Model(request(asked), self.programs)
                except UsageError as error:
                    label = self._configuration.label
                    self._errors.append(f"{label}: instance.{name}.model: {error.message}")
                    continue
                known[key] = name
            self._maker[name] = known[key]

    # The program

    @cached_property
    def own(self) -> Path | None:
        """A llama-server that is not the one in `bins/`."""
        return which_server.elsewhere(self.configuration, self.programs)

    @property
    def needs_programs(self) -> bool:
        """Whether llama.cpp's programs are to be made: nothing else has a llama-server. Asked while
        doit reads the tasks: what is wrong with the one that is named, `check` tells."""
        try:
            if self._error or self.own:
                return False
        except UsageError:
            return False
        return any(draft.engine == LLAMA_CPP for draft in self._configuration.enabled)

    @property
    def server(self) -> Path:
        """The llama-server that will run, whether or not it is made yet."""
        return self.own or self.programs.binaries.folder / program_file("llama-server")

    def flags(self) -> Mapping[str, Flag] | None:
        """Its options; None where it is not there yet. Raises PipelineError."""
        if self.own is None and not self.programs.are_done():
            return None
        return which_server.options(self.server, self.home)

    # The instances

    @cached_property
    def installed_vllm(self) -> VllmOptions | None:
        """What an installed vLLM says of its options: slow, the first time."""
        from pipeline.serve.config import vllm, vllm_installed

        configuration = self.configuration
        if all(draft.engine != VLLM for draft in configuration.enabled):
            return None
        words = [vllm.executable(configuration, os.environ), *vllm.python(configuration)]
        cache = self.home.run / "flags"
        return vllm_installed.listed(words, configuration.master.api_server_module, cache)

    def check(self, note: Callable[[str], None] = lambda _: None) -> None:
        """Raise UsageError that names all mistakes that can be seen now."""
        from pipeline.serve.config import checks

        if self.requested.besides:
            other, here = self.requested.besides, self.configuration.label
            note(f"{other} names another file, and is not read; this is about {here}")
        wrong = [*self.wrong, *self.misplaced(THE_GATEWAYS), *unknown_overrides(os.environ)]
        try:
            flags = self.flags()
        except PipelineError as error:
            wrong.append(error.message)
            flags = None
        wrong += self._wrong_logs()
        cards = nvidia.count()
        checks.check(
            replace(self.configuration, mistakes=tuple(wrong)),
            server=self.server,
            flags=flags,
            environ=os.environ,
            cards=cards,
            installed=self.installed_vllm,
            note=note,
        )
        for draft in self.configuration.enabled if cards is None else ():
            if draft.control.gpu_ids not in (None, "all", "none"):
                note(f"{draft.at('control.gpu_ids')}: no driver of NVIDIA's is here to ask for it")

    def misplaced(self, besides: Sequence[str] = ()) -> list[str]:
        """What is wrong with variables of one server or model beside a file of many."""
        of_one = {*OPTIONS, *OF_A_MODEL} - {*besides}
        return [
            f"{name}=: is for one server; write it into the file"
            for name in self.variables
            if self.requested.config and (name in of_one or name.startswith(SERVER))
        ]

    def instances(self) -> tuple[Server, ...]:
        """What will be started. Raises PipelineError where a model is not known yet.

        A fitted context stays while nothing else of its server changes: free memory differs from
        run to run, and a server that runs is part of what is used.
        """
        desired = state.read_wanted(self.at)
        before = state.by_name(desired.instances) if desired else {}
        contexts = {
            name: int(context)
            for name, server in before.items()
            if (context := server.argument("--ctx-size")).isdecimal()
        }
        servers = self._servers(contexts)
        same = {server.name for server in servers if server == before.get(server.name)}
        if contexts.keys() - same:
            servers = self._servers({name: contexts[name] for name in contexts.keys() & same})
        for server in servers:
            sandbox.require(server, f"{server.name}: sandbox")
        return servers

    def _servers(self, contexts: Mapping[str, int]) -> tuple[Server, ...]:
        """The servers; `contexts` are to be kept by those that have no other, by name."""
        from pipeline.serve.config import instances

        home = self.home
        servers = instances.instances(
            self.configuration,
            server=self.server,
            flags=self.flags(),
            models={
                spec.name: self._model(spec, contexts.get(spec.name))
                for spec in self.configuration.enabled
                if spec.model
            },
            logs=home.logs,
            keys=self.keys,
            xdg=home.run / "xdg",
            environ=os.environ,
        )
        if self.requested.background is not None:
            servers = tuple(replace(s, background=self.requested.background) for s in servers)
        if "sandbox" in self.variables:
            mode = self.request.sandbox
            servers = tuple(
                replace(s, sandbox=mode) if s.engine == LLAMA_CPP else s for s in servers
            )
        return servers

    @cached_property
    def _room(self) -> int:
        """The memory in bytes that each model whose context is fitted may have beside its weights:
        the servers of a file share what all their weights leave."""
        fitted, weights = 0, 0
        for spec in self.configuration.enabled:
            if spec.model:
                model = self.model_of(spec)
                weights += estimate.outlook(model, model.require_chain()).bytes
                fitted += not self.names_context(spec.name)
        return (capacity.memory() - weights) // max(1, fitted)

    def warnings(self, servers: Sequence[Server]) -> list[str]:
        """What the metadata of the models of `servers` does not say."""
        prepared = {s.name: self.model_of(s) for s in self.configuration.enabled if s.model}
        lines = []
        for server in servers:
            path, header = serve.model_file(server), None
            if path:
                header = gguf.read_cached(path, self.home.run / "gguf.json")
            elif server.name in prepared:
                model = prepared[server.name]
                header = estimate.outlook(model, model.require_chain()).header
            lines += [f"{server.name}: {line}" for line in serve.model_warnings(header, server)]
        return lines

    def _wrong_logs(self) -> list[str]:
        logs, wrong = self.logs(), []
        for draft in self.configuration.enabled:
            if why := logfile.trouble(logs[draft.name]):
                key = "log_file" if draft.control.log_file else "log_dir"
                wrong.append(f"{draft.at(f'control.{key}')}: {why}")
        return wrong

    def logs(self) -> dict[str, Path]:
        """Where the output of each goes."""
        from pipeline.serve.config.instances import is_container, log_file

        in_container = is_container(os.environ)
        folder = Path(tempfile.gettempdir()) if in_container else self.home.logs
        enabled = self.configuration.enabled
        return {draft.name: log_file(self.configuration, draft, folder) for draft in enabled}

    def names_context(self, name: str) -> bool:
        """Whether the file names the context of this server."""
        specs = [spec for spec in self.configuration.enabled if spec.name == name]
        return any(self._options(spec).says("ctx-size") for spec in specs)

    def not_started(self, servers: Sequence[Server]) -> list[str]:
        """What the file asks for beside `servers`, and why it is left out."""
        configuration, started = self.configuration, {server.name for server in servers}
        reasons = []
        for spec in configuration.drafts:
            if spec.name in started:
                continue
            if not configuration.master.enable:
                reasons.append(f"{spec.name} (master.enable = false)")
            elif not spec.control.enabled:
                reasons.append(f"{spec.name} ({spec.at('control.enabled')} = false)")
            else:
                reasons.append(f"{spec.name} (not among name=)")
        return reasons

    def _options(self, spec: InstanceSpec) -> ResolvedOptions:
        from pipeline.serve.config import instances

        return instances.given(spec, self.flags())

    @property
    def wrong(self) -> tuple[str, ...]:
        """What is wrong with the file and its model tables, found while they were read."""
        return (*self.configuration.mistakes, *self._errors)

    def model_of(self, spec: InstanceSpec) -> Model:
        """Its model, which other servers may share."""
        return self.models[self._maker[spec.name]]

    def install_models(self) -> None:
        """Have the prepared files where a profile wants them. Raises PipelineError."""
        for spec in self.configuration.enabled:
            if spec.download_to is not None:
                install_model.install(self.model_of(spec), spec)

    def _model(self, spec: InstanceSpec, context: int | None) -> PreparedModel:
        """Its model, with this context where the file names none; None: one that fits."""
        model = self.model_of(spec).served_by(spec)
        chain = model.require_chain()
        ahead = estimate.outlook(model, chain)
        if context is None:
            context = serve.fit_context(model, ahead, self._room + ahead.bytes).ctx_size
        prepared = serve.prepared_model(model, chain, ahead, context)
        installed = install_model.installed(model, spec)
        return replace(
            prepared,
            path=installed.get(chain.final, chain.final),
            mmproj=installed.get(Path(prepared.mmproj), prepared.mmproj)
            if prepared.mmproj
            else None,
        )
