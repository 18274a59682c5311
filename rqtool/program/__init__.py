"""The integer program: one definition (golden.py), several carriers (torch, ONNX) that must equal
it."""
