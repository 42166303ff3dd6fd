"""What torch.export saved, as tflite: `convert_litert.py IN.pt2 OUT.tflite`, in the environment of LiteRT."""

import sys

import litert_torch
import torch

source, out = sys.argv[1:]
exported = torch.export.load(source)
args, kwargs = exported.example_inputs
litert_torch.convert(exported.module(), args, kwargs or None).export(out)
