"""Pretrain and fine-tune 3D brain MRI segmentation networks in plain PyTorch."""

__version__ = "0.1.0"
