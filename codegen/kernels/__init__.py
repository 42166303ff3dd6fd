"""Kernel templates, one file per kernel family."""
