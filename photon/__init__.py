"""Photon: question-conditioned token pruning for 3D medical volumes (arXiv 2603.25155), in plain torch.

This package is the method and nothing else: it needs torch, numpy and safetensors.
"""

__version__ = "0.1.0"
