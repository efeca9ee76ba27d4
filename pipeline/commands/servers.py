"""The servers that a file or a profile asks for, as they are written down, and their models."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.bins.binaries import program_file
from pipeline.bins.package import install
from pipeline.core.errors import PipelineError, UsageError, doitw
from pipeline.core.paths import Home
from pipeline.core.store import stat_cache
from pipeline.core.variables import variables
from pipeline.models import on_disk
from pipeline.models.on_disk import OnDisk, StoredModel
from pipeline.serve import flags
from pipeline.serve.config import instances, profiles, toml_form
from pipeline.serve.config.configuration import InstanceSpec, allowed_name
from pipeline.serve.config.messages import shown
from pipeline.serve.config.named import CONFIGS, OVERRIDES
from pipeline.serve.flags import Flag
from pipeline.serve.server import DEMAND, LLAMA_CPP
from pipeline.serve.supervisor import state

from .model import Model
from .programs import Programs
from .request import request
from .variables import (
    MODEL_NAMES,
    SERVER,
    AddressVariables,
    FileVariables,
    ModelVariables,
    ServerVariables,
)

if TYPE_CHECKING:
    from pipeline.serve.config.configuration import Configuration
    from pipeline.serve.config.llama import PreparedModel
    from pipeline.serve.server import Server

# Options of the server with a variable of their own: said here, they win over a profile.
OPTIONS = (*variables(AddressVariables), *variables(ServerVariables))
GATEWAY_OPTIONS = ("host", "port", "api_key_file")  # of the gateway, too
OF_A_FILE = ("quant", "revision", "filename", "pattern", "mmproj", "draft", "lora")  # these, too
OF_A_MODEL = tuple(name for name in variables(ModelVariables) if name not in MODEL_NAMES)
FIRST_PORT = 9001  # of stored instances: after the gateway's usual one
PORT = re.compile(r"\d{1,5}", re.ASCII)
BESIDE = "+"  # between the name of an instance and that of what its model has beside it
# Where an image keeps llama.cpp's programs.
IN_IMAGES = (Path("/soft/app/llama-cpp/bin"), Path("/hard/volume/workspace/llama-cpp/build/bin"))


class Servers:
    """One file of servers. A file that cannot be read is an error once something is wanted of it,
    not before. `variables` are those of the command line, as typed."""

    def __init__(self, programs: Programs, variables: Mapping[str, str]) -> None:
        self.programs = programs
        self.request = programs.request
        self.requested = programs.request.servers
        self.home = programs.home
        self.variables = variables
        self.at = state.folder(self.home, self.requested.source)
        self.keys = self.at.path / "keys"  # those that were made, or stood in the file
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
        names = OVERRIDES.values()
        self.set_overrides = tuple(name for name in names if os.environ.pop(name, "").strip())

    @property
    def configuration(self) -> Configuration:
        """What was read. Raises PipelineError."""
        if self._error:
            raise self._error
        return self._configuration

    @property
    def words(self) -> dict[str, str]:
        """The variables that name the same servers in another run, whatever its environment."""
        requested = self.requested
        named = {"config": requested.config} if requested.config else {"profile": requested.profile}
        engine = {"engine": requested.engine} if requested.engine else {}
        return {**self.variables, **named, **engine}

    @property
    def overrides(self) -> str:
        """The variable that is merged over the file; empty for a profile."""
        engine = self.requested.engine if self.requested.engine in CONFIGS else LLAMA_CPP
        return OVERRIDES[engine] if self.requested.config else ""

    @property
    def unread_overrides(self) -> list[str]:
        """The variables that would override servers of this file, were it read as one of theirs."""
        if not self.requested.config:
            return []
        engines = {spec.engine for spec in self.configuration.specs}
        names = (name for engine, name in OVERRIDES.items() if engine in engines)
        return [name for name in names if name in self.set_overrides and name != self.overrides]

    def _read(self) -> Configuration:
        requested = self.requested
        if requested.config:
            file = Path(requested.config)
            if requested.variable and not file.exists():
                why = f"{requested.variable}={file}: there is no such file"
                raise UsageError(why, f"name one that is there, or unset {requested.variable}")
            return toml_form.load(
                file,
                engine=requested.engine if requested.engine in CONFIGS else "",
                overrides=os.environ.get(self.overrides, ""),
                where=self.overrides,
                stored=lambda written: stored_instances(self.home, self.at, written),
            )
        own = {
            name: value
            for name, value in self.variables.items()
            if name in (*OPTIONS, *OF_A_FILE) or name.startswith(SERVER)
        }
        if self.request.device is None:
            own.pop("device", None)  # it names a backend
        registry, profile = Path(requested.registry), requested.profile
        return profiles.load_profile(registry, profile, os.environ, variables=own)

    def _find_models(self) -> None:
        """Find each model that is to be prepared, by the name of the first instance with it."""
        not_its = {*(each.name for each in variables(FileVariables).values()), *OPTIONS}
        if self.requested.profile:
            not_its |= {*OF_A_FILE}  # they are among the model's own by now
        self._common = {
            name: value
            for name, value in self.variables.items()
            if name not in not_its and not name.startswith(SERVER)
        }
        known: dict[tuple[tuple[str, str], ...], str] = {}
        specs = {spec.name: spec for spec in self._configuration.enabled}
        for name, own in self._configuration.prepares().items():
            words = {**self._common, **own}
            key = tuple(sorted(words.items()))
            if key not in known:
                try:
                    self.models[name] = model = Model(request(words), self.programs)
                    self.models |= {name + BESIDE + key: m for key, m in model.beside.items()}
                    for each in (model, *model.beside.values()):
                        each.place = specs[name].at("model")
                except UsageError as error:
                    self._errors.append(_of_table(specs[name], error.message))
                    continue
                known[key] = name
            self._maker[name] = known[key]

    def model_of(self, spec: InstanceSpec) -> Model:
        """Its model, which other servers may share."""
        return self.models[self._maker[spec.name]]

    def model_named_by(self, spec: InstanceSpec) -> Model:
        """The model that an instance names, started or not. Raises UsageError."""
        if spec.name in self._maker:
            return self.model_of(spec)
        return Model(request({**self._common, **spec.model}), self.programs)

    # The program

    @cached_property
    def own(self) -> Path | None:
        """The llama-server that the file names, that of LLAMA_SERVER_BINS_DIR, that of an installed
        package, or, where none is in `bins/`, that on PATH. Raises UsageError."""
        programs, name = self.programs, program_file("llama-server")
        if named := instances.program(self.configuration, None):
            return named
        if programs.are_external:
            return programs.binaries.program("llama-server")
        for folder in (*IN_IMAGES, install.default_target(programs.home) / "bin"):
            if (folder / name).is_file():
                return folder / name
        on_path = None if programs.binaries.has("llama-server") else shutil.which(name)
        return Path(on_path) if on_path else None

    @property
    def needs_programs(self) -> bool:
        """Whether llama.cpp's programs are to be made: nothing else has a llama-server. Read while
        doit loads its tasks; `check` reports what is wrong with the program that is named."""
        try:
            if self._error or self.own:
                return False
        except UsageError:
            return False
        return any(spec.engine == LLAMA_CPP for spec in self._configuration.enabled)

    @property
    def server(self) -> Path:
        """The llama-server that will run, whether or not it is made yet."""
        return self.own or self.programs.binaries.folder / program_file("llama-server")

    def flags(self) -> Mapping[str, Flag] | None:
        """The options that its --help lists; None while it is not there. Raises PipelineError."""
        if self.own is None and not self.programs.are_done():
            return None
        server, run = self.server, self.home.run
        if not (server.is_file() and os.access(server, os.X_OK)):
            return None
        return flags.read(server, stat_cache.identity(run / "programs.json", server), run / "flags")

    def as_started(
        self, configuration: Configuration, models: Mapping[str, PreparedModel]
    ) -> tuple[Server, ...]:
        """The servers of `configuration`, this file's or made from it, ready to be started with
        these models. Raises PipelineError where one or llama-server is missing."""
        return instances.instances(
            configuration,
            server=self.server,
            flags=self.flags(),
            models=models,
            logs=self.home.logs,
            keys=self.keys,
            xdg=self.home.run / "xdg",
            environ=os.environ,
        )

    # What the file says

    @property
    def errors(self) -> tuple[str, ...]:
        """The errors of the file and its model tables, as far as they were seen in reading."""
        return (*self.configuration.errors, *self._errors)

    def misplaced(self, *, has_gateway: bool = False) -> list[str]:
        """The errors of variables for one server or model, given beside a file of many;
        `has_gateway`: the gateway may take them."""
        of_one = {*OPTIONS, *OF_A_MODEL} - ({*GATEWAY_OPTIONS} if has_gateway else set())
        return [
            f"{name}=: is for one server; write it into the file"
            for name in self.variables
            if self.requested.config and (name in of_one or name.startswith(SERVER))
        ]

    def require_placed(self) -> None:
        """Raise UsageError where a variable belongs into the file."""
        if errors := self.misplaced():
            raise UsageError("\n".join(errors))

    def names_context(self, name: str) -> bool:
        """Whether the file names the context of this server."""
        specs = [spec for spec in self.configuration.enabled if spec.name == name]
        return any(instances.resolve(spec, self.flags()).has("ctx-size") for spec in specs)

    def logs(self) -> dict[str, Path]:
        """The log of each server."""
        folder = instances.log_folder(self.home.logs, os.environ)
        enabled = self.configuration.enabled
        return {x.name: instances.log_file(self.configuration, x, folder) for x in enabled}


def stored_instances(home: Home, at: state.Folder, written: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of an instance for each model on disk, by name, as `instances = "models"` asks
    for: loaded on demand, on the port that it has now. Those that are `written` in the file are
    laid over them. Raises UsageError where there are none, and none can come."""
    stored = on_disk.look(home)
    models = {allowed_name(name): model for name, model in on_disk.by_name(stored).items()}
    if not models and not _can_pull(written):
        raise UsageError(
            'master.instances = "models": no model is on disk',
            f"prepare one first: {doitw('prepare model=…')}; or set pull = true in [gateway]",
        )
    wanted = state.read_wanted(at)
    running, taken = wanted.instances if wanted else (), {*_ports(written)}
    kept = {server.name: server.port for server in running if server.port not in taken}
    free = _free_ports({*kept.values(), *taken})
    others = _with_another_model(written)
    return {
        name: {
            "control": {"engine": LLAMA_CPP, "start": DEMAND},
            "model": _table(model, stored, home) if name not in others else {},
            "server": {"port": kept.get(name) or next(free)},
        }
        for name, model in models.items()
    }


