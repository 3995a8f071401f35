"""What makes training and predicting faster: the same network in fewer and cheaper steps."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torchvision.ops.misc import SqueezeExcitation

from stages.common.params import Precision

AnyModule = TypeVar("AnyModule", bound=nn.Module)

# Where the weights of a linear layer are fewer, what is below cannot be measured.
_WIDE = 2**20


def fold_batchnorm(module: AnyModule) -> AnyModule:
    """Return a module that computes the same in fewer steps, with the same parameters and buffers, not copies of them.

    Where a Sequential has a convolution right before a BatchNorm, the two become one convolution. BatchNorm has to be
    in evaluation mode and frozen, as `Network` keeps it. Training the result trains `module`. What lies between two
    modules of a Sequential is no longer what it was: where it is looked at, each of the two has to be folded by itself.
    """
    shared = [*module.parameters(), *module.buffers()]
    folded = copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
    for sequence in _sequences(folded):
        for position in range(len(sequence) - 1):
            conv, norm = sequence[position], sequence[position + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                sequence[position], sequence[position + 1] = _FoldedConv2d(conv, norm), nn.Identity()
    return folded


def fuse_for_training(module: AnyModule, device: torch.device, precision: Precision) -> AnyModule:
    """Return a module that trains the same parameters in fewer and cheaper steps; BatchNorm as for `fold_batchnorm`."""
    fused = fold_batchnorm(module)
    for child in fused.modules():
        # In place, autograd has to copy the input first: unlike ReLU's, their gradients are computed from that.
        if isinstance(child, nn.Hardswish | nn.Hardsigmoid | nn.SiLU):
            child.inplace = False
    if device.type == "cpu":
        for sequence in _sequences(fused):
            for position, layer in enumerate(sequence):
                sequence[position] = _choose_for_cpu(layer, precision)
    return fused


def _choose_for_cpu(layer: nn.Module, precision: Precision) -> nn.Module:
    if precision == "float32":
        if isinstance(layer, nn.Linear) and layer.bias is not None and layer.weight.numel() >= _WIDE:
            return _WideLinear(layer)
        if isinstance(layer, nn.Conv2d) and _trains_slowly(layer):
            return _ChannelwiseConv2d(layer)
        if isinstance(layer, SqueezeExcitation):
            return _SqueezeExcitation(layer)
        return layer
    depthwise = isinstance(layer, _FoldedConv2d) and layer.conv.groups > 1
    return _InFloat32(layer) if depthwise else layer


def _sequences(module: nn.Module) -> list[nn.Sequential]:
    return [child for child in module.modules() if isinstance(child, nn.Sequential)]


class _FoldedConv2d(nn.Module):
    """A convolution and the frozen BatchNorm after it as one convolution: BatchNorm in evaluation mode is affine.

    The convolution's parameters stay its own, so an optimizer trains them through the fold.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = conv
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.detach() * torch.rsqrt(norm.running_var + norm.eps)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", norm.bias.detach() - norm.running_mean * scale)

    def forward(self, images: Tensor) -> Tensor:
        bias = self.shift if self.conv.bias is None else self.shift + self.scale * self.conv.bias
        weight = self.conv.weight * self.scale.view(-1, 1, 1, 1)
        if _trains_slowly(self.conv) and images.device.type == "cpu" and images.dtype == torch.float32:
            return _convolve_each_channel(images, weight, bias, self.conv.stride[0])
        folded: Tensor = self.conv._conv_forward(images, weight, bias)
        return folded


