"""Builds Horovod against the installed frameworks: ``python -m toolkit.horovod_build``."""
