"""Networks: the U-Nets that denoise, the reference encoder and its fusion, the grading networks, and their weight files.

Import from the modules: torch, MONAI and timm take seconds each, and nobody should pay for those they do not use.
"""
