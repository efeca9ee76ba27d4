"""The options of the server on the command line, as a file of servers would hold them."""

from __future__ import annotations

from pipeline.core.variables import variables
from pipeline.serve.config.configuration import InstanceSpec, Value
from pipeline.serve.server import Control

from .request import Request
from .variables import SERVER, ServingVariables

# Options with a variable of their own.
NAMED = ("threads", "gpu_layers", "parallel", "batch_size", "ctx_size", "device", "alias")


def model_of(request: Request) -> dict[str, str]:
    """The model as a file's table would name it."""
    if request.reference is None:
        return {}
    draft = request.draft.reference.text if request.draft and request.draft.reference else ""
    beside = {"draft": draft or request.spec_type}
    beside["lora"] = ",".join(
        f"{each.reference.text}:{each.scale:g}" for each in request.adapters if each.reference
    )
    return {"model": request.reference.text} | {k: v for k, v in beside.items() if v}


def spec(request: Request, name: str = "serve", log: str | None = None) -> InstanceSpec:
    """The one server that `serve model=` asks for; `name` is its alias where none is given."""
    server: dict[str, Value] = {"host": request.host, "port": request.port}
    for variable in NAMED:
        value = getattr(request, variable)
        if value is not None:
            server[variable.replace("_", "-")] = value
    if request.api_key_file:
        server["api-key-file"] = request.api_key_file
    places = {f"server.{option}": f"{option.replace('-', '_')}=" for option in server}
    typed = []
    for variable, text in request.server.items():
        option = variable.replace("_", "-")
        server[option] = text
        places[f"server.{option}"] = f"{SERVER}{variable}="
        typed.append(option)
    return InstanceSpec(
        name=name,
        control=Control(
            log_file=log,
            **{key: getattr(request, key) for key in variables(ServingVariables)},
        ),
        server=server,
        model=model_of(request),
        typed=tuple(typed),
        place="serve",
        places=places,
    )
