"""
HydraHead in vLLM: a plug-in that vLLM finds by itself where both are installed.

    pip install 'hydrahead[vllm]'
    vllm serve FOLDER_OR_HUB_ID
"""

import logging

RELEASE = "0.26"  # of vLLM, whose insides the plug-in was written against


def why_not_with(version: str) -> str | None:
    """What to say where vLLM is of another version, or `None`."""
    if version.split(".")[:2] == RELEASE.split("."):
        return None
    return f"HydraHead is served by vLLM {RELEASE}, and this is {version}: pip install 'vllm=={RELEASE}.*'"


def register() -> None:
    """Make HydraHead known to vLLM, in each of its processes; what its entry point `vllm.general_plugins` calls."""
    from vllm import ModelRegistry, __version__

    problem = why_not_with(__version__)
    if problem is not None:
        # Said, not raised: vLLM serves other models too. Whoever serves HydraHead meets it again, from `vllm.py`.
        logging.getLogger("vllm.hydrahead").error(problem)
    # By name: imported here, it would touch the GPU in a process that vLLM forks. Registered in either case, for an
    # architecture that vLLM does not know it would run as a transformers model, and forget the recurrent states.
    ModelRegistry.register_model("HydraHeadForCausalLM", "hydrahead.serving.vllm:HydraHeadForCausalLM")
