"""The older name of `hydrahead.convert.scoring.probes`."""

from .scoring.probes import *  # noqa: F403
from .scoring.user_probes import jsonl_probes  # noqa: F401
