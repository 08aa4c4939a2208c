"""Plans what `intersafe serve` starts: one vLLM server for each local URL that the cast names for a model of `serve`.

Ports come from the cast, so a run calls the servers where they listen. Planning is pure: `check_can_start` checks this
machine, and `supervisor.py` runs the servers.
"""

import errno
import importlib.util
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from intersafe.engines.arguments import engine_arguments, flags_of, python_names
from intersafe.engines.weights import folder_problem, weights_of
from intersafe.errors import InputError
from intersafe.recipe.engine import Engine
from intersafe.recipe.sections import Model, Painter, Recipe
from intersafe.recipe.specs import OPENAI_URL, SERVED
from intersafe.wording import nearest

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
VLLM_MODULE = "vllm.entrypoints.openai.api_server"
KEY_VARIABLE = "VLLM_API_KEY"
"""The environment variable with the key that a vLLM server requires; every user of the machine could read a flag."""
FIXED_ARGUMENTS = ("model", "port", "served_model_name", "api_key")
"""Arguments that the cast decides; a recipe may not set them in `args`."""


class Server(msgspec.Struct, frozen=True):
    """A server to start: its address, the model that it serves, and its command."""

    name: str
    """The model's name in the cast."""
    url: str
    host: str
    """The address that it listens on."""
    port: int
    argv: tuple[str, ...]
    weights: str
    """Folder or Hub name."""
    env: dict[str, str]
    """Variables that its environment has in addition to this process's; no secret."""
    key: str
    """Name of the variable with the key that it requires; empty: none."""
    gpus: str
    """Its GPUs, in the format of CUDA_VISIBLE_DEVICES; empty: those of this process."""
    startup: float
    """Most seconds until it answers."""

    @property
    def log(self) -> str:
        """The name of its log file."""
        safe = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in self.name)
        return f"{safe[-100:].lstrip('.-') or 'model'}-{self.port}.log"

    @property
    def shown(self) -> str:
        """The command for a shell, with its environment; a key is shown as its variable."""
        env = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*env, *([f'{KEY_VARIABLE}="${self.key}"'] if self.key else []), shlex.join(self.argv)])

    def shares_gpus(self, other: "Server") -> bool:
        """True if both may load onto one GPU: they name a common one, or one of them names none."""
        return not (self.gpus and other.gpus) or bool(set(self.gpus.split(",")) & set(other.gpus.split(",")))


def servers_of(recipe: Recipe, only: Sequence[str] = (), *, is_here: bool = True) -> list[Server]:
    """The servers of a recipe, in the order of `serve` and of the cast's URLs.

    `only` selects names of `serve`. With `is_here` false the servers start on another machine, so vLLM need not be
    installed here. `InputError` if there is nothing to serve, or if a server cannot be what the recipe asks for.
    """
    for name in only:
        if name not in recipe.serve:
            what = f"no model {name!r} in `serve`" + nearest(name, list(recipe.serve))
            raise InputError(what, at="--only", remedy="correct the name, or add it to the recipe")
    names = [name for name in recipe.serve if not only or name in only]
    servers = [server for name in names for server in _servers_of_model(recipe, name, is_here)]
    if not servers:
        whose = ", ".join(names) or "`serve`"
        remedy = "name a local URL in the cast, as vllm:NAME@http://localhost:8000/v1"
        if not recipe.serve:
            raise InputError("nothing to serve: no `serve` section in the recipe", remedy="docs/engines.md shows one")
        raise InputError(f"nothing to serve: no local URL for {whose} in the cast", remedy=remedy)
    _check_ports_differ(servers)
    return servers


def unserved_urls(recipe: Recipe) -> list[str]:
    """A line for the user for each URL of the cast that is not served here, except OpenAI's own."""
    lines = []
    for name, url in {(model.spec.model, url): None for model in _models(recipe) for url in model.spec.urls}:
        if url == OPENAI_URL:
            continue
        if not is_local(url):
            lines.append(f"{url} ({name}) is on another machine: not started")
        elif name not in recipe.serve:
            lines.append(f"{url} ({name}) has no entry in `serve`: not started")
    return lines


def is_local(url: str) -> bool:
    """True if the URL names this machine."""
    return urlsplit(url).hostname in LOCAL_HOSTS


def _models(recipe: Recipe) -> list[Model]:
    return [model for model in recipe.cast.models.values() if model.spec.backend in SERVED]


# --- one model -------------------------------------------------------------------------------------------------------


def _servers_of_model(recipe: Recipe, name: str, is_here: bool) -> Iterator[Server]:
    """A server for each local port that the cast names for the model."""
    models = [model for model in _models(recipe) if model.spec.model == name]
    urls = list(dict.fromkeys(url for model in models for url in model.spec.urls))
    if not any(is_local(url) for url in urls):
        return
    engine, ports = recipe.engine(name), set[int]()
    key, revision = _one_of(models, "key", name), _one_of(models, "revision", name)
    draws = any(isinstance(model, Painter) for model in models)
    for argument in python_names(engine.args).keys() & set(FIXED_ARGUMENTS):
        remedy = "drop it: the cast sets it" + (", and `key` names the key's variable" if argument == "api_key" else "")
        raise InputError(f"serve.{name}: {argument!r} in `args`", remedy=remedy)
    for number, url in enumerate(urls):
        if not is_local(url):
            continue
        host, port = _address(url, name)
        if port in ports:  # localhost and 127.0.0.1 are the same address
            continue
        ports.add(port)
        gpus = engine.gpus[number] if engine.gpus else ""
        env = engine.env | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})
        weights = weights_of(name, engine)
        argv = _painter_command if draws else _chat_command
        yield Server(
            name=name,
            url=url,
            host=host,
            port=port,
            argv=tuple(argv(name, engine, weights, revision, ("--host", host, "--port", str(port)), is_here)),
            weights=weights,
            env=env,
            key=key,
            gpus=gpus,
            startup=engine.startup,
        )


