"""Folders of weights: their model card and config.json, and their way to and from the Hugging Face hub.

The hub's client is imported on use.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Optional

from ..errors import InputError, describe
from .metadata import GENERATOR, TOKENIZER, About
from .runs import expanded

CARD, CONFIG = "README.md", "config.json"  # of every repository
# The weights of one, or of a folder that `Pipeline.save_pretrained` wrote.
GENERATOR_FILE, TOKENIZER_FILE = "generator.safetensors", "tokenizer.safetensors"
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
SHOWN = 10  # names of classes
CARD_TEXT = """---
library_name: alitok
pipeline_tag: unconditional-image-generation
license: unknown
tags:
- image-generation
- image-tokenizer
- autoregressive
---

# {name}

An AliTok image tokenizer ([arXiv 2506.05289](https://arxiv.org/abs/2506.05289)) and a generator of its codes.

```python
from alitok import Pipeline

pipeline = Pipeline.from_pretrained("{name}")
# guidance_scale=… and guidance_scale_pow=… make the images clearer; by default, guidance is off
pipeline([0], seed=0, output="pil")[0].save("image.png")
```

| | |
| --- | --- |
| images | {image_size}×{image_size} pixels |
| codes per image | {num_latent_tokens} of {codebook_size} |
| tokenizer | {stage}{encoder_layers} encoder and {decoder_layers} decoder layers |
| generator | {num_hidden_layers} layers of width {hidden_size} |
| classes | {classes} |
| fingerprint of the tokenizer's codes | `{generator.tokenizer}` |

Licence: none is stated yet. State it here, and at `license` above.
"""


def model_card(name: str, generator: About, tokenizer: About) -> str:
    """The README.md of both models, called `name`."""
    sizes = tokenizer.config | generator.config  # of the same codes
    classes = str(sizes["condition_num_classes"])
    if generator.classes is not None:
        known = [json.dumps(each, ensure_ascii=False) for each in generator.classes[:SHOWN]]
        more = ["…"] if len(generator.classes) > SHOWN else []
        classes += f": {', '.join(known + more)}".replace("|", "\\|")
    stage = "" if tokenizer.stage is None else f"stage {tokenizer.stage}, "
    return CARD_TEXT.format(name=name, stage=stage, classes=classes, generator=generator, **sizes)


def config_json(generator: About, tokenizer: About) -> str:
    """The metadata of both files as config.json; the hub counts downloads by requests for it."""
    content = {"model_type": "alitok", GENERATOR: generator.entry(), TOKENIZER: tokenizer.entry()}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


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
    """A local path, or a folder with these files of the repository `name` (org/name), all from one commit,
    after which the folder is named.

    `revision` is a commit, tag or branch; None: the newest commit of the main branch. Cached files are not
    fetched again, and are used without a network. Raises InputError for a revision of a local path, and if
    the hub does not answer or lacks the repository, revision or file.
    """
    path = expanded(name)
    if path.exists() or path.suffix in SUFFIXES or str(name).count("/") != 1:
        if revision is not None:
            raise InputError(f"revision={revision} is for the hub, but {name} is a local path")
        return path
    hub, wanted = client(), [*files, CONFIG]
    try:
        folder = Path(hub.snapshot_download(str(name), revision=revision, allow_patterns=wanted))
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
        commit = hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=branch,
            commit_message=message,
            ignore_patterns=[CARD] if hub.file_exists(name, CARD, revision=branch) else None,
        )
    except Exception as e:  # of the network's library, too
        raise InputError(
            f"cannot upload to {name} ({describe(e)}): check the name, the network and `hf auth login`"
        ) from e
    return commit.oid
