"""Kernels that stand in for the reference operators of `mistralcli.ops`."""