class _ChannelwiseConv2d(nn.Module):
    """A convolution for which `_trains_slowly` holds, with gradients that take half as long."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, images: Tensor) -> Tensor:
        return _convolve_each_channel(images, self.conv.weight, self.conv.bias, self.conv.stride[0])


def _trains_slowly(conv: nn.Conv2d) -> bool:
    """Say whether a convolution is one of each channel by itself with a kernel of 5 x 5, 7 x 7 ...

    For gradients of kernels wider than 3, oneDNN has only its general code: 7 ms where a kernel of 5 x 3 takes 0.4.
    """
    size, stride = conv.kernel_size[0], conv.stride[0]
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and conv.groups == conv.in_channels == conv.out_channels > 1
        and size > 3
        and size % 2 == 1
        and (conv.kernel_size, conv.padding) == ((size, size), (size // 2, size // 2))
        and (conv.stride, conv.dilation, conv.padding_mode) == ((stride, stride), (1, 1), "zeros")
    )


def _convolve_each_channel(images: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    outputs: Tensor = _ConvolveEachChannel.apply(images, weight, bias, stride)
    return outputs


class _ConvolveEachChannel(torch.autograd.Function):
    """The convolution, whose gradients are those of others.

    By the images, a convolution with the kernel turned around; by the kernel, those of kernels 3 wide, side by side.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(images, weight)
        ctx.stride = stride
        return functional.conv2d(images, weight, bias, stride, weight.shape[3] // 2, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 (torch's has no types)
        images, weight = ctx.saved_tensors
        by_images, by_weight, by_bias, _ = ctx.needs_input_grad
        padding, of_images, of_weight = weight.shape[3] // 2, None, None
        if by_images and ctx.stride == 1:
            of_images = functional.conv2d(gradient, weight.flip(2, 3), padding=padding, groups=len(weight))
        elif by_images:
            of_images, _, _ = _gradients(gradient, images, weight, ctx.stride, (padding, padding), (True, False, False))
        if by_weight:
            of_weight = _by_wide_kernels(gradient, images, weight, ctx.stride)
        return of_images, of_weight, gradient.sum((0, 2, 3)) if by_bias else None, None


def _by_wide_kernels(gradient: Tensor, images: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Return the gradient by kernels wider than 3, in strips of 3."""
    size, (height, width) = weight.shape[3], images.shape[2:]
    # oneDNN's fast code is for maps that are as high as the kernel: lower ones are padded here, and not by it.
    above = size // 2 if height < size else 0
    of_weight = torch.empty_like(weight)
    for column in sorted({*range(0, size - 2, 3), size - 3}):
        left = size // 2 - column
        right = (gradient.shape[3] - 1) * stride + 3 - width - left
        shifted = functional.pad(images, (left, right, above, above))
        strip = slice(column, column + 3)
        _, of_weight[..., strip], _ = _gradients(
            gradient, shifted, weight[..., strip], stride, (size // 2 - above, 0), (False, True, False)
        )
    return of_weight


def _gradients(
    gradient: Tensor,
    images: Tensor,
    weight: Tensor,
    stride: int,
    padding: tuple[int, int],
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return those gradients that are wanted, of a convolution of each channel: by images, kernels, biases."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        gradient, images, weight, None, [stride] * 2, padding, [1, 1], False, [0, 0], len(weight), wanted
    )
    return found


class _SqueezeExcitation(nn.Module):
    """torchvision's layer, with gradients that go over the maps half as often."""

    def __init__(self, layer: SqueezeExcitation) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            plain: Tensor = self.layer(images)
            return plain
        trained = [parameter for parameter in self.layer.parameters() if parameter.requires_grad]
        outputs: Tensor = _SqueezeAndExcite.apply(images, self.layer, *trained)
        return outputs


class _SqueezeAndExcite(torch.autograd.Function):
    """Scales each channel of a picture by what two small layers make of the means of all channels.

    The gradient by the images has two parts: through the scales, and beside them. Autograd writes each as maps of its
    own, and adds them up.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, layer: SqueezeExcitation, *trained: nn.Parameter) -> Tensor:  # noqa: ANN401
        means = functional.adaptive_avg_pool2d(images, 1)
        with torch.enable_grad():
            means.requires_grad_()
            # As convolutions, oneDNN takes five times as long.
            squeezed = functional.linear(means.flatten(1), layer.fc1.weight.flatten(1), layer.fc1.bias)
            excited = functional.linear(layer.activation(squeezed), layer.fc2.weight.flatten(1), layer.fc2.bias)
            scales: Tensor = layer.scale_activation(excited)[..., None, None]
        ctx.save_for_backward(images)
        ctx.means, ctx.scales, ctx.trained = means, scales, trained
        return images * scales

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (images,) = ctx.saved_tensors
        by_scales = (gradient * images).sum((2, 3), keepdim=True)
        by_means, *by_trained = torch.autograd.grad(ctx.scales, [ctx.means, *ctx.trained], by_scales)
        by_images = torch.addcmul(by_means / images[0, 0].numel(), gradient, ctx.scales)
        # With the parameters' strides: DistributedDataParallel warns of others.
        laid_out = (torch.empty_like(own).copy_(by) for own, by in zip(ctx.trained, by_trained, strict=True))
        return by_images, None, *laid_out


class _InFloat32(nn.Module):
    """A layer that computes in float32 under autocast: oneDNN trains depthwise convolutions faster so."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            outputs: Tensor = self.layer(inputs.float())
            return outputs


class _WideLinear(nn.Module):
    """A linear layer as a convolution with exchanged roles: the weights are the picture, the batch is the filters.

    oneDNN's 1 x 1 convolution then finds both as they lie in memory. On a CPU of AMD's, forward and backward take half
    as long as torch's own way, which is MKL's matrix product. Inputs that are not (n, features), as the maps inside
    ConvNeXt's blocks, go torch's own way.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dim() != 2:
            plain: Tensor = self.linear(inputs)
            return plain
        outputs, features = self.linear.weight.shape
        picture = self.linear.weight.view(1, 1, outputs, features).permute(0, 3, 1, 2)
        products = functional.conv2d(picture, inputs.reshape(len(inputs), features, 1, 1))
        return products.view(len(inputs), outputs) + self.linear.bias
