"""From a dataset to token ids: read, recognise, split, render with one chat format, walk in order."""
