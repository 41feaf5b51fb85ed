"""Shipping an engine: as a model repository that Triton serves, or as one file that rebuilds and proves itself."""

from .make import bundle_engine as bundle_engine
from .opened import open_bundle as open_bundle
