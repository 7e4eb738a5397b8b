"""Logical axes, meshes, and kernels on meshes."""
