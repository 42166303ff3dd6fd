"""From a program to kernels, and from kernels to one ahead-of-time artefact."""
