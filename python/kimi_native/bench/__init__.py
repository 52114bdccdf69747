"""Benchmarks: the native program, whole models, peers beside ours, pictures of the rows. Run by `kimi-native bench`."""
