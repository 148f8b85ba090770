"""Imports of a training job, made once in the fork server; leaves one thread."""

import gc

from tests.support.zygote import import_training

import_training()
# A collection in a fork would visit a million objects, and copy the pages that it marks.
gc.collect()
gc.freeze()