def _one_of(models: list[Model], field: str, name: str) -> str:
    """The value of a field that all members of a server share; `InputError` if they differ."""
    values = list(dict.fromkeys(getattr(model, field) for model in models))
    if len(values) > 1:
        said = " and ".join(repr(value) for value in values)
        remedy = f"give all members of the same {field}, or serve them at two URLs under two names"
        raise InputError(
            f"serve.{name}: its members have the {field} {said}, and one server has only one", remedy=remedy
        )
    return str(values[0])


def _address(url: str, name: str) -> tuple[str, int]:
    """The address and port to listen on; `InputError` for a URL at which vLLM would not answer."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.path != "/v1":
        right = f"http://{parts.netloc}/v1"
        raise InputError(f"serve.{name}: vLLM does not answer at {url}", remedy=f"write {right} in the cast")
    host = str(parts.hostname)
    return "127.0.0.1" if host == "localhost" else host, parts.port or 80


def _check_ports_differ(servers: list[Server]) -> None:
    names: dict[int, str] = {}
    for server in servers:
        if (other := names.setdefault(server.port, server.name)) != server.name:
            what = f"{other} and {server.name} both have port {server.port}"
            raise InputError(what, remedy="give one of them another port in the cast's URL")


# --- the command -----------------------------------------------------------------------------------------------------


def _chat_command(
    name: str, engine: Engine, weights: str, revision: str, where: Sequence[str], is_here: bool
) -> list[str]:
    beginning = _beginning(name, engine, is_here)
    arguments = engine_arguments(engine, revision)
    if engine.data_parallel > 1:
        arguments.setdefault("data_parallel_size", engine.data_parallel)
    model = ["--model", weights] if _is_module(beginning) else [weights]
    return [*beginning, *model, *where, "--served-model-name", name, *flags_of(arguments)]


def _painter_command(
    name: str, engine: Engine, weights: str, revision: str, where: Sequence[str], is_here: bool
) -> list[str]:
    """vLLM-Omni extends the `vllm` command, but not the module `vllm.entrypoints`."""
    beginning = shlex.split(_own_command(name, engine)) or _on_path() or ([] if is_here else ["vllm", "serve"])
    if not beginning or _is_module(beginning):
        what = f"serve.{name}: a painter needs the `vllm` command of vLLM-Omni"
        remedy = f"pip install vllm-omni, or name it by `serve.{name}.command`: /opt/omni/bin/vllm serve"
        raise InputError(what, remedy=remedy)
    args = {argument: value for argument, value in python_names(engine.args).items() if value is not None}
    return [*beginning, weights, "--omni", *where, "--served-model-name", name, *flags_of(args)]


def _own_command(name: str, engine: Engine) -> str:
    """The recipe's `command`; `InputError` if `shlex.split` cannot split it."""
    try:
        shlex.split(engine.command)
    except ValueError as error:
        raise InputError(f"serve.{name}.command: {error}", remedy="correct the quotes") from None
    return engine.command


def _beginning(name: str, engine: Engine, is_here: bool) -> list[str]:
    """The command up to the model: the recipe's own, the vLLM of this Python, or the `vllm` on the path."""
    if own := shlex.split(_own_command(name, engine)):
        return own
    if importlib.util.find_spec("vllm") is not None:
        return [sys.executable, "-m", VLLM_MODULE]
    if found := _on_path():
        return found
    if not is_here:
        return ["vllm", "serve"]
    remedy = f"pip install 'intersafe[vllm]', or name it by `serve.{name}.command`: /opt/vllm/bin/vllm serve"
    raise InputError(f"serve.{name}: no vLLM here", remedy=remedy)


def _on_path() -> list[str]:
    """`vllm serve` from the folder of this Python or from the path; empty if there is none."""
    folders = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    found = shutil.which("vllm", path=folders)
    return [found, "serve"] if found else []


def _is_module(beginning: Sequence[str]) -> bool:
    return beginning[-1].endswith("api_server")


# --- this machine ----------------------------------------------------------------------------------------------------


def check_can_start(servers: Sequence[Server]) -> None:
    """`InputError` for missing weights, keys or commands and for used ports, before anything is started."""
    for server in servers:
        _check_weights(server)
        _check_key(server)
        if shutil.which(server.argv[0]) is None:
            remedy = f"correct `serve.{server.name}.command`"
            raise InputError(f"no command {server.argv[0]!r} here", remedy=remedy)
        _check_port(server)


def _check_weights(server: Server) -> None:
    if Path(server.weights).is_file():  # GGUF: a server takes a single file too
        return
    if problem := folder_problem(server.weights):
        remedy = f"correct `serve.{server.name}.path`"
        raise InputError(f"the weights of {server.name}: {server.weights}: {problem}", remedy=remedy)


def _check_key(server: Server) -> None:
    if server.key and not os.environ.get(server.key, "").strip():
        what = f"{server.name}: the environment variable {server.key} is not set"
        raise InputError(
            what, remedy=f"export {server.key}=..., or drop `key`: the server requires the key that the cast sends"
        )


def _check_port(server: Server) -> None:
    """Binds the port without SO_REUSEPORT, with which two vLLM servers can share a port unnoticed."""
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((server.host, server.port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                what = f"port {server.port} for {server.name} cannot be opened ({error.strerror})"
                raise InputError(what, remedy="write another port in the cast's URL") from None
            what = f"port {server.port} for {server.name} is in use"
            remedy = f"stop what uses it (lsof -i :{server.port}), or write another port in the cast's URL"
            raise InputError(what, remedy=remedy) from None
