"""A GPU that is not there: CUDA tensors in the CPU's memory, for the code around the kernels.

`device.cpp` gives torch's build for CPUs a device "cuda": tensors there are computed by the CPU's
kernels, and an operator that is given tensors of both raises, as on a GPU. So whatever is left
behind in the CPU's memory is found, and backward passes run in the threads that a device has. The
CUDA kernels are the emulated ones (tests/cuda). It says nothing of speed, of races between streams,
or of what cuBLAS does.

The library has to be there before torch is: tests run in a process of their own,

    python -m tests.stand_in tests/gpu          # pytest's arguments follow
"""

ENVIRONMENT = "AIRL_FAST_STAND_IN"  # where the library is, for the plugin
