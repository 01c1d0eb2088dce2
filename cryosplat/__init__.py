"""Cryo-EM homogeneous reconstruction by Gaussian splatting."""

__version__ = "0.1.0"
