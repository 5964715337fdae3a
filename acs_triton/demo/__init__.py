"""The library's main job in one command: ``python -m acs_triton.demo``.

An ImageNet network becomes the encoder of a 3D segmentation network and is fine-tuned on a
real brain volume, next to the same network from random weights.
"""
