"""README.md, the model card, and config.json of a folder of weights."""

import json

from .metadata import About

SHOWN = 10  # names of classes
CARD = """---
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
    return CARD.format(name=name, stage=stage, classes=classes, generator=generator, **sizes)


def config_json(generator: About, tokenizer: About) -> str:
    """The metadata of both files as config.json, by whose requests the hub counts downloads."""
    content = {"model_type": "alitok"}
    content |= {about.kind: about.entry() for about in (generator, tokenizer)}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
