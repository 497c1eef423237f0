"""An export as a repository of a hub, with the login that huggingface_hub has (its own, or HF_TOKEN)."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ministral_jax.certify.certificate import FILE, Certificate
from ministral_jax.certify.checks import file_digests
from ministral_jax.console import say
from ministral_jax.doctor.examine import examine
from ministral_jax.errors import UserError
from ministral_jax.files import refuse_pointer
from ministral_jax.interop.hub import first_line
from ministral_jax.places import fetched


def push(args: argparse.Namespace) -> None:
    """The command, with the arguments that `commands` declares.

    Raises:
        UserError: no export, a Git LFS pointer in the place of a file, a certificate that does not hold or is of other
            files, none where `doctor` finds something red, a repository's name that is none, no huggingface_hub, no
            login, or what the hub says.
    """
    directory = fetched(args.directory)
    if args.repository.count("/") != 1 or not all(args.repository.split("/")):
        raise UserError(f"REPO {args.repository!r} is not OWNER/NAME")
    files = _files(directory)
    certified = _certified(directory)
    for file in files:
        print(f"{file.stat().st_size / 1e6:12,.3f} MB  {file.relative_to(directory)}")
    say(certified)
    if args.dry_run:
        return say(f"nothing was sent to {args.repository}; leave --dry-run out")
    where = _send(directory, args.repository, args.private, [str(file.relative_to(directory)) for file in files])
    say(f"{args.repository}: {where}")


def _files(directory: Path) -> list[Path]:
    """What is sent: all but what begins with a dot."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    found = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(directory).parts)]
    if not any(path.suffix in (".safetensors", ".gguf") for path in found):
        raise UserError(f"{directory} is no export: it has no weights")
    for path in found:
        refuse_pointer(path)
    return found


def _certified(directory: Path) -> str:
    """What its certificate says. Raises `UserError`: it does not hold or is damaged, other files lie there now, or
    there is none and `doctor` finds something red."""
    path = directory / FILE
    if not path.is_file():
        looked_at = examine(directory) if any(directory.glob("*.safetensors")) else []
        if red := next((finding for finding in looked_at if finding.level == "red"), None):
            raise UserError(f"{directory}: {red.subject}: {red.said}; ministral-jax doctor says more")
        return "not certified: `ministral-jax certify` has not been run on it"
    try:
        found = Certificate.model_validate_json(path.read_bytes())
    except ValidationError:
        raise UserError(f"{path} is no certificate of this program; run ministral-jax certify again") from None
    if not found.holds:
        raise UserError(
            f"{path} says that the export is not {found.against}; certify it against the stage that it was made from, "
            "or export it again"
        )
    now = file_digests(directory)
    if changed := sorted(name for name in found.files.keys() | now.keys() if found.files.get(name) != now.get(name)):
        raise UserError(f"{directory}: {changed[0]} is not as it was certified; run ministral-jax certify again")
    return f"certified against {found.against}"


def _send(directory: Path, repository: str, private: bool, names: list[str]) -> str:
    """Returns where it can be seen."""
    if find_spec("huggingface_hub") is None:
        raise UserError("push needs huggingface_hub, which is not installed; in the checkout, pip install -e '.[hub]'")
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError("push needs a login of the hub: run `hf auth login`, or set HF_TOKEN")
    api: Any = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        sent = dict(folder_path=directory, repo_id=repository, allow_patterns=names, commit_message="Export")
        return str(api.upload_folder(**sent))
    except Exception as error:  # of the several libraries that it talks to the hub with
        raise UserError(f"push to {repository}: {first_line(error)}") from None
