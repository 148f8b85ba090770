"""Imports of a training job, made once in the fork server; leaves one thread."""

from tests.support.zygote import import_training

import_training()
