"""Weight formats: INT4 and INT8 in groups of 32, FP8 in blocks of 128 x 128."""
