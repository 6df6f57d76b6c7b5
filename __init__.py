"""HydraHead: head-level hybrids of full attention and Gated DeltaNet, made from pretrained transformers."""

from .configuration_hydrahead import HydraHeadConfig
from .modeling_hydrahead import HydraHeadForCausalLM, HydraHeadModel

__version__ = "0.1.0"
__all__ = ["HydraHeadConfig", "HydraHeadForCausalLM", "HydraHeadModel"]
