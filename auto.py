"""
HydraHead among transformers' auto classes: our own code loads a HydraHead folder, the code in the folder is not run.
And among the models whose layers PEFT knows: adapters find their places without `target_modules`.

`AutoModel.register` needs transformers and PyTorch, and `import hydrahead` is to wait for neither. So HydraHead is
registered where the tables are loaded already, and elsewhere as soon as they are.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TABLES = (
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.modeling_auto",
    "peft.utils.constants",
)


class LaterClass:
    """
    Stands for a class of our model in transformers' tables, and is imported when it is asked for anything.

    Not before: `transformers.modeling_layers`, which our model needs, loads the tables before it defines anything.
    """

    def __init__(self, name: str, config_class: type):
        self.name, self.config_class = name, config_class

    def __getattr__(self, attribute: str):
        return getattr(getattr(importlib.import_module("hydrahead.modeling_hydrahead"), self.name), attribute)


def register(table: ModuleType) -> None:
    """Enter HydraHead into what one of `TABLES` defines."""
    from .configuration_hydrahead import HydraHeadConfig

    if table.__name__ == TABLES[0]:
        table.AutoConfig.register("hydrahead", HydraHeadConfig, exist_ok=True)
    elif table.__name__ == TABLES[2]:
        for name, modules in vars(table).items():
            if name.endswith("_MODULES_MAPPING") and "qwen3" in modules:  # whose layers have our layers' names
                modules["hydrahead"] = modules["qwen3"]
    else:
        for auto_class, name in (
            (table.AutoModel, "HydraHeadModel"),
            (table.AutoModelForCausalLM, "HydraHeadForCausalLM"),
        ):
            auto_class.register(HydraHeadConfig, LaterClass(name, HydraHeadConfig), exist_ok=True)


class RegisterOnImport:
    """Among Python's finders of modules (`sys.meta_path`): registers HydraHead after a table has been loaded."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in TABLES else None
        if spec is not None:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (load(module), register(module))
        return spec


def register_now_or_on_import() -> None:
    """Make `model_type: hydrahead` known to `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and PEFT."""
    sys.meta_path.insert(0, RegisterOnImport)
    for name in TABLES:
        if name in sys.modules:
            register(sys.modules[name])
