"""AliTok's models: tokenizer, generator and sampling. Needs torch, einops and safetensors only."""
