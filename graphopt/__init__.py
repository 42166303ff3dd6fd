"""Turns FLOPs reductions into wall-clock speed."""