def _table(model: StoredModel, stored: OnDisk, home: Home) -> dict[str, str]:
    """The model table of a stored model, with the projector that belongs to it."""
    projector = on_disk.projector_of(model, stored, home)
    mmproj = {"mmproj": str(projector)} if projector else {}
    return {"ref": str(model.files[0]), **mmproj}


def _with_another_model(written: Mapping[str, Any]) -> set[str]:
    """The instances for which the file names a model itself, whatever is stored by that name."""
    instances = written.get("instance")
    tables = instances.items() if isinstance(instances, dict) else ()
    models = {name: table.get("model") for name, table in tables if isinstance(table, dict)}
    return {name for name, model in models.items() if isinstance(model, dict) and "ref" in model}


def _of_table(spec: InstanceSpec, message: str) -> str:
    """An error of a variable, such as `quant=x: must be …`, with its place in the model table."""
    name, equals, rest = message.partition("=")
    if not equals or name not in variables(ModelVariables):
        return spec.line("model", f": {message}")
    if name == "model":
        return spec.line("model.ref", f" = {rest}")
    value, _, why = rest.partition(": ")
    written = "" if why.startswith(value) else f" = {shown(value)}"  # a path that `why` has
    return spec.line(f"model.{name}", f"{written}: {why}")


def _can_pull(written: Mapping[str, Any]) -> bool:
    """Whether clients of the file's gateway can have models prepared."""
    gateway = written.get("gateway")
    return isinstance(gateway, dict) and bool(gateway.get("enable") and gateway.get("pull"))


def _ports(table: Mapping[str, Any]) -> Iterator[int]:
    """All ports that a file names, as numbers or texts, or among extra_args."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _ports(value)
        elif key in ("port", "extra_args"):
            words = value if isinstance(value, list) else [value]
            yield from (int(word) for word in map(str, words) if PORT.fullmatch(word))


def _free_ports(taken: set[int]) -> Iterator[int]:
    for port in count(FIRST_PORT):
        if port in taken:
            continue
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):  # nobody answers
                yield port
