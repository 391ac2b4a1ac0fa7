"""Images and tokens on disk: folders and crops, the packed token store, the order of samples.

`data/tokens.py` documents the token store byte by byte, for readers in any language.
"""
