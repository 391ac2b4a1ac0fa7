"""Images and tokens on disk: folders and crops, the packed token store, the order of samples."""
