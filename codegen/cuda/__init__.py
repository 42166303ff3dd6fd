"""CUDA: kernels as CUDA C, compiled by NVRTC without a GPU, launched by a small C library, checked on the CPU."""
