"""From a folder of radiographs to batches. Only `loaders` needs torch; the rest is files, tables and arrays."""
