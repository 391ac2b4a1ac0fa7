"""AliTok's models: tokenizer, generator and sampling. Needs torch, einops, NumPy and safetensors only."""
