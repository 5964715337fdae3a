"""Random convolutions for property-based tests."""

from hypothesis import strategies as st

sizes = st.tuples(*[st.integers(1, 9)] * 3)


@st.composite
def acs_arguments(draw, plane_pairs=True):
    """Channels, kernel, input size and keyword arguments of ``acs_conv3d``; not all of them fit together."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    in_channels = groups * draw(st.integers(1, 3))
    out_channels = groups * draw(st.integers(1, 4))
    if draw(st.booleans()):
        kernel = (draw(st.integers(1, 5)),) * 2
    else:
        kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    paddings = [st.integers(0, 3), st.just("same"), st.just("valid"), st.just(tuple(k // 2 for k in kernel))]
    dilations = [st.just(1), st.integers(1, 3)]
    if plane_pairs:
        paddings += [st.tuples(*[st.integers(0, 2)] * 2), st.tuples(*[st.integers(0, 2)] * 3)]
        dilations += [st.tuples(*[st.integers(1, 2)] * 2), st.tuples(*[st.integers(1, 2)] * 3)]
    axial = draw(st.integers(0, out_channels))
    coronal = draw(st.integers(0, out_channels - axial))
    return {
        "shape": (draw(st.integers(1, 2)), in_channels, *draw(sizes)),
        "weight": (out_channels, in_channels // groups, *kernel),
        "channels_last": draw(st.booleans()),
        "split": draw(st.sampled_from([None, (axial, coronal, out_channels - axial - coronal)])),
        "options": {
            "stride": draw(st.one_of(st.integers(1, 3), st.tuples(*[st.integers(1, 3)] * 3))),
            "padding": draw(st.one_of(paddings)),
            "dilation": draw(st.one_of(dilations)),
            "groups": groups,
        },
    }
