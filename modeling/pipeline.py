"""Images from classes in three lines of Python."""

import tempfile
import threading
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from .devices import check_type, default_dtype, find_device
from .engine import Engine
from .errors import InputError
from .generator import GeneratorConfig, build_generator
from .image_decoder import ImageDecoder
from .pixels import to_pil
from .sampling import DRAWN, NO_CLASS, Sampling, image_uniforms
from .tokenizer import TokenizerConfig
from .weights import hub
from .weights.class_names import ClassNames, class_names, sorted_as_text
from .weights.files import whole_file
from .weights.metadata import GENERATOR, TOKENIZER, about_model
from .weights.opened import check_same_codes, config_of, load_tokenizer, open_weights
from .weights.runs import expanded
from .weights.tensors import fingerprint, load_tensors, write_state_dict


class Pipeline:
    """A generator and a tokenizer with their weights, ready to make images.

    `generator` and `tokenizer` are weights files, or run folders for their newest checkpoint (the average,
    if there is one). Sizes come from metadata or tensors; what neither shows of a tokenizer, its heads
    and whether its decoder is causal, comes from `tokenizer_config`, by default as published.

    `device` is by default CUDA if there is a GPU. `dtype`, of the generator's matrices, is by default
    bfloat16 on GPUs from Ampere on and float32 elsewhere. `compiled` takes a minute first, which pays off
    for many images in batches of one size. Raises InputError for files or a device that do not fit.
    """

    def __init__(
        self,
        generator: str | Path,
        tokenizer: str | Path,
        tokenizer_config: Optional[TokenizerConfig] = None,
        device: Optional[str] = None,
        dtype: Optional[torch.dtype] = None,
        compiled: bool = False,
    ):
        found = find_device(device)  # before any file is read
        check_type(dtype or torch.float32, found)
        self.asked_dtype, self.compiled = dtype, compiled
        opened = open_weights(generator, GENERATOR), open_weights(tokenizer, TOKENIZER)
        self.about = {weights.about.kind: weights.about for weights in opened}
        self.tokenizer = load_tokenizer(opened[1], config_of(opened[1], tokenizer_config))
        check_same_codes(*opened)
        tokens = self.tokenizer.config.num_tokens
        made = build_generator(opened[0].config(GeneratorConfig(image_seq_len=tokens)))
        self.generator = made.float()  # whatever torch's default type is
        load_tensors(self.generator.eval(), opened[0].state, str(opened[0].file))
        self.names = class_names(self.about[GENERATOR])
        self.revision: Optional[str] = None  # the commit, of a pipeline from the hub
        self.lock = threading.Lock()  # an engine serves one call at a time
        self.to(str(found))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "engine": None, "lock": None}  # a copy makes its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.Lock())

    def to(self, device: Optional[str]) -> "Pipeline":
        """Move both models; a default `dtype` becomes that of the device."""
        place = find_device(device)
        dtype = self.asked_dtype or default_dtype(place)
        check_type(dtype, place)
        self.device, self.dtype = place, dtype
        self.tokenizer.to(self.device)
        self.generator.to(self.device)
        self.decoder = ImageDecoder(self.tokenizer, self.dtype)
        self.engine: Optional[Engine] = None
        return self

    # ------------------------------------------------------------------ folders and the hub
    @classmethod
    def from_pretrained(
        cls, name: str | Path, revision: Optional[str] = None, **options: Any
    ) -> "Pipeline":
        """A pipeline from a folder that `save_pretrained` wrote, or from one on the hub (org/name).

        `revision` is a commit, tag or branch on the hub, by default the newest commit of the main branch;
        a commit pins the weights. Both files come from one commit, `pipeline.revision`. `options` are
        those of the class. Raises InputError if the hub does not answer, and as the class does.
        """
        folder = hub.local_or_downloaded(name, revision, (hub.GENERATOR_FILE, hub.TOKENIZER_FILE))
        pipeline = cls(folder / hub.GENERATOR_FILE, folder / hub.TOKENIZER_FILE, **options)
        pipeline.revision = None if folder == expanded(name) else folder.name
        return pipeline

    def save_pretrained(self, folder: str | Path, name: Optional[str] = None) -> None:
        """Write generator.safetensors and tokenizer.safetensors with config.json and a model card, README.md.

        The card calls the models `name`, by default the folder. An existing README.md is kept.
        """
        folder = expanded(folder)
        state = self.tokenizer.state_dict()
        known, stage = fingerprint(state), self.about[TOKENIZER].stage
        tokenizer = about_model(TOKENIZER, self.tokenizer.config, known, stage=stage)
        write_state_dict(state, folder / hub.TOKENIZER_FILE, tokenizer)
        sizes = about_model(GENERATOR, self.generator.config).config
        generator = replace(self.about[GENERATOR], config=sizes, tokenizer=known)
        write_state_dict(self.generator.state_dict(), folder / hub.GENERATOR_FILE, generator)
        texts = {hub.CONFIG: hub.config_json(generator, tokenizer)}
        if not (folder / hub.CARD).exists():
            texts[hub.CARD] = hub.model_card(name or str(folder), generator, tokenizer)
        for file, text in texts.items():
            with whole_file(folder / file) as partial:
                # Folder names may not be valid UTF-8; JSON decodes these escapes to the same names.
                partial.write_bytes(text.encode("utf-8", "backslashreplace"))

    def push_to_hub(
        self,
        name: str,
        branch: Optional[str] = None,
        private: Optional[bool] = None,
        message: str = "Upload weights",
    ) -> str:
        """Upload both models to a repository on the hub (org/name), which is created if needed. An existing
        model card is kept.

        Returns the commit, for `from_pretrained(name, revision=…)`. `branch` is created if needed; None:
        main. Raises InputError if the hub does not answer or refuses.
        """
        with tempfile.TemporaryDirectory(prefix="alitok-") as folder:
            self.save_pretrained(folder, name)
            return hub.upload(Path(folder), name, branch, private, message)

    # ------------------------------------------------------------------ images
    def encode(self, *photos: Any) -> Tensor:
        """`Tokenizer.encode_photos`: photos -> codes (B, T), int64, for example for `prefix`."""
        return self.tokenizer.encode_photos(*photos)

    def decode(self, codes: Tensor) -> list[Any]:
        """Codes (B, T) -> B PIL images, computed as in `__call__`."""
        self.tokenizer.check_codes(codes)
        return to_pil(self.decoder(codes.to(self.device)))

    def __call__(
        self,
        classes: Sequence[int | str | None],
        seed: int | Sequence[int] = 0,
        prefix: Optional[Tensor] = None,
        output: str = "tensor",
        **sampling: float | int | str,
    ) -> Any:
        """Images of these classes: (N, S, S, 3), uint8, on the CPU; a list of PIL images if `output` is "pil".

        A class is a number, a name ("golden retriever") or None: an image without a class, which
        guidance does not change. `sampling` are the fields of `modeling.sampling.Sampling`:
        guidance_scale, guidance_scale_pow, guidance_schedule, randomize_temperature, top_k, top_p; by
        default, guidance is off. Image i depends on its class, (seed, i), settings and precision, up to
        rounding that depends on the batch and on compiling, like image i of sample_imagenet.py. With a
        list of N seeds, image i is the first image of seed[i]. `prefix` (N, n) or (1, n) holds the first codes; a code
        `modeling.sampling.DRAWN` (-1) in it is drawn. Raises InputError for no or unknown classes and
        invalid seeds, prefixes or settings.
        """
        if output not in ("tensor", "pil"):
            raise InputError(f"output={output}: choose tensor or pil")
        labels = class_labels(classes, self.names)
        untrained = self.about[GENERATOR].without_images(set(labels.tolist()) - {NO_CLASS})
        if untrained:
            few = ", ".join(map(str, untrained[:3]))
            warnings.warn(
                f"the generator was not trained on class {few}: choose others", stacklevel=2
            )
        uniforms = self.uniforms(seed, len(labels))
        if prefix is not None:
            prefix = self.beginnings(prefix, len(labels))
        settings = sampling_settings(sampling)
        if (labels == NO_CLASS).all():  # guidance would double the work and change nothing
            settings = replace(settings, guidance_scale=1.0)
        with self.lock:
            codes = self.engine_of(len(labels), settings).sample(labels, uniforms, prefix)
            images = self.decoder(codes).to("cpu", copy=True)  # a copy is no inference tensor
        return to_pil(images) if output == "pil" else images

    def beginnings(self, prefix: Any, images: int) -> Tensor:
        """The first codes (images, n), int64, of a call's `prefix`. Raises InputError if they do not fit the model."""
        config = self.generator.config
        kind = prefix.dtype if isinstance(prefix, Tensor) else type(prefix).__name__
        if not isinstance(kind, torch.dtype) or kind.is_floating_point or kind is torch.bool:
            raise InputError(f"a prefix of type {kind}: pass a tensor of integers, the codes")
        shape = tuple(prefix.shape)
        if len(shape) != 2 or shape[0] not in (1, images) or shape[1] > config.image_seq_len:
            raise InputError(
                f"a prefix of shape {shape} for {images} images: pass codes (1, n) for all, or ({images}, n), with "
                f"n at most {config.image_seq_len}"
            )
        codes = prefix.to(torch.int64)
        if ((codes < DRAWN) | (codes >= config.codebook_size)).any():
            raise InputError(
                f"the prefix holds codes {codes.min()}…{codes.max()}: this model has codes "
                f"0…{config.codebook_size - 1}, and {DRAWN} stands for one to draw"
            )
        return codes.expand(images, -1)

    def engine_of(self, batch: int, settings: Sampling) -> Engine:
        """The engine of the last call, if it is one of these settings and of the generator's present weights."""
        parameters = [p for p in self.generator.parameters() if not p.is_inference()]
        wanted = batch, settings, id(self.generator), sum(p._version for p in parameters)
        if self.engine is None or self.made_for != wanted:
            self.engine = None  # frees its memory for the next
            self.engine = Engine(self.generator, batch, settings, self.dtype, self.compiled)
            self.made_for = wanted
        return self.engine

    def uniforms(self, seed: int | Sequence[int], images: int) -> Tensor:
        """The random numbers (images, T) of one seed, or of one seed per image."""
        alone = not isinstance(seed, Sequence) or isinstance(seed, str)
        seeds: list[Any] = [seed] if alone else list(seed)  # pyright: ignore[reportArgumentType]
        for each in seeds:
            if not isinstance(each, Integral) or each < 0:
                raise InputError(f"seed {each}: pass a whole number, 0 or more")
        steps = self.generator.config.image_seq_len
        if alone:
            return image_uniforms(seeds[0], range(images), steps)
        if len(seeds) != images:
            raise InputError(
                f"{len(seeds)} seeds for {images} images: pass one for all, or one each"
            )
        return torch.cat([image_uniforms(each, [0], steps) for each in seeds])


def class_labels(classes: Sequence[int | str | None], names: ClassNames) -> Tensor:
    """The labels (N,), int64, of classes by number, name or None. Raises InputError."""
    try:
        items = [] if isinstance(classes, str) else list(classes)
    except TypeError:
        items = []
    if not items:
        raise InputError(
            f"classes {classes!r}: pass a list of class numbers, names or None, such as [207]"
        )
    doubt = sorted_as_text(names.folders)
    if doubt and any(isinstance(item, int) for item in items):
        warnings.warn(doubt, stacklevel=3)
    return torch.tensor(names.labels(items))


def sampling_settings(values: dict[str, float | int | str]) -> Sampling:
    names = [field.name for field in fields(Sampling)]
    for name in values:
        if name not in names:
            raise InputError(f"unknown sampling setting {name}: choose from {', '.join(names)}")
    return Sampling(**values)  # type: ignore[arg-type] (their own checks refuse wrong values)
