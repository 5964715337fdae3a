"""Every kind of bad input: an error of the right type that names the argument, its value and what is right."""

import pytest
import torch

from acs_triton import use_backend
from acs_triton.functional import acs_conv3d, conv2_5d, soft_acs_conv3d
from acs_triton.operators import ACSConv, Conv2_5d, SoftACSConv

X, W, B = torch.zeros(1, 4, 6, 6, 6), torch.zeros(6, 4, 3, 3), torch.zeros(6)
V = torch.full((6, 3), 1 / 3)


def conv(x=X, w=W, b=B, **options):
    return lambda: acs_conv3d(x, w, b, **options)


TABLE = [
    (conv(x=X[0, 0]), ValueError, r"input must have the shape \(N, C, D, H, W\).*got 3 axes: \(6, 6, 6\)"),
    (conv(x=X[None]), ValueError, r"got 6 axes"),
    (conv(x=[1.0]), TypeError, r"input must be a torch.Tensor, got list"),
    (conv(x=X.int()), TypeError, r"input has dtype torch.int32; it must be one of torch.float64"),
    (conv(x=X.to(torch.complex64)), TypeError, r"complex64"),
    (conv(x=X[:, :3]), ValueError, r"input has 3 channels, but weight \(6, 4, 3, 3\) with groups=1 needs 4"),
    (conv(w=W[..., None]), ValueError, r"weight must have the 2D shape.*got \(6, 4, 3, 3, 1\)"),
    (conv(w=None), TypeError, r"weight must be a torch.Tensor, got NoneType"),
    (conv(w=W[:0], b=None), ValueError, r"groups=1 must divide the 0 output channels"),
    (conv(w=W[..., :0]), ValueError, r"weight must not be empty, got shape \(6, 4, 3, 0\)"),
    (conv(b=B[:5]), ValueError, r"bias must have the shape \(6,\), got \(5,\)"),
    (conv(b=1.0), TypeError, r"bias must be a torch.Tensor or None, got float"),
    (conv(w=W.double()), TypeError, r"weight has dtype torch.float64, input has torch.float32"),
    (conv(b=B.half()), TypeError, r"bias has dtype torch.float16"),
    (conv(w=W.to("meta")), ValueError, r"weight is on meta, input on cpu"),
    (conv(b=B.to("meta")), ValueError, r"bias is on meta, input on cpu"),
    (conv(groups=4), ValueError, r"groups=4 must divide the 6 output channels"),
    (conv(groups=2), ValueError, r"input has 4 channels, but .* with groups=2 needs 8"),
    (conv(groups=0), ValueError, r"groups=0 must divide"),
    (conv(groups=1.0), TypeError, r"groups must be an int, got 1.0"),
    (conv(groups=True), TypeError, r"groups must be an int, got True"),
    (conv(stride=0), ValueError, r"stride must be at least 1, got 0"),
    (conv(stride=-1), ValueError, r"stride must be at least 1, got -1"),
    (conv(stride=(1, 2)), ValueError, r"stride=\(1, 2\).*two different steps"),
    (conv(stride=(1, 2, 3, 4)), ValueError, r"stride must have 1 or 2 or 3 entries, got 4"),
    (conv(stride=1.5), TypeError, r"stride must be an int or a tuple of ints, got 1.5"),
    (conv(stride="2"), TypeError, r"stride must be an int or a tuple of ints, got '2'"),
    (conv(stride=None), TypeError, r"stride must be an int or a tuple of ints, got None"),
    (conv(stride={1: 2, 2: {}}), ValueError, r"stride="),
    (conv(padding=-1), ValueError, r"padding must be at least 0, got -1"),
    (conv(padding=(1, 1, -1)), ValueError, r"padding must be at least 0, got \(1, 1, -1\)"),
    (conv(padding="full"), ValueError, r"padding must be ints, 'same' or 'valid', got 'full'"),
    (conv(padding="same", stride=2), ValueError, r"padding='same' needs stride 1, got stride=\(2, 2, 2\)"),
    (conv(padding=[0.5]), TypeError, r"padding must be an int or a tuple of ints, got \(0.5,\)"),
    (conv(padding=()), ValueError, r"padding must have 1 or 2 or 3 entries, got 0"),
    (conv(dilation=0), ValueError, r"dilation must be at least 1, got 0"),
    (conv(dilation=(1, True)), TypeError, r"dilation must be an int or a tuple of ints"),
    (conv(dilation=3), ValueError, r"larger than the padded input along D: input size \(6, 6, 6\)"),
    (conv(split=(2, 2)), ValueError, r"split must have 3 entries, got 2"),
    (conv(split=(2, 2, 1)), ValueError, r"split=\(2, 2, 1\) sums to 5; .* sum to the 6 output channels"),
    (conv(split=(2, 2, 3)), ValueError, r"sums to 7"),
    (conv(split=(7, 0, -1)), ValueError, r"split must be at least 0, got \(7, 0, -1\)"),
    (conv(split=6), ValueError, r"split must have 3 entries, got 1"),
    (conv(split=(2.0, 2.0, 2.0)), TypeError, r"split must be an int or a tuple of ints"),
    (conv(x=X[:, :, :2]), ValueError, r"larger than the padded input along D: input size \(2, 6, 6\)"),
    (conv(x=X[..., :1]), ValueError, r"larger than the padded input along W"),
    (conv(x=X[:, :, :, :0]), ValueError, r"along H"),
    (conv(w=W[..., :1]), ValueError, r"different output sizes: H = 4 in the axial view, H = 6 in the sagittal view"),
    (conv(w=W[..., :1], padding=1), ValueError, r"different output sizes"),
    (conv(padding=(0, 1)), ValueError, r"different output sizes"),
    (lambda: soft_acs_conv3d(X, W, V[:, :2]), ValueError, r"view_weight must have the shape \(6, 3\).*got \(6, 2\)"),
    (lambda: soft_acs_conv3d(X, W, V[:5]), ValueError, r"view_weight must have the shape \(6, 3\)"),
    (lambda: soft_acs_conv3d(X, W, None), TypeError, r"view_weight must be a torch.Tensor, got NoneType"),
    (lambda: soft_acs_conv3d(X, W, V.double()), TypeError, r"view_weight has dtype torch.float64"),
    (lambda: soft_acs_conv3d(X, W, V, padding=-2), ValueError, r"padding must be at least 0, got -2"),
    (lambda: conv2_5d(X, W, axis=0), ValueError, r"axis must be -3 \(D\), -2 \(H\) or -1 \(W\), got 0"),
    (lambda: conv2_5d(X, W, stride=0), ValueError, r"stride must be at least 1"),
    (lambda: conv2_5d(X, W, dilation=4), ValueError, r"larger than the padded input along H"),
    (lambda: ACSConv(0, 6, 3), ValueError, r"in_channels must be a positive int, got 0"),
    (lambda: ACSConv(4, 6.0, 3), ValueError, r"out_channels must be a positive int, got 6.0"),
    (lambda: ACSConv(4, 6, 0), ValueError, r"kernel_size must be a positive int or a pair \(ku, kv\), got 0"),
    (lambda: ACSConv(4, 6, (3, 3, 5)), ValueError, r"kernel_size must be .* got \(3, 3, 5\)"),
    (lambda: ACSConv(4, 6, 3, groups=4), ValueError, r"groups=4 must .* divides out_channels=6"),
    (lambda: ACSConv(3, 6, 3, groups=2), ValueError, r"groups=2 must .* divides in_channels=3"),
    (lambda: ACSConv(4, 6, 3, padding_mode="mirror"), ValueError, r"padding_mode must be one of zeros.*got 'mirror'"),
    (lambda: ACSConv(4, 6, 3, acs_kernel_split=(1, 1, 1)), ValueError, r"split=\(1, 1, 1\) sums to 3"),
    (lambda: ACSConv(4, 6, 3, stride=-2), ValueError, r"stride must be at least 1"),
    (lambda: ACSConv(4, 6, 3, padding=7, padding_mode="reflect")(X), ValueError, r"can be at most 5 along D"),
    (lambda: ACSConv(4, 6, 3, padding=7, padding_mode="circular")(X), ValueError, r"can be at most 6 along D"),
    (lambda: ACSConv(4, 6, 3)(X[:, :2]), ValueError, r"input has 2 channels"),
    (lambda: ACSConv(4, 6, 3)(X.double()), TypeError, r"weight has dtype torch.float32, input has torch.float64"),
    (lambda: SoftACSConv(4, 6, 3)(X[0, 0]), ValueError, r"got 3 axes"),
    (lambda: Conv2_5d(4, 6, 3, unsqueeze_axis=1), ValueError, r"unsqueeze_axis must be .* got 1"),
    (lambda: Conv2_5d(4, 6, (3, 3, 3)), ValueError, r"kernel_size must be an int or a pair"),
    (lambda: Conv2_5d(4, 6, 3)(X[0, 0]), ValueError, r"got 3 axes"),
    (lambda: use_backend("cuda"), ValueError, r"backend must be one of 'auto', 'torch', 'triton', got 'cuda'"),
]


@pytest.mark.parametrize("row", range(len(TABLE)))
def test_bad_input(row):
    call, error, words = TABLE[row]
    with pytest.raises(error, match=words):
        call()


def test_operands_are_checked_again_when_one_is_another():
    """What passed once is not checked again; whatever differs is."""
    x, weight, bias = torch.ones(1, 2, 4, 4, 4), torch.ones(3, 2, 3, 3), torch.ones(3)
    for _ in range(2):
        acs_conv3d(x, weight, bias)
        with pytest.raises(ValueError, match="needs 2"):
            acs_conv3d(x[:, :1], weight, bias)
        with pytest.raises(TypeError, match="weight has dtype"):
            acs_conv3d(x, weight.double(), bias)
        with pytest.raises(ValueError, match="bias must have the shape"):
            acs_conv3d(x, weight, bias[:2])
        with pytest.raises(TypeError, match="groups must be an int"):
            acs_conv3d(x, weight, bias, groups=True)
