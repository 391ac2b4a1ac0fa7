"""Images and tokens on disk: folders and crops, token caches, the order of samples.

`data/tokens.py` documents the packed token store byte by byte, for readers in any language.
"""
