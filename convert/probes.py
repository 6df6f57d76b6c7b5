"""The older name of `hydrahead.convert.scoring.probes`."""

from .scoring.probes import *  # noqa: F403
