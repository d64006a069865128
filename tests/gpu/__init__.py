"""What surrounds the kernels, on a GPU or on the stand-in for one (tests/stand_in)."""
