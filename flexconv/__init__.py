"""Convolutions whose kernel is a continuous function and whose size is learned.

The layers and models, without fastai; training, data and plots are in `flexconv.all`.
Written by hand: nbdev only keeps the version up to date.
"""
__version__ = "0.1.0"

from .kernels import KernelNetwork, create_kernel_network, position_grid, register_kernel_network
from .magnet import MAGNet
from .mask import GaussianMask
from .conv import conv_nd
from .layers import CKConv1d, CKConv2d, CKConv3d, FlexConv1d, FlexConv2d, FlexConv3d, conv_layers, kernel_sizes
from .aliasing import aliasing_loss, highest_frequency, nyquist_frequency
from .registry import create_model, list_models, register_model
from .hub import from_pretrained
from .flexnet import FlexNet, FlexTCN
from . import baselines, successors      # register their models
from .summary import layer_table

__all__ = ['KernelNetwork', 'create_kernel_network', 'position_grid', 'register_kernel_network', 'MAGNet',
           'GaussianMask', 'conv_nd', 'CKConv1d', 'CKConv2d', 'CKConv3d', 'FlexConv1d', 'FlexConv2d', 'FlexConv3d',
           'conv_layers', 'kernel_sizes', 'aliasing_loss', 'highest_frequency', 'nyquist_frequency', 'create_model',
           'list_models', 'register_model', 'from_pretrained', 'FlexNet', 'FlexTCN', 'layer_table']
