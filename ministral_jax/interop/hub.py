"""Models by their names on the Hugging Face hub, read through huggingface_hub (extra `hub`) into its cache.

A name is hf://org/name, or mistralai/name where no directory `mistralai` is, and may end in @revision. What the cache
has is taken as it is and nobody is asked whether there is a newer one.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ministral_jax import yaml12
from ministral_jax.errors import UserError
from ministral_jax.files import MOST_JSON
from ministral_jax.lazy import Lazy
from ministral_jax.places import place

if TYPE_CHECKING:
    import huggingface_hub
    from huggingface_hub import errors
else:
    huggingface_hub, errors = Lazy("huggingface_hub"), Lazy("huggingface_hub.errors")

_NAME = re.compile(r"(?:hf:/{1,2}([\w.-]+/[\w.-]+)|(mistralai/[\w.-]+))(@[\w./-]+)?")
_SMALL = ("*.json", "*.jinja", "SYSTEM_PROMPT.txt")
"""Configurations, tokenizer, chat template and indices."""
_FORMATS = (("config.json", "model"), ("params.json", "consolidated"))
"""What describes a model, and how the names of its weights begin; of two formats the first is taken."""
PLACES = "gs://bucket/name, s3://bucket/name or hf://owner/name"
"""Where else than on a file system a model may lie."""
_READ_AHEAD = 2**18
"""Bytes of a file of weights that are asked for at once; most headers are shorter."""


def hub_name(text: str | Path, root: Path = Path()) -> str | None:
    """`org/name` or `org/name@revision` where `text` names a model on the hub, and no path below `root`."""
    if not isinstance(text, (str, Path)):  # in an object store
        return None
    if (match := _NAME.fullmatch(str(text))) is None or (match[2] and (root / "mistralai").exists()):
        return None
    return (match[1] or match[2]) + (match[3] or "")


def named(value: Any) -> Any:
    """A setting that is a path or a model's name; that as hf://org/name, wherever the recipe lies."""
    root = getattr(value, "root", None) or yaml12.root_of(value) or Path()
    name = hub_name(value, root) if isinstance(value, str) else None
    return value if name is None else f"hf://{name}"


def model_place(text: str) -> Path:
    """Type of a command's argument that is a directory or a model's name."""
    if (name := hub_name(text)) is not None:
        return Path(f"hf:/{name}")
    if text.startswith("hf:"):
        raise argparse.ArgumentTypeError(f"{text} names no model on the hub; give hf://owner/name, or with @revision")
    try:
        return place(text, "directory", PLACES)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def refuse_missing(path: Path) -> None:
    """Raises `UserError`: no directory is there."""
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; a model on the hub is hf://owner/name")


def located(path: Path) -> Path:
    """A directory as it is, and of a model on the hub the one where its files are or are downloaded to."""
    name = hub_name(path)
    return path if name is None else downloaded(name)


def cached(name: str) -> Path | None:
    """Where the files of a model lie, None if not all of them are on this machine. Nothing goes on the network."""
    if find_spec("huggingface_hub") is None:
        return None
    try:
        return _files(name, local_files_only=True)
    except (UserError, errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None


def downloaded(name: str) -> Path:
    """Where the files of a model lie: those that are read of one format, and no others. What was cut off goes on where
    it stopped.

    Raises:
        UserError: huggingface_hub is not installed; no such model or revision, or not for this user; a name that can be
            none; or the hub cannot be reached.
    """
    with _explained(name):
        return cached(name) or _files(name, local_files_only=False)


@contextmanager
def outline(path: Path) -> Iterator[Path]:
    """A directory in which a model's headers can be read: that which is named, or where the cache has the model. Of
    another one on the hub a passing one, of which the small files are downloaded and of the weights the headers alone:
    files of the true sizes that hold nothing else. Files that no format has are there by name.

    Raises:
        UserError: as `downloaded`.
    """
    if (name := hub_name(path)) is None:
        yield path
        return
    with TemporaryDirectory(prefix="ministral-jax-") as passing:
        with _explained(name):
            found = cached(name) or _outlined(name, Path(passing))
        yield found


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What the hub, or the way to it, says of a model as a `UserError`."""
    if find_spec("huggingface_hub") is None:
        raise UserError(
            f"{name} is on the hub, which needs huggingface_hub; in the checkout, pip install -e '.[hub]'; or give a "
            "directory"
        )
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{name}: its owners let only users in who agree to their terms, with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name}: the hub has no such revision") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name}: neither a directory here nor on the hub, or for others (`hf auth login`)") from None
    except errors.HFValidationError as error:
        raise UserError(f"{name} can be no name on the hub: {first_line(error)}") from None
    except errors.LocalEntryNotFoundError:
        repository, _, revision = name.partition("@")
        command = f"hf download {repository}{revision and f' --revision {revision}'}"
        wanted, instead = ((*_SMALL, f"{stem}*.safetensors") for _, stem in _FORMATS)
        raise UserError(
            f"{name} is not on this machine, or not all of it, and the hub cannot be reached; where it can, run "
            f"`{command} {' '.join(f'--include {pattern!r}' for pattern in wanted)}`, with {instead[-1]!r} as the last "
            "where the repository has only Mistral's own format; or give a directory"
        ) from None
    except UserError:
        raise
    except Exception as error:  # of the several libraries that it talks to the hub with
        raise UserError(
            f"{name} could not be downloaded: {first_line(error)}; run again, what is here is kept"
        ) from None


def first_line(error: Exception) -> str:
    """Of what an error says, at most 300 characters; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


def _files(name: str, local_files_only: bool) -> Path:
    return _with_weights(name, lambda patterns: _snapshot(name, patterns, local_files_only))


def _snapshot(name: str, patterns: Sequence[str], local_files_only: bool = False) -> Path:
    """Where files of a model lie whose names are of `patterns`, in a directory that is called as the commit."""
    repository, _, revision = name.partition("@")
    return Path(
        huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=[*patterns], local_files_only=local_files_only
        )
    )


def _with_weights(name: str, get: Callable[[Sequence[str]], Path]) -> Path:
    from ministral_jax.interop.shards import weight_files  # which every command would wait for

    directory = get(_SMALL)
    for config, stem in _FORMATS:
        if (directory / config).is_file():
            directory = get((*_SMALL, f"{stem}*.safetensors"))
            if weight_files(directory, stem):
                return directory
    raise UserError(f"{name}: the hub has no model.safetensors or consolidated.safetensors with a configuration of it")


def _outlined(name: str, directory: Path) -> Path:
    """`directory`, filled as `outline` has it."""
    small = _snapshot(name, _SMALL)
    hub: Any = huggingface_hub.HfFileSystem(skip_instance_cache=True)
    for entry in hub.ls(f"{name.partition('@')[0]}@{small.name}", detail=True):
        if entry["type"] != "file":
            continue
        file = PurePosixPath(entry["name"]).name
        here = directory / file
        if (small / file).is_file():
            here.symlink_to((small / file).resolve())
        elif file.endswith(".safetensors"):
            with hub.open(entry["name"], "rb", block_size=_READ_AHEAD) as there, here.open("wb") as head:
                length = there.read(8)
                head.write(length + there.read(min(int.from_bytes(length, "little"), MOST_JSON)))
                head.truncate(entry["size"])
        else:
            here.touch()
    return directory
