"""Folders of weights on the Hugging Face hub, through its client, which is imported on use."""

from pathlib import Path
from types import ModuleType
from typing import Optional

from ..errors import InputError, describe
from .runs import expanded

CARD, CONFIG = "README.md", "config.json"  # of every repository
# The weights of one, or of a folder that `Pipeline.save_pretrained` wrote.
GENERATOR_FILE, TOKENIZER_FILE = "generator.safetensors", "tokenizer.safetensors"
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


def client() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as e:
        raise InputError(
            "the hub needs huggingface_hub: install it (pip install huggingface_hub), or pass a "
            "local folder"
        ) from e
    return huggingface_hub


def local_or_downloaded(name: str | Path, revision: Optional[str], files: tuple[str, ...]) -> Path:
    """A local path, or a folder with these files of the repository `name` (org/name), which `download`
    fetches. Raises InputError for a revision of a local path."""
    path = expanded(name)
    if not path.exists() and path.suffix not in SUFFIXES and str(name).count("/") == 1:
        return download(str(name), revision, files)
    if revision is not None:
        raise InputError(f"revision={revision} is for the hub, but {name} is a local path")
    return path


def download(name: str, revision: Optional[str], files: tuple[str, ...]) -> Path:
    """A folder with these files of a repository, all from one commit; the folder is named after it.

    `revision` is a commit, tag or branch; None: the newest commit of the main branch. Cached files are not
    fetched again, and are used without a network. Raises InputError if the hub does not answer or lacks
    the repository, revision or file.
    """
    hub = client()
    try:
        folder = Path(
            hub.snapshot_download(name, revision=revision, allow_patterns=[*files, CONFIG])
        )
    except Exception as e:  # of the network's library, too
        at = "" if revision is None else f" at revision {revision}"
        raise InputError(
            f"cannot download {name}{at} ({describe(e)}): check the name, the revision, the network "
            f"and, for a private repository, `hf auth login`"
        ) from e
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise InputError(f"{name} on the hub has no {' and no '.join(missing)}")
    return folder


def upload(
    folder: Path, name: str, branch: Optional[str], private: Optional[bool], message: str
) -> str:
    """Add the files of a folder to a repository, created if needed, as one commit; returns its hash.

    Keeps a README.md of the repository. Raises InputError if the hub does not answer or refuses.
    """
    hub = client()
    try:
        hub.create_repo(name, private=private, exist_ok=True)
        if branch is not None:
            hub.create_branch(name, branch=branch, exist_ok=True)
        kept = [CARD] if hub.file_exists(name, CARD, revision=branch) else None
        commit = hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=branch,
            commit_message=message,
            ignore_patterns=kept,
        )
    except Exception as e:  # of the network's library, too
        raise InputError(
            f"cannot upload to {name} ({describe(e)}): check the name, the network and `hf auth login`"
        ) from e
    return commit.oid
